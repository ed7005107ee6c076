"""Who works when: sampling of cohorts, and the lanes in which a cohort is added up."""

from fl_lightning.schedules.buffered import BufferedSchedule
from fl_lightning.schedules.lanes import assign_lanes, assign_waves, lanes_of_rank
from fl_lightning.schedules.plan import Delivery, Dispatch, Occasion, Plan, Schedule, Timing
from fl_lightning.schedules.samplers import (
    FixedSampler,
    PoissonSampler,
    PowerOfChoiceSampler,
    RoundRobinSampler,
    SizeSampler,
)
from fl_lightning.schedules.sampling import (
    Patience,
    Sampler,
    UniformSampler,
    cohort_size,
    require_delivered,
    require_enough,
)
from fl_lightning.schedules.synchronous import SynchronousSchedule

__all__ = [
    "BufferedSchedule",
    "Delivery",
    "Dispatch",
    "FixedSampler",
    "Occasion",
    "Patience",
    "Plan",
    "PoissonSampler",
    "PowerOfChoiceSampler",
    "RoundRobinSampler",
    "Sampler",
    "Schedule",
    "SizeSampler",
    "SynchronousSchedule",
    "Timing",
    "UniformSampler",
    "assign_lanes",
    "assign_waves",
    "cohort_size",
    "lanes_of_rank",
    "require_delivered",
    "require_enough",
]
