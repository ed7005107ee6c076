"""Partitioners against scikit-learn's digits, closed forms and the laws that every partition obeys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from fl_lightning.data.partitioners import IID, Dirichlet, Natural, Partitioner, Quantity, Shards
from fl_lightning.errors import MisconfigurationException

MAKERS: dict[str, Callable[..., Partitioner]] = {
    "iid": lambda **kw: IID(20, **kw),
    "dirichlet": lambda **kw: Dirichlet(20, 0.3, **kw),
    "dirichlet-extreme": lambda **kw: Dirichlet(20, 1e-3, **kw),
    "shards": lambda **kw: Shards(20, **kw),
    "quantity": lambda **kw: Quantity(20, 1.5, **kw),
    "natural": lambda **kw: Natural(lambda sample: int(sample[1]) % 7, **kw),
}


@pytest.fixture(scope="module")
def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32), torch.tensor(labels))


def counts_of(partition: Any, labels: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(labels[indices], minlength=10) for indices in partition.values()])


@pytest.mark.parametrize("name", MAKERS)
def test_laws(name: str, digits: TensorDataset) -> None:
    partition = MAKERS[name](seed=3).split(digits)
    merged = np.concatenate(list(partition.values()))
    np.testing.assert_array_equal(np.sort(merged), np.arange(len(digits)))  # each example once
    assert all(len(indices) >= 1 and indices.dtype == np.int64 for indices in partition.values())
    assert all((np.diff(indices) > 0).all() for indices in partition.values())
    assert [partition.size(client) for client in partition] == partition.sizes().tolist()


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "natural"])
def test_pure_in_the_seed(name: str, digits: TensorDataset) -> None:
    def draw(seed: int) -> np.ndarray:
        return np.concatenate(list(MAKERS[name](seed=seed).split(digits).values()))

    state = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tobytes()


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-extreme", "quantity", "iid", "shards"])
def test_min_size_is_honoured(name: str, digits: TensorDataset) -> None:
    partition = MAKERS[name](min_size=40).split(digits)
    assert partition.sizes().min() >= 40
    assert partition.sizes().sum() == len(digits)


def test_min_size_repair_leaves_large_clients_as_drawn(digits: TensorDataset) -> None:
    labels = digits.tensors[1].numpy()
    free = counts_of(Dirichlet(20, 0.1, min_size=1).split(digits, allow_empty=True), labels)
    mended = counts_of(Dirichlet(20, 0.1, min_size=10).split(digits), labels)
    small = free.sum(1) < 10
    assert small.any()
    np.testing.assert_array_equal(mended[small].sum(1), 10)
    assert np.abs(mended - free).sum() == 2 * (10 - free[small].sum(1)).sum()  # only what was lacking moved


def test_dirichlet_follows_its_own_proportions(digits: TensorDataset) -> None:
    """Counts are the drawn proportions times the class sizes, to within one example, at every class."""
    labels = digits.tensors[1].numpy()
    partitioner = Dirichlet(20, 0.3, seed=5)
    counts = counts_of(partitioner.split(digits, allow_empty=True), labels)
    for label in range(10):
        expected = partitioner.proportions(label) * (labels == label).sum()
        assert np.abs(counts[:, label] - expected).max() <= 1.0


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_marginals_are_beta(alpha: float) -> None:
    """A coordinate of Dir_N(alpha) is Beta(alpha, (N-1) alpha): Kolmogorov-Smirnov over 2,000 seeds."""
    draws = [Dirichlet(5, alpha, seed=seed).proportions(0)[0] for seed in range(2000)]
    assert stats.kstest(draws, stats.beta(alpha, 4 * alpha).cdf).pvalue > 1e-3


def test_dirichlet_validation_has_the_same_label_distribution() -> None:
    """Another data set of another length with other class sizes: each client's share of a class is the same."""
    train = TensorDataset(torch.zeros(20000, 1), torch.arange(20000) % 10)
    validation_labels = torch.cat([torch.full((500 * (label + 1),), label) for label in range(1, 8)])
    validation = TensorDataset(torch.zeros(len(validation_labels), 1), validation_labels)
    partitioner = Dirichlet(10, 0.5, seed=2)
    ours = counts_of(partitioner.split(train), np.arange(20000) % 10)[:, 1:8] / 2000
    theirs = counts_of(partitioner.split(validation, allow_empty=True), validation_labels.numpy())[:, 1:8]
    np.testing.assert_allclose(theirs / theirs.sum(0), ours, atol=2.5e-3)


