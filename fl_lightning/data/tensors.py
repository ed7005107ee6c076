"""What the bundled data sets share: examples as tensors, pooled or at their natural clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from fl_lightning.errors import MisconfigurationException
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId

__all__ = ["NaturalTensors", "PooledTensors", "Split", "split_randomly"]


@dataclass(frozen=True)
class Split:
    """Training, validation and test examples; a part may be empty.

    Args:
        train: inputs and labels to train on.
        val: inputs and labels to choose by.
        test: inputs and labels to report.
    """

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


def split_randomly(
    inputs: Tensor, labels: Tensor, val_fraction: float, test_fraction: float, seed: int, purpose: str
) -> Split:
    """Cut examples at random.

    Args:
        inputs: ``(examples, ...)``.
        labels: ``(examples,)``.
        val_fraction: part for validation, in ``[0, 1)``, rounded to whole examples.
        test_fraction: part for testing, in ``[0, 1)``; with ``val_fraction`` below 1.
        seed: root of the split.
        purpose: address of the random numbers.

    Raises:
        MisconfigurationException: for fractions out of range.

    Example:
        >>> split = split_randomly(torch.zeros(10, 2), torch.zeros(10), 0.1, 0.2, seed=0, purpose="example")
        >>> len(split.train), len(split.val), len(split.test)
        (7, 1, 2)
    """
    check_fractions(val_fraction, test_fraction)
    order = torch.from_numpy(np.random.default_rng(seed_for(seed, -1, None, purpose)).permutation(len(labels)))
    num_val, num_test = round(val_fraction * len(labels)), round(test_fraction * len(labels))
    val, test, train = order[:num_val], order[num_val : num_val + num_test], order[num_val + num_test :]
    return Split(*(TensorDataset(inputs[part], labels[part]) for part in (train, val, test)))


def check_fractions(val_fraction: float, test_fraction: float = 0.0) -> None:
    """Raise unless both are in ``[0, 1)`` and leave something to train on.

    Raises:
        MisconfigurationException: names what was given.
    """
    if val_fraction < 0 or test_fraction < 0 or not val_fraction + test_fraction < 1:
        raise MisconfigurationException(
            "Expected val_fraction and test_fraction of at least 0 that sum to less than 1, got "
            f"{val_fraction!r} and {test_fraction!r}. Use for example val_fraction=0.1, test_fraction=0.2."
        )


class PooledTensors(LightningDataModule, ABC):
    """A data set in one place, to be cut by a partitioner. A subclass defines :meth:`load`.

    Args:
        batch_size: examples in a batch.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._split: Split | None = None

    @abstractmethod
    def load(self) -> Split:
        """Read the examples."""

    def setup(self, stage: str | None = None) -> None:
        if self._split is None:
            self._split = self.load()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._parts.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._in_order(self._parts.val)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._in_order(self._parts.test)

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.test_dataloader()

    @property
    def _parts(self) -> Split:
        self.setup()
        assert self._split is not None  # `setup` loaded it
        return self._split

    def _in_order(self, data: TensorDataset) -> DataLoader[Any] | list[Any]:
        # an empty list is Lightning's way of saying that there is nothing to validate on
        return DataLoader(data, batch_size=max(self.batch_size, 256)) if len(data) else []


class NaturalTensors(LightningDataModule, ABC):
    """A data set whose clients are given by nature: pass it to the trainer as it is. A subclass defines :meth:`load`.

    In a plain ``lightning.Trainer`` it is the pooled data.

    Args:
        batch_size: examples in a batch of a client.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._clients: dict[ClientId, Split] | None = None

    @abstractmethod
    def load(self) -> Mapping[ClientId, Split]:
        """Read the examples of every client."""

    def setup(self, stage: str | None = None) -> None:
        if self._clients is None:
            self._clients = dict(self.load())

    def client_ids(self) -> list[ClientId]:
        """Return the names of the clients."""
        return list(self._splits)

    def client_size(self, client_id: ClientId) -> int:
        """Return the number of the client's training examples."""
        return len(self._of(client_id).train)

    def client_dataloader(self, client_id: ClientId, batch_size: int | None = None) -> DataLoader[Any]:
        """Return the client's training examples, shuffled.

        Args:
            client_id: one of ``client_ids()``.
            batch_size: replaces the batch size.
        """
        return DataLoader(self._of(client_id).train, batch_size=batch_size or self.batch_size, shuffle=True)

    def client_eval_dataloader(self, client_id: ClientId) -> DataLoader[Any] | None:
        """Return the client's part of the validation data, or ``None``."""
        return self._in_order(self._of(client_id).val)

    def client_test_dataloader(self, client_id: ClientId) -> DataLoader[Any] | None:
        """Return the client's test data, or ``None``."""
        return self._in_order(self._of(client_id).test)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._pooled("train"), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._in_order(self._pooled("val")) or []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._in_order(self._pooled("test")) or []

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.test_dataloader()

    @property
    def _splits(self) -> dict[ClientId, Split]:
        self.setup()
        assert self._clients is not None  # `setup` loaded them
        return self._clients

    def _of(self, client_id: ClientId) -> Split:
        if client_id not in self._splits:
            some = ", ".join(map(repr, list(self._splits)[:4]))
            raise MisconfigurationException(
                f"Expected the id of one of {len(self._splits)} clients ({some}, …), got {client_id!r}. "
                "Take ids from client_ids()."
            )
        return self._splits[client_id]

    def _pooled(self, part: str) -> Dataset[Any]:
        return ConcatDataset([getattr(split, part) for split in self._splits.values()])

    def _in_order(self, data: Any) -> DataLoader[Any] | None:
        return DataLoader(data, batch_size=max(self.batch_size, 256)) if len(data) else None
