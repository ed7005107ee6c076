"""Labels are found by convention, in every nest of data sets."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fl_lightning.data.targets import find_targets

LABELS = [2, 0, 1, 2]


class Stored(Dataset[Any]):
    """Keeps labels in an attribute; reading a sample fails, so only the attribute can have been used."""

    def __init__(self, name: str, values: Any) -> None:
        setattr(self, name, values)

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a stored column makes reading samples unnecessary")


class Sampled(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        torch.rand(1)  # an augmentation
        return self.samples[index]


@dataclass
class Graph:
    x: torch.Tensor
    y: torch.Tensor


Pair = namedtuple("Pair", ["image", "label"])


@pytest.mark.parametrize("name", ["targets", "labels", "y"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_stored_attributes(name: str, kind: Any) -> None:
    dataset = Stored(name, kind(LABELS))
    nest = ConcatDataset([Subset(Subset(dataset, [3, 1, 0]), [1, 2]), dataset])
    found = find_targets(nest)
    assert found is not None
    assert found.tolist() == [0, 2, *LABELS]
    assert found.dtype == np.int64


def test_column_of_a_hub_style_data_set() -> None:
    class Columns(Stored):
        column_names = ["text", "label"]

        def __getitem__(self, index: Any) -> Any:
            return LABELS if index == "label" else super().__getitem__(index)

    found = find_targets(Columns("other", None))
    assert found is not None
    assert found.tolist() == LABELS


@pytest.mark.parametrize(
    "make",
    [
        lambda y: (torch.zeros(2), y),
        lambda y: [torch.zeros(2), torch.zeros(2), torch.tensor(y)],
        lambda y: {"x": torch.zeros(2), "label": torch.tensor([y])},
        lambda y: {"labels": y},
        lambda y: Graph(torch.zeros(2), torch.tensor(y)),
        lambda y: Pair(torch.zeros(2), y),
        lambda y: (torch.zeros(2), float(y)),
    ],
)
def test_samples(make: Any) -> None:
    dataset = Sampled([make(y) for y in LABELS])
    state = torch.get_rng_state()
    found = find_targets(Subset(dataset, [0, 2]))
    assert found is not None
    assert found.tolist() == [2, 1]
    assert torch.equal(state, torch.get_rng_state())  # augmentations must not shift the run's random numbers
    assert find_targets(dataset, iterate=False) is None


def test_binary_columns_and_one_own_function() -> None:
    column = TensorDataset(torch.zeros(4, 3), torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    assert find_targets(column).tolist() == [1, 0, 1, 1]  # type: ignore[union-attr]
    one_hot = TensorDataset(torch.zeros(4, 3), torch.eye(4))
    assert find_targets(one_hot, lambda sample: sample[1].argmax()).tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_nothing_to_find() -> None:
    assert find_targets(TensorDataset(torch.zeros(3, 2))) is None
    assert find_targets(Sampled([torch.zeros(2)] * 3)) is None
    assert find_targets(Sampled([{"x": 1}] * 3)) is None


def test_an_attribute_of_another_length_is_no_column() -> None:
    dataset = Sampled([(0, y) for y in LABELS])
    dataset.labels = ["cat", "dog", "eel"]  # type: ignore[attr-defined]  # class names, as many data sets have them
    assert find_targets(dataset).tolist() == LABELS  # type: ignore[union-attr]
