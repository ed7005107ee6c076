"""A client's loader against the loader that torch builds over the same examples."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fl_lightning.data import IID, FederatedDataModule, require_batches
from fl_lightning.data.loaders import ClientLoaders, recorded_arguments
from fl_lightning.data.samplers import ClientSubset
from fl_lightning.errors import EmptyClientError, MisconfigurationException

# Lightning's CombinedLoader uses what torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")

DATA = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 3)
MINE = np.array([1, 4, 7, 8, 15, 16, 19])


def built(make: Callable[[], DataLoader[Any]], **kwargs: Any) -> DataLoader[Any]:
    """The client's loader, made as FederatedDataModule makes it."""
    with recorded_arguments():
        loader = make()
    return ClientLoaders(loader).build(MINE, **kwargs)


def values(loader: Any, seed: int = 0) -> list[Any]:
    torch.manual_seed(seed)
    return [batch[0].flatten().tolist() for batch in loader]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_same_batches_as_torch(shuffle: bool, drop_last: bool) -> None:
    options = {"batch_size": 3, "shuffle": shuffle, "drop_last": drop_last}
    expected = DataLoader(Subset(DATA, MINE.tolist()), **options)
    assert values(built(lambda: DataLoader(DATA, **options))) == values(expected)
    # a loader that was not built inside the hook has no record; its attributes tell the same
    assert values(ClientLoaders(DataLoader(DATA, **options)).build(MINE)) == values(expected)
    assert values(built(lambda: DataLoader(DATA, **options), batch_size=2)) == values(
        DataLoader(Subset(DATA, MINE.tolist()), **{**options, "batch_size": 2})
    )


def double(batch: list[Any]) -> Any:
    return [torch.stack([2 * sample[0] for sample in batch])]


def init_worker(worker: int) -> None:
    pass


def test_every_setting_is_kept() -> None:
    options: dict[str, Any] = {
        "batch_size": 4, "collate_fn": double, "num_workers": 1, "drop_last": True, "timeout": 7.0,
        "worker_init_fn": init_worker, "multiprocessing_context": "spawn", "prefetch_factor": 3,
        "persistent_workers": True,
    }  # fmt: skip
    for loader in (built(lambda: DataLoader(DATA, **options)), ClientLoaders(DataLoader(DATA, **options)).build(MINE)):
        for name, value in options.items():
            if name != "multiprocessing_context":
                assert getattr(loader, name) == value, name
        assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert values(built(lambda: DataLoader(DATA, batch_size=7, collate_fn=double))) == [(2.0 * MINE).tolist()]


def test_workers_really_deliver() -> None:
    loader = built(lambda: DataLoader(DATA, batch_size=4, num_workers=1))
    assert values(loader) == [MINE[:4].tolist(), MINE[4:].tolist()]


def test_no_client_shares_the_users_generator() -> None:
    """A shared generator would make a client's order depend on who trained before it."""
    shared = torch.Generator().manual_seed(5)
    with recorded_arguments():
        loaders = ClientLoaders(DataLoader(DATA, batch_size=3, shuffle=True, generator=shared))
    before = shared.get_state()
    alone = values(loaders.build(MINE))
    values(loaders.build(np.arange(5)))
    assert values(loaders.build(MINE)) == alone
    assert torch.equal(before, shared.get_state())


class Repeating(DataLoader[Any]):
    """Takes an argument of its own and keeps it under another name, as users' subclasses do."""

    def __init__(self, dataset: Any, times: int, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.secret = times

    def __iter__(self) -> Any:
        for _ in range(self.secret):
            yield from super().__iter__()


class Fixed(DataLoader[Any]):
    def __init__(self, length: int) -> None:
        super().__init__(TensorDataset(torch.zeros(length)))


def test_a_subclass_is_built_again() -> None:
    def make() -> Repeating:
        loader = Repeating(DATA, 2, batch_size=4, shuffle=True)
        loader.note = "set later"  # type: ignore[attr-defined]
        return loader

    loader = built(make)
    assert isinstance(loader, Repeating)
    assert loader.note == "set later"
    rows = [value for batch in values(loader) for value in batch]
    assert sorted(rows) == sorted(2 * MINE.tolist())


def test_sampler_policies() -> None:
    kinds: dict[str, tuple[Any, type]] = {
        "random": (RandomSampler(DATA), RandomSampler),
        "sequential": (SequentialSampler(DATA), SequentialSampler),
        "subset": (SubsetRandomSampler(range(20)), RandomSampler),
        "distributed": (
            torch.utils.data.DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=True),
            RandomSampler,
        ),
        "distributed in order": (
            torch.utils.data.DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False),
            SequentialSampler,
        ),
    }
    for name, (sampler, kind) in kinds.items():
        loader = built(functools.partial(DataLoader, DATA, batch_size=2, sampler=sampler))
        assert type(loader.sampler) is kind, name
        assert sorted(functools.reduce(operator.iadd, values(loader), [])) == MINE.tolist(), name


