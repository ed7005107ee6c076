"""What a client hands over for one logged name: a part, which merges with the same name's part of another client."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from fl_lightning.metrics.merging import merge_states
from fl_lightning.metrics.states import MetricState

__all__ = [
    "LeftOut",
    "Max",
    "Mean",
    "Min",
    "Part",
    "TorchmetricPart",
    "Total",
    "merge_parts",
    "part_from_tree",
    "part_to_tree",
]


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean ``total / weight`` with ``total = sum(weight * value)``."""

    total: float
    weight: float


@dataclass(frozen=True, slots=True)
class Total:
    """A sum over clients (``reduce_fx="sum"``)."""

    value: float


@dataclass(frozen=True, slots=True)
class Min:
    """The smallest over clients (``reduce_fx="min"``); NaN if one is NaN."""

    value: float


@dataclass(frozen=True, slots=True)
class Max:
    """The largest over clients (``reduce_fx="max"``); NaN if one is NaN."""

    value: float


@dataclass(frozen=True, slots=True, eq=False)
class TorchmetricPart:
    """The state of a logged torchmetrics object.

    Args:
        attribute: where the metric is on the module, ``"val_metrics.f1"`` for example.
        state: from :func:`~fl_lightning.metrics.metric_state`.
    """

    attribute: str
    state: MetricState


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A name that has no federated value, and why; it absorbs what other clients have."""

    reason: str


Part: TypeAlias = Mean | Total | Min | Max | TorchmetricPart | LeftOut
_Extreme = TypeVar("_Extreme", Min, Max)
_KINDS: dict[str, type[Part]] = {
    "mean": Mean, "total": Total, "min": Min, "max": Max, "metric": TorchmetricPart, "left_out": LeftOut
}  # fmt: skip
_REDUCTIONS = ("sum", "mean", "max", "min", "list", "stack")


def merge_parts(left: Part, right: Part) -> Part | None:
    """Return both parts as one, or ``None`` when they do not go together.

    Example:
        >>> merge_parts(Mean(total=6.0, weight=2.0), Mean(total=1.0, weight=1.0))
        Mean(total=7.0, weight=3.0)
    """
    if type(left) is Mean and type(right) is Mean:  # first, because almost all are
        return Mean(left.total + right.total, left.weight + right.weight)
    if isinstance(left, LeftOut) or isinstance(right, LeftOut):
        return left if isinstance(left, LeftOut) else right
    if isinstance(left, TorchmetricPart) and isinstance(right, TorchmetricPart):
        if left.attribute != right.attribute:
            return None
        return TorchmetricPart(left.attribute, merge_states(left.state, right.state))
    if isinstance(left, Total) and isinstance(right, Total):
        return Total(left.value + right.value)
    if isinstance(left, Min) and isinstance(right, Min):
        return _extreme(left, right, smallest=True)
    if isinstance(left, Max) and isinstance(right, Max):
        return _extreme(left, right, smallest=False)
    return None


def part_to_tree(part: Part) -> dict[str, Any]:
    """Return a part as tensors and primitives."""
    kind = next(name for name, known in _KINDS.items() if type(part) is known)
    if isinstance(part, TorchmetricPart):
        return {"kind": kind, "attribute": part.attribute, "state": part.state}
    return {"kind": kind, **asdict(part)}


def part_from_tree(tree: Any, place: str) -> Part:
    """Undo :func:`part_to_tree`.

    Raises:
        ValueError: when ``tree`` is not what :func:`part_to_tree` gives; ``place`` is named.
    """
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or kind not in _KINDS:
        raise _malformed(place, f"a part of kind {', '.join(_KINDS)}", tree)
    arguments = {name: value for name, value in tree.items() if name != "kind"}
    if kind == "metric":
        _check_state(arguments.get("state"), place)
    elif kind != "left_out" and not all(isinstance(value, int | float) for value in arguments.values()):
        raise _malformed(place, "numbers", arguments)
    try:
        return _KINDS[kind](**arguments)
    except TypeError:
        raise _malformed(place, f"the fields of {_KINDS[kind].__name__}", sorted(arguments)) from None


def _extreme(left: _Extreme, right: _Extreme, smallest: bool) -> _Extreme:
    if math.isnan(left.value) or math.isnan(right.value):
        return left if math.isnan(left.value) else right  # Python's min and max would depend on the order
    return left if (left.value <= right.value) == smallest else right


def _check_state(state: Any, place: str) -> None:
    if not isinstance(state, dict) or state.keys() != MetricState.__annotations__.keys():
        raise _malformed(place, f"a metric state with {', '.join(MetricState.__annotations__)}", state)
    if not isinstance(state["updates"], int) or state["updates"] < 0:
        raise _malformed(place, "a count of updates", state["updates"])
    for name, leaf in state["states"].items():
        value = leaf.get("value") if isinstance(leaf, dict) else None
        tensors = value if isinstance(value, list) else [value]
        if (
            not all(isinstance(tensor, Tensor) for tensor in tensors)
            or leaf.get("reduce") not in _REDUCTIONS
            or not (leaf["reduce"] == "list" or isinstance(getattr(torch, str(leaf.get("dtype")), None), torch.dtype))
        ):
            raise _malformed(f"{place}.{name}", "tensors with a reduction", leaf)
    for name, child in state["children"].items():
        _check_state(child, f"{place}.{name}")


def _malformed(place: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"Expected {expected} at {place}, got {got!r:.200}. Send what MetricSums.to_tree() gives.")