def test_string_labels_partition_like_themselves() -> None:
    words = ["cat", "dog", "cat", "eel"] * 50
    partition = Dirichlet(4, 0.2, seed=1, target_fn=lambda sample: sample).split(words)
    shuffled = Dirichlet(4, 0.2, seed=1, target_fn=lambda sample: sample).split(sorted(words))
    for client in range(4):
        assert sorted(words[i] for i in partition[client]) == sorted(sorted(words)[i] for i in shuffled[client])


def test_shards_are_the_papers(digits: TensorDataset) -> None:
    """600 examples a client and two shards of one label each, when shards divide the classes."""
    labels = torch.arange(60000) % 10
    partition = Shards(100, per_client=2, seed=1).split(TensorDataset(torch.zeros(60000, 0), labels))
    counts = counts_of(partition, labels.numpy())
    assert set(counts.sum(1).tolist()) == {600}
    assert set(np.unique(counts).tolist()) == {0, 300, 600}  # every shard of 300 holds one label
    # ten labels with twenty shards each: a second shard has the first one's label with probability 19/199
    one_label = (counts.max(1) == 600).mean()
    assert 0.0 < one_label < 0.3
    spread = Shards(20, per_client=3).split(digits).sizes()
    assert spread.max() - spread.min() <= 3


def test_shards_validation_sees_the_same_labels() -> None:
    train = TensorDataset(torch.zeros(6000, 0), torch.arange(6000) % 10)
    validation = TensorDataset(torch.zeros(1000, 0), torch.arange(1000) % 10)
    ours = counts_of(Shards(50, seed=4).split(train), np.arange(6000) % 10)
    theirs = counts_of(Shards(50, seed=4).split(validation, allow_empty=True), np.arange(1000) % 10)
    np.testing.assert_array_equal(ours > 0, theirs > 0)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 2.0])
def test_quantity_is_a_power_law(exponent: float) -> None:
    sizes = np.sort(Quantity(30, exponent).split(range(10**6)).sizes())[::-1]
    slope = np.polyfit(np.log(np.arange(1, 31)), np.log(sizes), 1)[0]
    assert slope == pytest.approx(-exponent, abs=2e-3)


def test_quantity_spreads_ranks_over_ids() -> None:
    largest = {int(np.argmax(Quantity(10, 1.0, seed=seed).split(range(1000)).sizes())) for seed in range(30)}
    assert len(largest) > 5


def test_iid_label_distribution_is_hypergeometric(digits: TensorDataset) -> None:
    counts = counts_of(IID(10, seed=1).split(digits), digits.tensors[1].numpy())
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    assert counts.sum(1).max() - counts.sum(1).min() <= 1


class Visits(Dataset[dict[str, Any]]):
    def __init__(self, sites: list[str]) -> None:
        self.sites = sites

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": float(index), "site": self.sites[index], "number": torch.tensor(index % 2)}


@pytest.mark.parametrize("key", ["sites", "site", lambda sample: sample["site"]])
def test_natural_by_column_sample_or_callable(key: Any) -> None:
    nest = ConcatDataset([Subset(Visits(["b", "a", "b"]), [2, 1]), Visits(["c"])])
    partition = Natural(key).split(nest)
    assert {client: indices.tolist() for client, indices in partition.items()} == {"a": [1], "b": [0], "c": [2]}


