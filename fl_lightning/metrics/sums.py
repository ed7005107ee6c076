"""What a client's logged values are on the way to the server: sums and metric states, never floats of one client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from fl_lightning.metrics.loading import load_metric_state
from fl_lightning.metrics.parts import (
    LeftOut,
    Max,
    Mean,
    Min,
    Part,
    TorchmetricPart,
    Total,
    merge_parts,
    part_from_tree,
    part_to_tree,
)
from fl_lightning.metrics.states import holds_examples, num_updates

__all__ = ["Evaluation", "LeftOut", "Max", "Mean", "MetricSums", "Min", "Part", "TorchmetricPart", "Total"]


class Evaluation(NamedTuple):
    """Values by name, and for each name without a value the reason."""

    values: dict[str, float]
    left_out: dict[str, str]


class MetricSums(Mapping[str, Part]):
    """Mergeable parts by logged name, with the names of Lightning's ``trainer.callback_metrics``.

    ``merge`` is associative, has ``MetricSums()`` as its neutral element, and is commutative to rounding. A client that
    did not log a name does not count for it.

    Args:
        parts: part by name. Two names may share one part (``loss`` and ``loss_epoch``): it is sent and computed once.

    Example:
        >>> small = MetricSums({"loss": Mean(total=2.0, weight=1.0)})
        >>> large = MetricSums({"loss": Mean(total=0.0, weight=3.0)})
        >>> small.merge(large).compute()
        {'loss': 0.5}
    """

    def __init__(self, parts: Mapping[str, Part] | None = None) -> None:
        self._parts: dict[str, Part] = dict(parts or {})

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"MetricSums({self._parts!r})"

    def merge(self, other: MetricSums) -> MetricSums:
        """Return what both hold together.

        Raises:
            MisconfigurationException: when a name was logged in two ways that do not go together.
        """
        parts, done = dict(self._parts), dict[tuple[int, int], Part]()
        for name, right in other._parts.items():
            left = parts.get(name)
            if left is None:
                parts[name] = right
                continue
            pair = id(left), id(right)  # a part of two names stays one part
            if pair not in done:
                done[pair] = _merged(name, left, right)
            parts[name] = done[pair]
        return MetricSums(parts)

    def compute(self, module: nn.Module | None = None) -> dict[str, float]:
        """Return the federated values; :meth:`evaluate` also says which names have none, and why.

        Args:
            module: the module that the clients trained, or the server's; its metrics are copied, not changed.

        Raises:
            MisconfigurationException: when ``module`` lacks a metric that a client logged.
        """
        return self.evaluate(module).values

    def evaluate(self, module: nn.Module | None = None) -> Evaluation:
        """Return the federated values, and the reasons for names without one.

        A name is left out when no example or update is behind it, when its metric cannot be merged, and when the metric
        computes anything but one number (Lightning refuses to log those, too).
        """
        done: dict[int, float | str] = {}
        evaluation = Evaluation({}, {})
        for name, part in self._parts.items():
            if id(part) not in done:
                done[id(part)] = _value(part, module)
            outcome = done[id(part)]
            if isinstance(outcome, str):
                evaluation.left_out[name] = outcome
            else:
                evaluation.values[name] = outcome
        return evaluation

    def names_with_examples(self) -> list[str]:
        """Return the names whose metric states hold scores and labels of single examples (exact AUROC, say).

        They are for simulation: secure aggregation, differential privacy and real sites have to refuse them.
        """
        return [
            name
            for name, part in self._parts.items()
            if isinstance(part, TorchmetricPart) and holds_examples(part.state)
        ]

    def to_tree(self) -> dict[str, Any]:
        """Return nested dictionaries and lists of tensors and primitives, for the wire and for checkpoints."""
        unique = list({id(part): part for part in self._parts.values()}.values())
        position = {id(part): index for index, part in enumerate(unique)}
        return {
            "parts": [part_to_tree(part) for part in unique],
            "names": {name: position[id(part)] for name, part in self._parts.items()},
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> MetricSums:
        """Undo :meth:`to_tree`.

        Raises:
            ValueError: when ``tree`` is not what :meth:`to_tree` gives.
        """
        if not isinstance(tree, Mapping) or tree.keys() != {"parts", "names"}:
            raise ValueError(f"Expected a tree with 'parts' and 'names', got {tree!r:.200}. Send what to_tree() gives.")
        parts = [part_from_tree(part, f"part {index}") for index, part in enumerate(tree["parts"])]
        if not all(isinstance(index, int) and 0 <= index < len(parts) for index in tree["names"].values()):
            raise ValueError(
                f"Expected names of {len(parts)} parts, got {tree['names']!r:.200}. Send what to_tree() gives."
            )
        return cls({name: parts[index] for name, index in tree["names"].items()})


def _merged(name: str, left: Part, right: Part) -> Part:
    try:
        merged = merge_parts(left, right)
    except MisconfigurationException as error:
        raise MisconfigurationException(f"The metric logged as {name!r} cannot be merged: {error}") from error
    if merged is None:
        raise MisconfigurationException(
            f"Expected {name!r} to be logged in one way on every client, got {_way(left)} and {_way(right)}. Use the "
            "same reduce_fx, or the same torchmetrics object, on every client."
        )
    return merged


def _way(part: Part) -> str:
    return f"the metric {part.attribute!r}" if isinstance(part, TorchmetricPart) else type(part).__name__


def _value(part: Part, module: nn.Module | None) -> float | str:
    if isinstance(part, LeftOut):
        return part.reason
    if isinstance(part, Mean):
        return part.total / part.weight if part.weight else "no example is behind it"
    if not isinstance(part, TorchmetricPart):
        return part.value
    if not num_updates(part.state):
        return f"no client updated the metric {part.attribute!r}"
    with torch.no_grad():
        value = load_metric_state(_metric_at(module, part.attribute), part.state).compute()
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return f"{part.state['metric']} computes {shape}, not one number; log its parts under names of their own"


def _metric_at(module: nn.Module | None, attribute: str) -> Metric | MetricCollection:
    try:
        found = module.get_submodule(attribute) if module is not None else None
    except AttributeError:
        found = None
    if not isinstance(found, Metric | MetricCollection):
        raise MisconfigurationException(
            f"Expected a torchmetrics object at {attribute!r} of the module, where clients logged one, got "
            f"{type(found).__name__} on {type(module).__name__}. Pass the module that the clients trained, after its "
            "setup()."
        )
    return found
