"""Clients that the data themselves name: a hospital, a writer, a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_lightning.data.partition import Partition
from fl_lightning.data.partitioners.base import Partitioner
from fl_lightning.data.targets import num_examples, read_samples, stored_column
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["Natural"]


class Natural(Partitioner):
    """One client for each value of ``key``, in ascending order of the ids (integers before strings).

    Args:
        key: the name of a column or attribute of the data set that is as long as the data set (``Subset`` and
            ``ConcatDataset`` are looked through), else of a key or attribute of each sample; or a callable from a
            sample to the client's id. Ids are strings or integers.
        seed: kept for the same signature everywhere; nothing is drawn.
        target_fn: sample to label; only used to picture the partition.
        min_size: clients with fewer examples are left out (1 keeps everyone).

    Raises:
        MisconfigurationException: for a key that is not found, ids of another type, or no client of ``min_size``.

    Example:
        >>> visits = [{"x": 0.1, "site": "b"}, {"x": 0.2, "site": "a"}, {"x": 0.3, "site": "b"}]
        >>> {site: indices.tolist() for site, indices in Natural("site").split(visits).items()}
        {'a': [1], 'b': [0, 2]}
    """

    def __init__(
        self,
        key: str | Callable[[Any], ClientId],
        seed: int = 0,
        target_fn: Callable[[Any], Any] | None = None,
        min_size: int = 1,
    ) -> None:
        super().__init__(num_clients=1, seed=seed, target_fn=target_fn, min_size=min_size)
        del self.num_clients  # the data decide
        if not (isinstance(key, str) or callable(key)):
            raise MisconfigurationException(
                f"Natural expected key to be a name or a callable from a sample to an id, got {type(key).__name__}."
            )
        self.key = key

    @property
    def client_ids(self) -> None:
        return None

    def owners(self, num_examples: int, targets: NDArray[Any] | None, repair: bool) -> NDArray[np.int64]:
        raise NotImplementedError("Natural reads its clients from the data set: call split(dataset).")

    def split(self, dataset: Any, allow_empty: bool = False, targets: NDArray[Any] | None = None) -> Partition:
        num_examples(dataset)  # raises for what cannot be indexed
        ids = [_as_id(value) for value in self._keys(dataset)]
        sizes: dict[ClientId, int] = {}
        for client_id in ids:
            sizes[client_id] = sizes.get(client_id, 0) + 1
        kept = [client_id for client_id, size in sizes.items() if allow_empty or size >= self.min_size]
        if not kept and not allow_empty:
            raise MisconfigurationException(
                f"{self} found no client with min_size={self.min_size} examples; the largest of {len(sizes)} has "
                f"{max(sizes.values(), default=0)}. Use a smaller min_size, or more data."
            )
        kept.sort(key=lambda client_id: (isinstance(client_id, str), client_id))
        positions = {client_id: position for position, client_id in enumerate(kept)}
        return Partition(kept, np.array([positions.get(client_id, -1) for client_id in ids], dtype=np.int64))

    def _keys(self, dataset: Any) -> list[Any]:
        if not isinstance(self.key, str):
            return read_samples(dataset, self.key)
        stored = stored_column(dataset, [self.key])
        if stored is not None:
            return list(stored.tolist() if isinstance(stored, Tensor | np.ndarray) else stored)
        return read_samples(dataset, partial(_entry, key=self.key, dataset=dataset))


def _entry(sample: Any, key: str, dataset: Any) -> Any:
    if isinstance(sample, Mapping) and key in sample:
        return sample[key]
    if not isinstance(sample, Mapping) and hasattr(sample, key):
        return getattr(sample, key)
    raise MisconfigurationException(
        f"Natural(key={key!r}) found no such column or attribute in {type(dataset).__name__}, nor in its samples "
        f"(of type {type(sample).__name__}). Pass the name of one, or key=lambda sample: <id of the client>."
    )


def _as_id(value: Any) -> ClientId:
    if (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise MisconfigurationException(
            f"Natural expected ids that are strings or integers, got {value!r} of type {type(value).__name__}. "
            "Pass key=lambda sample: str(<id>)."
        )
    return value
