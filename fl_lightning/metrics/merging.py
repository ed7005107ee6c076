"""Two states of a metric become one, by what the metric declared (the table in ``states.py``)."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.metrics.states import Leaf, MetricState

__all__ = ["merge_states"]


def merge_states(left: MetricState, right: MetricState) -> MetricState:
    """Return the state of a metric that saw what both saw: associative, and commutative to rounding.

    Raises:
        MisconfigurationException: when the states are of different metrics or shapes.

    Example:
        >>> from torchmetrics import MaxMetric
        >>> from fl_lightning.metrics import metric_state
        >>> a, b = MaxMetric(), MaxMetric()
        >>> a.update(1.0), b.update(2.0)
        (None, None)
        >>> merge_states(metric_state(a), metric_state(b))["states"]["max_value"]["value"].item()
        2.0
    """
    _check_same(left, right)
    merged = {name: merge_states(child, right["children"][name]) for name, child in left["children"].items()}
    if not left["updates"]:
        states = right["states"]
    elif not right["updates"]:
        states = left["states"]
    else:
        states = {
            name: _merge_leaves(leaf, right["states"][name], left["updates"], right["updates"], left["metric"], name)
            for name, leaf in left["states"].items()
        }
    return MetricState(
        metric=left["metric"], updates=left["updates"] + right["updates"], states=states, children=merged
    )


def _check_same(left: MetricState, right: MetricState) -> None:
    if (
        left["metric"] != right["metric"]
        or left["states"].keys() != right["states"].keys()
        or left["children"].keys() != right["children"].keys()
    ):
        raise MisconfigurationException(
            f"Expected states of one metric, got {_signature(left)} and {_signature(right)}. Log the same metric, "
            "built with the same arguments, under the same name on every client."
        )


def _signature(state: MetricState) -> str:
    return f"{state['metric']}({', '.join([*state['states'], *state['children']])})"


def _merge_leaves(left: Leaf, right: Leaf, left_updates: int, right_updates: int, metric: str, name: str) -> Leaf:
    kind, a, b = left["reduce"], left["value"], right["value"]
    if isinstance(a, list) and isinstance(b, list) and kind == right["reduce"]:
        return Leaf(reduce=kind, value=a + b, dtype=left["dtype"])
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or kind != right["reduce"] or not _fit(a, b):
        raise MisconfigurationException(
            f"Expected one shape and reduction of {metric}.{name} on every client, got {_shape(left)} and "
            f"{_shape(right)}. Build the metric with the same arguments (num_classes, thresholds) on every client."
        )
    if kind == "sum":
        value = a + b
    elif kind == "mean":
        value = (a * left_updates + b * right_updates) / (left_updates + right_updates)
    else:
        value = torch.maximum(a, b) if kind == "max" else torch.minimum(a, b)
    dtype = torch.promote_types(getattr(torch, left["dtype"]), getattr(torch, right["dtype"]))
    return Leaf(reduce=kind, value=value, dtype=str(dtype).removeprefix("torch."))


def _fit(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape or not a.ndim or not b.ndim  # a scalar is a default that nothing changed


def _shape(leaf: Leaf) -> str:
    value = leaf["value"]
    return f"{leaf['reduce']} of {tuple(value.shape) if isinstance(value, Tensor) else f'{len(value)} tensors'}"
