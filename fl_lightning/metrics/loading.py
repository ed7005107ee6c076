"""A merged state back in a metric, so that ``compute()`` gives the value over all clients."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import NormalizedRootMeanSquaredError
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.wrappers import MetricTracker, MinMaxMetric

from fl_lightning.metrics.moments import pooled_moments
from fl_lightning.metrics.states import AnyMetric, Leaf, MetricState, children, start_of_sum

__all__ = ["load_metric_state"]

M = TypeVar("M", bound=AnyMetric)


def load_metric_state(metric: M, state: MetricState) -> M:
    """Return a copy of ``metric`` that holds ``state``; ``metric`` itself stays as it is.

    The copy's ``compute()`` does not synchronise over processes: the state is already that of all clients. A
    ``MinMaxMetric`` forgets its extremes, which are of earlier values of one client.

    Args:
        metric: a metric built as the clients' ones were; its own state does not matter.
        state: from :func:`~fl_lightning.metrics.metric_state` or :func:`~fl_lightning.metrics.merge_states`.

    Raises:
        MisconfigurationException: when the state is of another metric.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> from fl_lightning.metrics import merge_states, metric_state
        >>> a, b = MeanMetric(), MeanMetric()
        >>> a.update([1.0, 3.0]), b.update(8.0)
        (None, None)
        >>> load_metric_state(MeanMetric(), merge_states(metric_state(a), metric_state(b))).compute().item()
        4.0
    """
    loaded = deepcopy(metric, _without_graphs(metric))
    _reset(loaded)
    _fill(loaded, state)
    return loaded


def _without_graphs(metric: AnyMetric) -> dict[int, Tensor]:
    """Return a memo for ``deepcopy``, which refuses tensors that a batch value in training left with a graph."""
    memo: dict[int, Tensor] = {}
    for part in metric.modules():
        for value in vars(part).values() if isinstance(part, Metric) else ():
            candidates = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for tensor in candidates:
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach()
    return memo


def _reset(metric: AnyMetric) -> None:
    if not isinstance(metric, MetricTracker):  # it would reset its last step, which it may not have
        metric.reset()
    for _, child in children(metric):  # some wrappers reset themselves only
        _reset(child)


def _fill(metric: AnyMetric, state: MetricState) -> None:
    if isinstance(metric, MetricTracker):
        for _ in range(metric.n_steps, sum(name.isdigit() for name in state["children"])):
            metric.increment()
    inside = dict(children(metric))
    own = metric._defaults.keys() if isinstance(metric, Metric) and state["states"] else set()
    if (
        type(metric).__name__ != state["metric"]
        or own != state["states"].keys()
        or inside.keys() != state["children"].keys()
    ):
        raise MisconfigurationException(
            f"Expected a state of {type(metric).__name__} with {sorted([*own, *inside])}, got one of {state['metric']} "
            f"with {sorted([*state['states'], *state['children']])}. Compute with the module that the clients trained."
        )
    if isinstance(metric, Metric):
        _fill_own(metric, state)
    for name, child in inside.items():
        _fill(child, state["children"][name])


def _fill_own(metric: Metric, state: MetricState) -> None:
    metric.sync_on_compute = metric._to_sync = False
    metric._computed = None
    if isinstance(metric, MinMaxMetric):
        metric.min_val, metric.max_val = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    if state["updates"]:
        for name, leaf in state["states"].items():
            setattr(metric, name, _value(metric, name, leaf))
        if isinstance(metric, NormalizedRootMeanSquaredError) and len(state["states"]["total"]["value"]) > 1:
            stacks = {
                name: getattr(metric, name) for name, leaf in state["states"].items() if leaf["reduce"] == "stack"
            }
            for name, pooled in pooled_moments(stacks).items():
                setattr(metric, name, pooled)
        metric._update_count = state["updates"]


def _value(metric: Metric, name: str, leaf: Leaf) -> Tensor | list[Tensor]:
    value, default = leaf["value"], metric._defaults[name]
    if isinstance(value, list):
        tensors = [tensor.to(metric.device, copy=True) for tensor in value]
        reduction: Any = metric._reductions[name]  # torchmetrics allows strings in the annotation, and resolves them
        return tensors if leaf["reduce"] == "list" else _reduced(reduction, tensors)
    if leaf["reduce"] == "sum" and isinstance(default, Tensor):
        start = start_of_sum(default)
        value = value + start if bool(start.any()) else value
    return value.to(dtype=getattr(torch, leaf["dtype"]), copy=True).to(metric.device)


def _reduced(reduction: Callable[[Any], Tensor] | None, tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]  # one client is not synchronised: the metric's own form
    if reduction is dim_zero_cat:
        return reduction(tensors)
    stacked = torch.stack(tensors)  # (clients, *state.shape)
    return stacked if reduction is None else reduction(stacked)