def test_partial_epochs_are_cut_to_the_clients_share() -> None:
    loader = built(lambda: DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True, num_samples=40)))
    assert len(loader) == 14
    assert loader.sampler.replacement


def test_weights_of_the_client() -> None:
    weights = torch.zeros(20)
    weights[[4, 15]] = torch.tensor([1.0, 3.0])
    loader = built(lambda: DataLoader(DATA, batch_size=1, sampler=WeightedRandomSampler(weights, 4000)))
    drawn = functools.reduce(operator.iadd, values(loader), [])
    assert len(drawn) == 1400
    assert set(drawn) == {4.0, 15.0}
    assert drawn.count(15.0) / 1400 == pytest.approx(0.75, abs=0.05)


def test_a_subset_random_sampler_limits_the_data() -> None:
    """The held-out rest must not reach any client."""
    used = [18, 3, 5, 11, 0, 9]
    loaders = ClientLoaders(DataLoader(DATA, sampler=SubsetRandomSampler(used)))
    assert [int(loaders.dataset[i][0]) for i in range(6)] == used
    assert sorted(functools.reduce(operator.iadd, values(loaders.build(np.array([0, 2]))), [])) == [5.0, 18.0]


class Reversed(Sampler[int]):
    def __init__(self, data_source: Any, step: int = 1) -> None:
        self.data_source, self.step = data_source, step

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data_source) - 1, -1, -self.step))

    def __len__(self) -> int:
        return -(-len(self.data_source) // self.step)


class ByLength(Sampler[int]):
    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(len(self._lengths)), key=self._lengths.__getitem__))

    def __len__(self) -> int:
        return len(self._lengths)


class Forgetful(Sampler[int]):
    def __init__(self, data_source: Any, salt: int) -> None:
        self.data_source = data_source

    def __iter__(self) -> Iterator[int]:
        return iter([0])


class Blind(Sampler[int]):
    def __init__(self, number: int = 3) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.number))


class Growing(BatchSampler):
    """Batches of 1, 2, 3 …: a subclass of torch's with an argument of its own."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, start: int) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.first = start

    def __iter__(self) -> Iterator[list[int]]:
        rest, size = list(self.sampler), self.first
        while rest:
            size = min(size, self.batch_size)
            yield rest[:size]
            rest, size = rest[size:], size + 1

    def __len__(self) -> int:
        return len(list(iter(self)))


class Pairs:
    """A batch sampler that is no BatchSampler and has no sampler inside."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[i, i + 1] for i in range(0, len(self.dataset) - 1, 2)])

    def __len__(self) -> int:
        return len(self.dataset) // 2


def test_custom_samplers_are_built_again() -> None:
    loader = built(lambda: DataLoader(DATA, batch_size=7, sampler=Reversed(DATA, step=2)))
    assert values(loader) == [MINE[::-2].tolist()]
    lengths = [(7 * i) % 20 for i in range(20)]
    loader = built(lambda: DataLoader(DATA, batch_size=7, sampler=ByLength(lengths)))
    assert values(loader) == [sorted(MINE.tolist(), key=lambda i: lengths[i])]


def test_custom_batch_samplers_are_built_again() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(DATA, batch_sampler=Growing(Reversed(DATA), batch_size=5, drop_last=False, start=2))

    assert [len(batch) for batch in values(built(make))] == [2, 3, 2]
    assert functools.reduce(operator.iadd, values(built(make)), []) == MINE[::-1].tolist()
    assert [len(batch) for batch in values(built(make, batch_size=2))] == [2, 2, 2, 1]
    pairs = built(lambda: DataLoader(DATA, batch_sampler=Pairs(DATA)))  # type: ignore[arg-type]
    assert values(pairs) == [MINE[0:2].tolist(), MINE[2:4].tolist(), MINE[4:6].tolist()]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DATA, batch_size=3, shuffle=True, drop_last=True),
        lambda: DataLoader(DATA, batch_sampler=Growing(RandomSampler(DATA), 3, False, start=1)),
        lambda: Repeating(DATA, 1, batch_size=3, sampler=WeightedRandomSampler([1.0] * 20, 5)),
    ],
)
def test_evaluation_goes_once_through_everything_in_order(make: Callable[[], DataLoader[Any]]) -> None:
    loader = built(make, order="evaluation")
    assert values(loader) == [MINE[:3].tolist(), MINE[3:6].tolist(), MINE[6:].tolist()]


