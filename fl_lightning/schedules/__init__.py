"""Who works when: sampling of cohorts, and the lanes in which a cohort is added up."""

from fl_lightning.schedules.lanes import assign_lanes, lanes_of_rank
from fl_lightning.schedules.samplers import (
    FixedSampler,
    PoissonSampler,
    PowerOfChoiceSampler,
    RoundRobinSampler,
    SizeSampler,
)
from fl_lightning.schedules.sampling import Sampler, UniformSampler, cohort_size, require_delivered, require_enough

__all__ = [
    "FixedSampler",
    "PoissonSampler",
    "PowerOfChoiceSampler",
    "RoundRobinSampler",
    "Sampler",
    "SizeSampler",
    "UniformSampler",
    "assign_lanes",
    "cohort_size",
    "lanes_of_rank",
    "require_delivered",
    "require_enough",
]
