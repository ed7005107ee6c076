"""The state of a torchmetrics metric as plain data, and how two such states become one.

``torchmetrics.Metric.merge_state`` refuses metrics with the default ``full_state_update`` and weighs means wrongly, and
a wrapper's state is in its children. Here a state is read from what the metric declared with ``add_state``:

=================  ==============================  ==========================================================
declared           travels as                      merges by
=================  ==============================  ==========================================================
``"sum"``          increase over the default       addition, floats in double precision
``"mean"``         the mean                        mean weighted by update counts: exact for a mean over updates
``"max", "min"``   the tensor                      elementwise maximum, minimum
a list             its tensors (examples!)         concatenation; ``has_cat_states`` says whether a metric has any
``None``, custom   one tensor for each client      collecting; reduced when loaded, as torchmetrics' sync does
=================  ==============================  ==========================================================

A metric that was never updated is neutral. State that a metric keeps without ``add_state`` is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, TypedDict

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum
from torchmetrics.wrappers import ClasswiseWrapper, MetricTracker, Running

__all__ = [
    "AnyMetric",
    "Leaf",
    "MetricState",
    "children",
    "has_cat_states",
    "holds_examples",
    "metric_state",
    "num_updates",
    "start_of_sum",
    "state_num_bytes",
]

AnyMetric: TypeAlias = Metric | MetricCollection | MetricTracker

_REDUCTIONS: dict[Any, str] = {dim_zero_sum: "sum", dim_zero_mean: "mean", dim_zero_max: "max", dim_zero_min: "min"}


class Leaf(TypedDict):
    """One declared state. ``reduce`` is ``"sum"``, ``"mean"``, ``"max"``, ``"min"``, ``"list"`` or ``"stack"``."""

    reduce: str
    value: Tensor | list[Tensor]
    dtype: str  # what the metric holds; sums and means travel in double precision


class MetricState(TypedDict):
    """The state of a metric and of the metrics inside it: tensors and primitives only."""

    metric: str
    updates: int
    states: dict[str, Leaf]
    children: dict[str, MetricState]


def metric_state(metric: AnyMetric) -> MetricState:
    """Return the metric's state as plain nested data on the CPU; the metric may go on and be reset.

    Args:
        metric: a metric, a wrapper, a collection or a tracker that is not synchronised over processes.

    Raises:
        MisconfigurationException: when states of this metric cannot be merged over clients.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> metric = MeanMetric()
        >>> metric.update([1.0, 3.0])
        >>> state = metric_state(metric)
        >>> state["updates"], state["states"]["mean_value"]["value"].item()
        (1, 4.0)
    """
    _refuse_unmergeable(metric)
    states: dict[str, Leaf] = {}
    updates = 0
    # a ClasswiseWrapper mirrors the declarations of the metric inside it, and always counts one update
    if isinstance(metric, Metric) and not isinstance(metric, ClasswiseWrapper):
        updates = int(metric._update_count)
        states = {name: _leaf(metric, name) for name in metric._defaults}
    return MetricState(
        metric=type(metric).__name__,
        updates=updates,
        states=states,
        children={name: metric_state(child) for name, child in children(metric)},
    )


def has_cat_states(metric: AnyMetric) -> bool:
    """Return whether the metric, or one inside it, keeps a list: its state then holds examples and grows with them.

    Such a state tells scores and labels of single examples. Binned variants (``thresholds=100``) keep sums instead.

    Example:
        >>> from torchmetrics.classification import BinaryAUROC
        >>> has_cat_states(BinaryAUROC()), has_cat_states(BinaryAUROC(thresholds=100))
        (True, False)
    """
    own = isinstance(metric, Metric) and any(
        isinstance(default, list) or metric._reductions[name] is dim_zero_cat
        for name, default in metric._defaults.items()
    )
    return own or any(has_cat_states(child) for _, child in children(metric))


def holds_examples(state: MetricState) -> bool:
    """Return whether a state carries list states, as :func:`has_cat_states` says of a metric."""
    return any(leaf["reduce"] == "list" for leaf in _leaves(state))


def state_num_bytes(state: MetricState) -> int:
    """Return the bytes of a state's tensors."""
    tensors: list[Tensor] = []
    for leaf in _leaves(state):
        tensors += leaf["value"] if isinstance(leaf["value"], list) else [leaf["value"]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def num_updates(state: MetricState) -> int:
    """Return the largest update count in a state: 0 means that nobody updated the metric."""
    return max([state["updates"], *(num_updates(child) for child in state["children"].values())])


def children(module: nn.Module) -> Iterator[tuple[str, AnyMetric]]:
    """Yield the metrics directly inside a metric, with their paths, also those in plain lists and dictionaries."""
    candidates: list[tuple[str, Any]] = [*module._modules.items()]
    for name, value in vars(module).items():
        if isinstance(value, list | tuple):
            candidates += [(f"{name}.{index}", item) for index, item in enumerate(value) if isinstance(item, Metric)]
        elif isinstance(value, dict) and name != "_modules":
            candidates += [(f"{name}.{key}", item) for key, item in value.items() if isinstance(item, Metric)]
    for name, child in candidates:
        if isinstance(child, Metric | MetricCollection | MetricTracker):
            yield name, child
        elif isinstance(child, nn.Module):
            yield from ((f"{name}.{inner}", metric) for inner, metric in children(child))


def _refuse_unmergeable(metric: AnyMetric) -> None:
    name = type(metric).__name__
    if isinstance(metric, Running):
        raise MisconfigurationException(
            f"Expected a metric whose states merge over clients, got {name}: a window over the last updates needs an "
            f"order of updates, which clients do not have. Log the metric inside it "
            f"({type(metric.base_metric).__name__}) instead."
        )
    if isinstance(metric, Metric) and metric._is_synced:
        raise MisconfigurationException(
            f"Expected a client's own {name}, got one that is synchronised over processes. Call unsync() first, or "
            "train clients inside fl_lightning.metrics.alone()."
        )


def _leaf(metric: Metric, name: str) -> Leaf:
    value, default, reduction = getattr(metric, name), metric._defaults[name], metric._reductions[name]
    if isinstance(default, list):
        return Leaf(reduce="list", value=_list(metric, name, value), dtype="")
    tensor = value.detach().cpu()
    kind = _REDUCTIONS.get(reduction, "stack")
    if kind == "sum":
        start = start_of_sum(default)
        tensor = tensor - start if bool(start.any()) else tensor
    dtype = value.dtype
    if kind == "mean" and not dtype.is_floating_point:
        dtype = torch.float32
    if kind == "mean" or (kind == "sum" and dtype.is_floating_point):
        tensor = tensor.double()
    if tensor.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
        tensor = tensor.clone()  # metrics add in place
    return Leaf(reduce=kind, value=[tensor] if kind == "stack" else tensor, dtype=str(dtype).removeprefix("torch."))


def start_of_sum(default: Tensor) -> Tensor:
    """Return where a sum starts. It is taken off a client's sum and added once for all of them."""
    default = default.detach().cpu()
    return default if bool(torch.isfinite(default).all()) else torch.zeros_like(default)


def _list(metric: Metric, name: str, value: Any) -> list[Tensor]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    for item in items:
        if not isinstance(item, Tensor):
            raise MisconfigurationException(
                f"Expected tensors in the list state {type(metric).__name__}.{name}, got {type(item).__name__}: only "
                "tensors travel between server and client. Use a variant of the metric that keeps tensors "
                "(MeanAveragePrecision(iou_type='bbox') instead of 'segm', for example)."
            )
    tensors = [item.detach().cpu() for item in items]
    if metric._reductions[name] is dim_zero_cat and len({(t.dtype, t.shape[1:]) for t in tensors}) == 1:
        return [dim_zero_cat(tensors).clone()]  # what torchmetrics sends between processes: one tensor, not one a batch
    return [tensor.clone() for tensor in tensors]


def _leaves(state: MetricState) -> Iterator[Leaf]:
    yield from state["states"].values()
    for child in state["children"].values():
        yield from _leaves(child)
