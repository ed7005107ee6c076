"""The sampler of one client after the pattern of the sampler for everyone."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from numpy.typing import NDArray
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fl_lightning.errors import MisconfigurationException

__all__ = ["ClientSubset", "client_sampler", "rebuilt"]


class ClientSubset(Subset[Any]):
    """A view of a data set: holds the index array as it is and hands out Python integers.

    ``torch.utils.data.Subset`` would hand NumPy integers to data sets, and not all of them take those.

    Example:
        >>> subset = ClientSubset("abcdef", np.array([5, 0, 2]))
        >>> subset[0], len(subset), subset.__getitems__([1, 2])
        ('f', 3, ['a', 'c'])
    """

    indices: NDArray[np.int64]  # type: ignore[assignment]  # a sequence of integers, as Subset wants

    def __init__(self, dataset: Any, indices: NDArray[np.int64]) -> None:
        super().__init__(dataset, indices)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return self.__getitems__(index)
        return self.dataset[int(self.indices[index])]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        chosen: list[int] = self.indices[indices].tolist()
        fetch = getattr(self.dataset, "__getitems__", None)
        fetched: list[Any] = fetch(chosen) if callable(fetch) else [self.dataset[index] for index in chosen]
        return fetched


def client_sampler(sampler: Any, whole: Any, data: ClientSubset) -> Sampler[Any]:
    """Return the like of ``sampler`` over a client's examples.

    Args:
        sampler: the sampler for everyone, over ``whole``.
        whole: the data set for everyone.
        data: the client's part of it.

    Raises:
        MisconfigurationException: for a custom sampler that cannot be cut, or weights that are all zero.

    Example:
        >>> whole = range(10)
        >>> len(client_sampler(RandomSampler(whole, num_samples=5), whole, ClientSubset(whole, np.arange(4))))
        2
    """
    share = len(data) / max(len(whole), 1)
    if not len(data) or type(sampler) is SequentialSampler:
        return SequentialSampler(data)  # torch's RandomSampler refuses an empty data set
    if type(sampler) is RandomSampler:
        draws = None if sampler._num_samples is None else max(1, round(sampler._num_samples * share))
        return RandomSampler(data, sampler.replacement, draws)
    if type(sampler) is SubsetRandomSampler:
        return RandomSampler(data)
    if type(sampler) is DistributedSampler:
        return RandomSampler(data) if sampler.shuffle else SequentialSampler(data)
    if type(sampler) is WeightedRandomSampler:
        return _weighted(sampler, share, data)
    again: Sampler[Any] = rebuilt(sampler, whole, data, None)
    return again


def rebuilt(old: Any, whole: Any, data: ClientSubset, sampler: Sampler[Any] | None) -> Any:
    """Build a custom sampler or batch sampler again for one client.

    Its arguments are the ones that were recorded, or else its attributes of the same (or underscored) names. Of those
    the data set becomes ``data``, an argument ``sampler`` becomes ``sampler``, and what has one value for each example
    is cut to the client's examples.

    Raises:
        MisconfigurationException: for an argument that is not kept, or when nothing ties it to the data.
    """
    arguments: dict[str, Any] = {}
    tied = False
    for name, value in _arguments(old).items():
        if value is whole or (value is _MISSING and name in ("data_source", "dataset")):
            arguments[name], tied = data, True
        elif name == "sampler" and sampler is not None:
            arguments[name], tied = sampler, True
        elif value is _MISSING:
            raise MisconfigurationException(f"{type(old).__name__} does not keep its argument {name!r} as self.{name}.")
        elif isinstance(value, torch.Tensor | np.ndarray | list | tuple) and sized_len(value) == len(whole):
            arguments[name], tied = _taken(value, data.indices), True
        elif name != "generator":  # see ClientLoaders: a generator is not shared among clients
            arguments[name] = value
    if not tied:
        raise MisconfigurationException(
            f"{type(old).__name__} has no argument that is the data set, a sampler or one value for each example, so "
            "it cannot be cut to one client."
        )
    return type(old)(**arguments)


_MISSING = object()


def _arguments(old: Any) -> dict[str, Any]:
    if hasattr(old, "__pl_saved_args"):  # Lightning's record of how it was built
        named = dict(zip(getattr(old, "__pl_saved_arg_names"), getattr(old, "__pl_saved_args"), strict=False))
        return {**getattr(old, "__pl_saved_default_kwargs"), **getattr(old, "__pl_saved_kwargs"), **named}
    found = {}
    for name, parameter in list(inspect.signature(type(old).__init__).parameters.items())[1:]:
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            default = _MISSING if parameter.default is parameter.empty else parameter.default
            found[name] = getattr(old, name, getattr(old, f"_{name}", default))
    return found


def _weighted(sampler: WeightedRandomSampler, share: float, data: ClientSubset) -> WeightedRandomSampler:
    weights = _taken(torch.as_tensor(sampler.weights), data.indices)
    positive = int((weights > 0).sum())
    if not positive:
        raise MisconfigurationException(
            "all examples of the client have weight 0 in the WeightedRandomSampler, so none can be drawn. "
            "Give every example a positive weight, or leave those examples out of the data set."
        )
    draws = max(1, round(sampler.num_samples * share))
    return WeightedRandomSampler(weights, draws if sampler.replacement else min(draws, positive), sampler.replacement)


def _taken(values: Any, indices: NDArray[np.int64]) -> Any:
    if isinstance(values, torch.Tensor):
        return values[torch.tensor(indices)]
    if isinstance(values, np.ndarray):
        return values[indices]
    return type(values)(values[index] for index in indices.tolist())
