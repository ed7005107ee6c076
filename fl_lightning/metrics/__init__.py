"""Exact federated metrics: what a module logs travels as sums and states, and equals the value over pooled data."""

from fl_lightning.metrics.capture import capture, reset_metric_attributes
from fl_lightning.metrics.isolation import alone
from fl_lightning.metrics.loading import load_metric_state
from fl_lightning.metrics.merging import merge_states
from fl_lightning.metrics.parts import LeftOut, Max, Mean, Min, Part, TorchmetricPart, Total
from fl_lightning.metrics.spread import higher_is_better, spread
from fl_lightning.metrics.states import (
    MetricState,
    has_cat_states,
    holds_examples,
    metric_state,
    state_num_bytes,
)
from fl_lightning.metrics.step_sums import StepSums
from fl_lightning.metrics.sums import Evaluation, MetricSums

__all__ = [
    "Evaluation",
    "LeftOut",
    "Max",
    "Mean",
    "MetricState",
    "MetricSums",
    "Min",
    "Part",
    "StepSums",
    "TorchmetricPart",
    "Total",
    "alone",
    "capture",
    "has_cat_states",
    "higher_is_better",
    "holds_examples",
    "load_metric_state",
    "merge_states",
    "metric_state",
    "reset_metric_attributes",
    "spread",
    "state_num_bytes",
]