def test_natural_integers_come_back_as_integers() -> None:
    partition = Natural("number").split(Visits(["a"] * 4))
    assert [(type(client), client) for client in partition] == [(int, 0), (int, 1)]


def test_natural_leaves_out_small_clients() -> None:
    partition = Natural("site", min_size=2).split(Visits(["a", "b", "a"]))
    assert list(partition) == ["a"]
    assert partition["a"].tolist() == [0, 2]


def test_empty_validation_clients_are_allowed() -> None:
    for partitioner in (IID(5), Quantity(5, 1.0), Shards(5), Dirichlet(5, 0.5)):
        partition = partitioner.split(TensorDataset(torch.zeros(2, 1), torch.tensor([0, 1])), allow_empty=True)
        assert partition.sizes().sum() == 2
        assert len(partition) == 5
        empty = partitioner.split(TensorDataset(torch.zeros(0, 1), torch.zeros(0).long()), allow_empty=True)
        assert empty.sizes().sum() == 0


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: IID(0), r"IID expected num_clients to be an integer of at least 1, got 0"),
        (lambda: IID(True), r"num_clients to be an integer of at least 1, got True"),
        (lambda: IID(3, min_size=0), r"min_size to be an integer of at least 1"),
        (lambda: Shards(3, per_client=0), r"per_client to be an integer of at least 1"),
        (lambda: Dirichlet(3, 0.0), r"alpha to be a finite number above 0, got 0.0"),
        (lambda: Dirichlet(3, float("inf")), r"IID\(num_clients\) for none"),
        (lambda: Quantity(3, -1.0), r"exponent to be a finite number of at least 0, got -1.0"),
        (lambda: IID(4).split(range(3)), r"needs at least 4 examples .* got 3. Use num_clients<=3"),
        (lambda: Dirichlet(2, 1.0, min_size=9).split(range(10)), r"needs at least 18 examples"),
        (lambda: Shards(4).split(TensorDataset(torch.zeros(5, 1), torch.zeros(5))), r"cuts 8 shards, got 5 examples"),
        (
            lambda: Shards(4, 3, min_size=5).split(TensorDataset(torch.zeros(20, 1), torch.zeros(20))),
            r"leaves a client with [34] of 20 examples, fewer than min_size=5",
        ),
        (lambda: Dirichlet(2, 1.0).split(TensorDataset(torch.zeros(5, 2))), r"found none in TensorDataset.*target_fn"),
        (lambda: Dirichlet(2, 1.0).split([torch.zeros(2)] * 5), r"cuts by label and found none in list"),
        (lambda: Dirichlet(2, 1.0).split(TensorDataset(torch.zeros(5, 2), torch.rand(5))), r"continuous numbers"),
        (lambda: Shards(2).split(TensorDataset(torch.zeros(5, 2), torch.zeros(5, 3))), r"one class for each example"),
        (lambda: IID(2).split(Stream()), r"got Stream, which cannot be cut by index"),
        (lambda: Natural("hospital").split(Visits(["a"])), r"found no such column or attribute in Visits"),
        (lambda: Natural("x").split(Visits(["a"])), r"strings or integers, got 0.0 of type float"),
        (lambda: Natural(lambda sample: True).split(Visits(["a"])), r"got True of type bool"),
        (lambda: Natural("site", min_size=3).split(Visits(["a"])), r"no client with min_size=3 .*has 1"),
        (lambda: Natural(3), r"key to be a name or a callable"),
        (lambda: IID(3).split(range(9))["0"], r"id of one of 3 clients \(0, 1, 2\), got '0'"),
        (lambda: IID(3).split(range(9))[True], r"got True"),
    ],
)
def test_bad_input(act: Callable[[], object], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        act()


def test_a_million_clients_cost_one_permutation() -> None:
    partition = IID(10**6).split(range(2 * 10**6))
    assert isinstance(partition.client_ids, range)
    assert partition[999_999].base is not None
    assert partition.size(0) == 2
