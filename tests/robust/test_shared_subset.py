"""The shared public subset, and the distance of label distributions that it cures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning import Dirichlet, FederatedDataModule, Shards
from fl_lightning.data import DigitsDataModule
from fl_lightning.data.shared_subset import SharedPartition, SharedSubset


def data(partitioner: Any) -> FederatedDataModule:
    module = FederatedDataModule(DigitsDataModule(batch_size=10), partitioner)
    module.setup("fit")
    return module


@pytest.mark.parametrize("partitioner", [Shards(20), Dirichlet(20, alpha=0.3)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_distance_shrinks_as_computed(partitioner: Any, share: float) -> None:
    module = data(SharedSubset(partitioner, fraction=0.2, share=share))
    partition = module.partition
    assert isinstance(partition, SharedPartition)
    labels = np.asarray(module._classes()[1])
    everyone = np.bincount(labels, minlength=10) / len(labels)

    def distance(indices: Any) -> float:
        return 0.5 * float(np.abs(np.bincount(labels[indices], minlength=10) / len(indices) - everyone).sum())

    for client_id, found in zip(module.client_ids(), module.distance_to_global(), strict=True):
        own, shared = partition.own(client_id), partition.shared(client_id)
        n, m = len(own), len(shared)
        assert found == pytest.approx(distance(np.concatenate([own, shared])))
        assert found <= (n * distance(own) + m * distance(shared)) / (n + m) + 1e-12
    alone = np.mean([distance(partition.own(client_id)) for client_id in module.client_ids()])
    assert module.distance_to_global().mean() < 0.7 * alone


def test_private_examples_have_one_owner_and_public_ones_everyone() -> None:
    partition = data(SharedSubset(Shards(20), fraction=0.1)).partition
    assert isinstance(partition, SharedPartition)
    private = np.concatenate([partition.own(client_id) for client_id in partition])
    assert sorted([*private, *partition.public]) == list(range(1258))
    assert all(partition.size(c) == len(partition[c]) for c in partition)
    assert partition.sizes().tolist() == [len(partition[c]) for c in partition]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, r"fraction in \(0, 1\), got 0.0"),
        ({"fraction": 1.0}, r"fraction in \(0, 1\), got 1.0"),
        ({"share": 0.0}, r"share in \(0, 1\], got 0.0"),
    ],
)
def test_values_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        SharedSubset(Shards(20), **arguments)


def test_something_else_than_a_partitioner() -> None:
    with pytest.raises(MisconfigurationException, match="expected a partitioner, got int"):
        SharedSubset(20)  # type: ignore[arg-type]


def test_too_few_examples_for_a_public_one() -> None:
    with pytest.raises(MisconfigurationException, match="makes 0 of 4 examples public"):
        SharedSubset(Shards(2), fraction=0.01).split(list(range(4)))