def test_unbatched_loader_stays_unbatched() -> None:
    loader = built(lambda: DataLoader(DATA, batch_size=None))
    assert [float(sample[0]) for sample in loader] == MINE.tolist()


def test_numpy_index_view_hands_out_python_integers() -> None:
    class Picky:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: Any) -> int:
            assert type(index) is int
            return index

    subset = ClientSubset(Picky(), np.array([3, 1, 4]))
    assert [subset[0], *subset.__getitems__([2, 1]), *subset[[0, 1]]] == [3, 4, 1, 3, 1]


def test_recording_does_not_stay_behind() -> None:
    """Lightning's patch is not re-entrant: nesting it would leave every later DataLoader patched."""
    from lightning.fabric.utilities.data import _replace_dunder_methods

    original = DataLoader.__init__, BatchSampler.__init__
    with _replace_dunder_methods(DataLoader, "dataset"), recorded_arguments():
        assert hasattr(DataLoader(DATA), "__pl_saved_args")
    assert (DataLoader.__init__, BatchSampler.__init__) == original
    with recorded_arguments():
        assert hasattr(DataLoader(DATA), "__pl_saved_args")
    assert (DataLoader.__init__, BatchSampler.__init__) == original


def test_recording_does_not_stay_behind_an_error() -> None:
    """Lightning's patch restores nothing when a user's hook raises; every later DataLoader would be slower."""
    original = DataLoader.__init__, BatchSampler.__init__
    with pytest.raises(ValueError, match="by the user"), recorded_arguments():
        raise ValueError("by the user")
    assert (DataLoader.__init__, BatchSampler.__init__) == original


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [DataLoader(DATA), DataLoader(DATA)], r"got a list of 2, and cannot cut .*ConcatDataset"),
        (lambda: {"a": DataLoader(DATA)}, r"got a dict of 1"),
        (lambda: CombinedLoader([DataLoader(DATA)]), r"got CombinedLoader"),
        (lambda: DataLoader(Stream()), r"IterableDataset Stream.*client_ids\(\) and client_dataloader"),
        (lambda: None, r"got NoneType"),
    ],
)
def test_what_cannot_be_cut(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ClientLoaders(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(DATA, sampler=Forgetful(DATA, 3)), r"Forgetful does not keep its argument 'salt'"),
        (lambda: DataLoader(DATA, sampler=Blind()), r"Blind has no argument that is the data set"),
        (lambda: Fixed(20), r"Fixed"),
        (
            lambda: DataLoader(DATA, sampler=WeightedRandomSampler(torch.eye(20)[0], 5)),
            r"all examples of the client have weight 0",
        ),
    ],
)
def test_what_cannot_be_built_again(make: Callable[[], DataLoader[Any]], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        built(make)


def test_batch_size_that_cannot_change() -> None:
    with pytest.raises(MisconfigurationException, match=r"batch_size=4 was asked for"):
        built(lambda: DataLoader(DATA, batch_size=None), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"batch_size=4 was asked for"):
        built(lambda: DataLoader(DATA, batch_sampler=Pairs(DATA)), batch_size=4)  # type: ignore[arg-type]


def test_require_batches() -> None:
    require_batches(DataLoader(DATA, batch_size=32), 0)
    require_batches(iter([1]), 0)  # no length: nothing is known
    with pytest.raises(EmptyClientError, match=r"20 examples do not fill one batch of 32.*min_size=32"):
        require_batches(DataLoader(DATA, batch_size=32, drop_last=True), "site-a", round=4)
    with pytest.raises(EmptyClientError, match=r"Client 7 failed in round 0: it has no examples"):
        require_batches([], 7)


def test_many_clients_are_cheap() -> None:
    """Ten thousand loaders share one data set, and an index array is a view of one permutation."""
    labels = torch.arange(100_000) % 10
    data = TensorDataset(torch.zeros(100_000, 1), labels)
    module = FederatedDataModule(LightningDataModule.from_datasets(data, batch_size=5), IID(10_000))
    loaders = [module.client_dataloader(client) for client in range(0, 10_000, 100)]
    assert all(loader.dataset.dataset is data for loader in loaders)
    assert all(loader.dataset.indices.base is not None for loader in loaders)
