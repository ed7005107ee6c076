"""Populations of every kind behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from fl_lightning.data import IID, FederatedDataModule, MappingPopulation, as_population, client_size
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import Population


def loader(length: int = 10, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(length, 1)), **kwargs)


class Clients:
    def __init__(self, ids: Any, data: Any = None) -> None:
        self.ids, self.data = ids, data

    def client_ids(self) -> Any:
        return self.ids

    def client_dataloader(self, client_id: Any) -> Any:
        return self.data


class Counting(Sequence[Any]):
    """A sequence that counts how often it is looked at."""

    def __init__(self, length: int) -> None:
        self.length, self.looks = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        if index >= self.length:
            raise IndexError
        return f"client-{index}"


def test_mapping() -> None:
    a, b = loader(3), loader(5)
    population = as_population({"b": b, "a": a})
    assert isinstance(population, Population)
    assert population.client_ids() == ["b", "a"]
    assert population.client_dataloader("a") is a
    assert (population.client_size("a"), population.client_size("b")) == (3, 5)
    assert population.client_val_dataloader("a") is population.client_datamodule("a") is None
    assert as_population(population) is population


def test_a_mapping_may_change_between_rounds() -> None:
    loaders = {"a": loader()}
    population = as_population(loaders)
    loaders["b"] = loader()
    assert population.client_ids() == ["a", "b"]


@pytest.mark.parametrize("package", [lightning, pytorch_lightning])
def test_a_client_may_be_a_data_module(package: Any) -> None:
    module = package.LightningDataModule.from_datasets(TensorDataset(torch.zeros(6, 1)), batch_size=2)
    population = as_population({1: module, "1": loader()})
    assert population.client_datamodule(1) is module
    assert population.client_datamodule("1") is None
    assert population.client_size(1) == 6


def test_federated_data_module() -> None:
    inner = lightning.LightningDataModule.from_datasets(
        TensorDataset(torch.zeros(10, 1)), TensorDataset(torch.zeros(4, 1)), batch_size=4
    )
    population = as_population(FederatedDataModule(inner, IID(3)))
    assert population.client_ids() == range(3)
    assert population.client_size(0) == 4
    assert population.client_dataloader(0, batch_size=2).batch_size == 2
    assert sum(len(population.client_eval_dataloader(client).dataset) for client in range(3)) == 4


def test_evaluation_falls_back_on_the_clients_own_validation_data() -> None:
    class Own(Clients):
        def client_val_dataloader(self, client_id: Any) -> Any:
            return ["validation"]

        def client_test_dataloader(self, client_id: Any) -> Any:
            return ["test"]

    population = as_population(Own([1]))
    assert population.client_eval_dataloader(1) == ["validation"]
    assert population.client_test_dataloader(1) == ["test"]


def test_a_range_is_never_scanned_and_a_long_sequence_once() -> None:
    million = as_population(Clients(range(10**6)))
    assert million.client_ids() is million.client_ids()
    ids = Counting(20_000)
    population = as_population(Clients(ids))
    first = population.client_ids()
    looks = ids.looks
    assert first is ids
    assert looks >= 20_000
    assert population.client_ids() is ids
    assert ids.looks == looks
    ids.length += 1  # clients joined
    population.client_ids()
    assert ids.looks > looks


def test_a_short_list_that_changes_in_place_is_checked_again() -> None:
    ids: list[Any] = ["a", "b"]
    population = as_population(Clients(ids))
    population.client_ids()
    ids[1] = "a"
    with pytest.raises(MisconfigurationException, match=r"every client id once, got 'a' twice"):
        population.client_ids()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Batches:
    batch_size = 4

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (loader(7, batch_size=3), 7),
        (loader(7, batch_size=3, drop_last=True), 7),
        (loader(9, sampler=SubsetRandomSampler([1, 2])), 2),
        (Batches(), 20),
        ([1, 2, 3], None),
        (DataLoader(Stream()), None),
        (iter([1]), None),
    ],
)
def test_client_size_from_the_loader(data: Any, expected: int | None) -> None:
    assert client_size(Clients([0], data), 0) == expected


def test_own_client_size_wins() -> None:
    class Sized(Clients):
        def client_size(self, client_id: Any) -> Any:
            return np.int64(42)

    size = client_size(Sized([0], loader(3)), 0)
    assert size == 42
    assert type(size) is int


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: as_population({}), r"at least one client id"),
        (lambda: as_population(loader()), r"Expected clients, got DataLoader"),
        (
            lambda: as_population(lightning.LightningDataModule()),
            r"LightningDataModule does not say who its clients are.*FederatedDataModule",
        ),
        (lambda: as_population(pytorch_lightning.LightningDataModule()), r"does not say who its clients are"),
        (lambda: as_population(Clients([1, 2, 1])).client_ids(), r"got 1 twice"),
        (lambda: as_population(Clients([0, True])).client_ids(), r"got True of type bool"),
        (lambda: as_population(Clients([1.0])).client_ids(), r"got 1.0 of type float"),
        (lambda: as_population(Clients(list(np.arange(2)))).client_ids(), r"of type int64"),
        (lambda: as_population(Clients(np.arange(2))).client_ids(), r"got ndarray. .*tolist"),
        (lambda: as_population(Clients({1, 2})).client_ids(), r"got set. .*sorted"),
        (lambda: as_population(Clients("abc")).client_ids(), r"got str"),
        (lambda: as_population({"a": loader()}).client_dataloader("b"), r"one of 1 clients \('a'\), got 'b'"),
        (lambda: as_population(Clients(["a"])).client_dataloader("a"), r"returned None"),
        (lambda: as_population({"a": [1]}).client_dataloader("a", batch_size=3), r"a list that cannot be built again"),
    ],
)
def test_bad_input(act: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        act()


def test_the_loader_of_a_mapping_is_built_again_for_another_batch_size() -> None:
    data = TensorDataset(torch.arange(10))
    built = as_population({"a": DataLoader(data, batch_size=2)}).client_dataloader("a", batch_size=4)
    assert [batch[0].tolist() for batch in built] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_keys_of_a_dictionary_are_ids() -> None:
    assert as_population(Clients({"b": 1, "a": 2}.keys())).client_ids() == ["b", "a"]
    assert MappingPopulation({"x": [1]}).client_dataloader("x") == [1]
