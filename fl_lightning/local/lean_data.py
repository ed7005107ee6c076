"""Batches of a client: tensor data sets a whole batch at a time, every other data set through its DataLoader.

Both draw from the global generators exactly what Lightning's loop would draw through the loader, at the same moments,
so that the order of the examples and every number drawn afterwards are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from lightning.fabric.utilities.data import _auto_add_worker_init_fn, _set_sampler_epoch
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fl_lightning.data.samplers import ClientSubset
from fl_lightning.local.lean_trainer import NotThisClient

__all__ = ["Batches", "LoaderBatches", "TensorBatches", "batches_of"]

_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


class Batches(Protocol):
    """The batches of one client, an epoch at a time."""

    num_batches: int
    """Batches of an epoch, with ``limit_train_batches``."""

    def begin(self, epoch: int) -> Iterator[Any]:
        """Start an epoch, drawing what ``iter(loader)`` draws."""

    def end(self, iterator: Iterator[Any]) -> None:
        """An epoch is over, whether its iterator knows it or not."""


def batches_of(loader: Any, limit: int | float) -> Batches:
    """Return the batches of a client's loader.

    Args:
        loader: a ``DataLoader`` with a length.
        limit: ``limit_train_batches``: a count, or a fraction.

    Raises:
        NotThisClient: for what only Lightning can iterate (collections of loaders, loaders without a length).

    Example:
        >>> loader = DataLoader(TensorDataset(torch.arange(5.0)), batch_size=2)
        >>> [batch[0].tolist() for batch in batches_of(loader, 1.0).begin(0)]
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """
    if not isinstance(loader, DataLoader):
        raise NotThisClient(f"its train loader is a {type(loader).__name__}, not one DataLoader")
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        raise NotThisClient("its train loader has no length") from None
    num_batches = int(_parse_num_batches(RunningStage.TRAINING, length, limit))
    source = _tensors(loader)
    if source is None:
        return LoaderBatches(loader, num_batches)
    return TensorBatches(loader, *source, num_batches)


class LoaderBatches:
    """Batches as the loader makes them."""

    def __init__(self, loader: DataLoader[Any], num_batches: int) -> None:
        self.loader = loader
        self.num_batches = num_batches
        _auto_add_worker_init_fn(loader, 0)  # seeds NumPy and random in workers after seed_everything(workers=True)

    def begin(self, epoch: int) -> Iterator[Any]:
        if epoch:
            _set_sampler_epoch(self.loader, epoch)
            return iter(self.loader)
        iterator = iter(self.loader)  # in the first epoch Lightning calls set_epoch after iter
        _set_sampler_epoch(self.loader, 0)
        return iterator

    def end(self, iterator: Iterator[Any]) -> None:
        # the last batch is taken and nothing asks for one more, so that workers would live until garbage is collected
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None and not self.loader.persistent_workers:
            shut_down()


class TensorBatches:
    """Batches indexed from the tensors of a ``TensorDataset``.

    Args:
        loader: gives the sampler, the batch size and ``drop_last``.
        tensors: of the data set.
        indices: the client's examples in them; ``None`` for all.
        num_batches: of an epoch.
    """

    def __init__(
        self, loader: DataLoader[Any], tensors: tuple[Tensor, ...], indices: Tensor | None, num_batches: int
    ) -> None:
        self.tensors = tensors
        self.indices = indices
        self.num_batches = num_batches
        self.batch_size: int = loader.batch_size  # type: ignore[assignment]  # checked by _tensors
        self.sampler = loader.sampler
        self._drop_last = loader.drop_last
        self._sizes: list[int] | None = None
        self._eager = loader.num_workers > 0  # workers are given their first batches when the epoch starts

    def begin(self, epoch: int) -> Iterator[list[Tensor]]:
        self.skip_seed()
        return self._batches(self.positions() if self._eager else None)

    def end(self, iterator: Iterator[list[Tensor]]) -> None:
        """Nothing is open."""

    @staticmethod
    def skip_seed() -> None:
        """Draw what a ``DataLoader`` draws as the seed of its workers, whether it has any or not."""
        torch.empty((), dtype=torch.int64).random_()

    def positions(self) -> Tensor:
        """Return the epoch's examples in the order of the sampler, as positions in ``tensors``."""
        order = self.order()
        return order if self.indices is None else self.indices.index_select(0, order)

    def own(self) -> list[Tensor]:
        """Return the client's examples."""
        return [t if self.indices is None else t.index_select(0, self.indices) for t in self.tensors]

    def order(self) -> Tensor:
        """Return the epoch's examples in the order of the sampler, as positions in the client's data."""
        sampler = self.sampler
        if type(sampler) is SequentialSampler:
            return torch.arange(len(sampler))
        if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
            seed = int(torch.empty((), dtype=torch.int64).random_().item())
            return torch.randperm(len(sampler), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(list(sampler), dtype=torch.int64)

    def sizes(self) -> list[int]:
        """Return the sizes of an epoch's batches."""
        if self._sizes is None:
            full, rest = divmod(len(self.sampler), self.batch_size)  # type: ignore[arg-type]
            sizes = [self.batch_size] * full + ([rest] if rest and not self._drop_last else [])
            self._sizes = sizes[: self.num_batches]
        return self._sizes

    def _batches(self, order: Tensor | None) -> Iterator[list[Tensor]]:
        if order is None:
            order = self.positions()
        for chunk in torch.split(order, self.batch_size):
            if self._drop_last and len(chunk) < self.batch_size:
                return
            # a new tensor for each batch and no view: kernels may take other paths on memory that starts elsewhere
            yield [tensor.index_select(0, chunk) for tensor in self.tensors]


def _tensors(loader: DataLoader[Any]) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Return the tensors behind a loader and the examples it uses, or ``None`` when it does more than index them."""
    plain = (
        type(loader) is DataLoader
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in _SAMPLERS
        and loader.batch_sampler.sampler is loader.sampler
        and loader.batch_size is not None
        and loader.collate_fn is default_collate
        and loader.generator is None
        and getattr(loader.sampler, "generator", None) is None
        and not loader.pin_memory
        and not loader.persistent_workers
        and loader.worker_init_fn is None
    )
    if not plain:
        return None
    dataset: Any = loader.dataset
    nest: list[Any] = []
    while type(dataset) in (Subset, ClientSubset):
        nest.append(dataset.indices)
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    if not all(tensor.is_contiguous() and not tensor.requires_grad for tensor in dataset.tensors):
        return None
    indices: Tensor | None = None
    for inner in reversed(nest):  # from the whole data set to the client's part
        step = torch.as_tensor(inner, dtype=torch.int64)
        indices = step if indices is None else indices.index_select(0, step)
    return dataset.tensors, indices
