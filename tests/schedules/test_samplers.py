"""Cohorts are pure in (seed, round), and as likely as their definitions say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer
from fl_lightning.errors import NotEnoughClientsError
from fl_lightning.schedules import (
    FixedSampler,
    PoissonSampler,
    PowerOfChoiceSampler,
    RoundRobinSampler,
    Sampler,
    SizeSampler,
    UniformSampler,
)
from fl_lightning.wire import pack

ROUNDS = 4000


class Nobody(Sampler):
    def cohort(self, population: Any, size: int, seed: int, round: int) -> list[Any]:
        return []


class Clients:
    def __init__(self, ids: Sequence[Any], sizes: dict[Any, int] | None = None) -> None:
        self.ids, self.sizes = ids, sizes

    def client_ids(self) -> Sequence[Any]:
        return self.ids

    def client_dataloader(self, client_id: Any) -> list[Any]:
        raise AssertionError("a sampler opens no data")

    def client_size(self, client_id: Any) -> int | None:
        return self.sizes[client_id] if self.sizes is not None else None


SIZES = {"a": 1, "b": 2, "c": 3, "d": 4}
SAMPLERS: dict[str, Sampler] = {
    "fixed": FixedSampler([["a", "b"], ["c"]]),
    "poisson": PoissonSampler(0.5),
    "power of choice": PowerOfChoiceSampler(3, lambda client_id, round: SIZES[client_id]),
    "round robin": RoundRobinSampler(),
    "size": SizeSampler(),
    "uniform": UniformSampler(),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_cohort_depends_on_seed_and_round_only(name: str) -> None:
    sampler, clients = SAMPLERS[name], Clients(list(SIZES), SIZES)
    rounds = [sampler.cohort(clients, 2, seed=1, round=r) for r in range(20)]
    # asked again, in another order, by another object
    assert rounds == [sampler.cohort(clients, 2, seed=1, round=r) for r in reversed(range(20))][::-1]
    assert all(len(set(cohort)) == len(cohort) and set(cohort) <= set(SIZES) for cohort in rounds)
    assert len({tuple(cohort) for cohort in rounds}) > 1
    if name != "fixed":
        assert rounds != [sampler.cohort(clients, 2, seed=2, round=r) for r in range(20)]


def test_poisson_cohorts_are_binomial() -> None:
    clients = Clients(range(50))
    cohorts = [PoissonSampler(0.1).cohort(clients, 0, seed=3, round=r) for r in range(ROUNDS)]
    sizes = [len(cohort) for cohort in cohorts]
    mean = sum(sizes) / ROUNDS
    assert mean == pytest.approx(5.0, abs=0.15)
    assert sum((size - mean) ** 2 for size in sizes) / ROUNDS == pytest.approx(50 * 0.1 * 0.9, abs=0.45)
    # every client as often as any other, and pairs as often as independence says
    each = Counter(client_id for cohort in cohorts for client_id in cohort)
    assert min(each.values()) > 0.1 * ROUNDS * 0.8
    assert max(each.values()) < 0.1 * ROUNDS * 1.2
    both = sum({0, 1} <= set(cohort) for cohort in cohorts)
    assert both / ROUNDS == pytest.approx(0.01, abs=0.006)
    assert all(list(cohort) == sorted(cohort) for cohort in cohorts)


def test_poisson_takes_its_rate_from_the_cohort_size_and_reads_no_million_ids() -> None:
    class Million(Sequence[int]):
        reads = 0

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: Any) -> Any:
            Million.reads += 1
            return index

    cohort = PoissonSampler().cohort(Clients(Million()), 100, seed=0, round=0)
    assert 50 < len(cohort) == Million.reads < 160
    assert PoissonSampler(1.0).cohort(Clients("abc"), 1, seed=0, round=0) == ["a", "b", "c"]


def test_sizes_decide_as_successive_draws_do() -> None:
    """P(first x, then y) = n_x / 10 * n_y / (10 - n_x)."""
    cohorts = Counter(
        tuple(SizeSampler().cohort(Clients(list(SIZES), SIZES), 2, seed=5, round=r)) for r in range(ROUNDS)
    )
    for first, second in permutations(SIZES, 2):
        expected = SIZES[first] / 10 * SIZES[second] / (10 - SIZES[first])
        assert cohorts[first, second] / ROUNDS == pytest.approx(expected, abs=0.025)
    assert SizeSampler().cohort(Clients(list(SIZES), SIZES), 4, seed=5, round=0) == list(SIZES)


def test_power_of_choice_keeps_the_worst_of_its_candidates() -> None:
    clients, loss = Clients(range(20)), {k: (7 * k) % 20 for k in range(20)}
    sampler = PowerOfChoiceSampler(6, lambda client_id, round: loss[client_id], by_size=False)
    for round in range(30):
        candidates = UniformSampler().cohort(clients, 6, seed=2, round=round)
        cohort = sampler.cohort(clients, 2, seed=2, round=round)
        assert cohort == sorted(candidates, key=lambda k: loss[k], reverse=True)[:2]


def test_power_of_choice_draws_its_candidates_by_size() -> None:
    clients = Clients(list(SIZES), SIZES)
    sampler = PowerOfChoiceSampler(1, lambda client_id, round: 0.0)
    drawn = [sampler.cohort(clients, 1, seed=9, round=r) for r in range(20)]
    assert drawn == [SizeSampler().cohort(clients, 1, seed=9, round=r) for r in range(20)]


def test_round_robin_gives_everyone_a_turn_before_anyone_has_two() -> None:
    clients = Clients(range(10))
    cohorts = [RoundRobinSampler().cohort(clients, 3, seed=4, round=r) for r in range(10)]
    turns = [client_id for cohort in cohorts for client_id in cohort]
    assert [sorted(turns[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert turns[:10] != sorted(turns[:10])
    assert RoundRobinSampler().cohort(clients, 99, seed=4, round=7) != list(range(10))
    assert sorted(RoundRobinSampler().cohort(clients, 99, seed=4, round=7)) == list(range(10))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, "a"])
def test_a_rate_is_a_probability(rate: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"rate to be a probability in \(0, 1\], got"):
        PoissonSampler(rate)


def test_turns_are_shuffled_or_not() -> None:
    with pytest.raises(MisconfigurationException, match=r"RoundRobinSampler expected shuffle to be True or.*'x'"):
        RoundRobinSampler("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (PoissonSampler(1e-9), r"of 3 clients by itself \(rate=1e-09\).*at 1, .* or raise rate: .*rate of 1\)"),
        (Nobody(), r"Lower min_clients, choose more clients_per_round"),
    ],
)
def test_an_empty_cohort_says_what_to_do(sampler: Sampler, message: str) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet.update(accelerator="cpu", enable_checkpointing=False, max_rounds=1, min_clients=2)
    trainer = FederatedTrainer(sampler=sampler, **quiet)
    data = {name: DataLoader(TensorDataset(torch.zeros(2)), batch_size=2) for name in "abc"}
    with pytest.raises(NotEnoughClientsError, match=f"only 0 clients are available to it. .*{message}"):
        trainer.fit(Slope(), data)
    assert "clients_per_round / number of clients" in PoissonSampler().advice(3)


def test_sampling_by_size_needs_sizes() -> None:
    with pytest.raises(MisconfigurationException, match=r"needs the size of client 'a'.*client_size\(id\).*Uniform"):
        SizeSampler().cohort(Clients(["a", "b"]), 1, seed=0, round=0)


def test_power_of_choice_needs_as_many_candidates_as_clients() -> None:
    with pytest.raises(MisconfigurationException, match="candidates to be an integer >= 1, got 0"):
        PowerOfChoiceSampler(0, lambda client_id, round: 0.0)
    with pytest.raises(MisconfigurationException, match="looks at 2 candidates and cannot choose 3"):
        PowerOfChoiceSampler(2, lambda client_id, round: 0.0).cohort(Clients("abcd"), 3, seed=0, round=0)


def test_fixed_cohorts_name_clients_that_exist() -> None:
    with pytest.raises(MisconfigurationException, match="at least one client each"):
        FixedSampler([["a"], []])
    with pytest.raises(MisconfigurationException, match=r"names \['1'\] in round 0.*the first is 1"):
        FixedSampler([["1"]]).cohort(Clients([1, 2]), 1, seed=0, round=0)
    assert FixedSampler([[999_999]]).cohort(Clients(range(10**6)), 1, seed=0, round=0) == [999_999]


class Slope(pl.LightningModule):
    """(x - e)^2 / 2 for the example e; takes no index of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout(0.5)

    def training_step(self, batch: Any) -> Tensor:
        # the dropout is of no effect and draws numbers, which must not be missing in training
        return ((self.x - batch[0]) ** 2).mean() / 2 + 0.0 * self.drop(self.x).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.4)


SIDES = ("num_bytes_down", "num_bytes_up")


def test_a_client_where_the_model_gives_nan_is_chosen_as_the_worst() -> None:
    for worst in "abcd":
        losses = {"a": 1.0, "b": 1e30, "c": 3.0, "d": 4.0, worst: float("nan")}
        sampler = PowerOfChoiceSampler(4, by_size=False)
        sampler.ask = lambda client_ids, round, losses=losses: {c: losses[c] for c in client_ids}
        for round in range(6):
            assert sampler.cohort(Clients("abcd"), 1, seed=0, round=round) == [worst]


@pytest.mark.parametrize("loop", ["auto", "lightning"])
def test_power_of_choice_asks_the_clients_and_disturbs_nothing(loop: Any) -> None:
    optima = {"a": 0.0, "b": 1.0, "c": 4.0, "d": 5.0}
    data = {
        name: DataLoader(TensorDataset(torch.full((6,), e) + torch.arange(6) / 10), batch_size=2, shuffle=True)
        for name, e in optima.items()
    }
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet.update(accelerator="cpu", enable_checkpointing=False, max_rounds=4, clients_per_round=2, local_loop=loop)
    x, expected = [0.0], []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            x.append(float(pl_module.x.detach()))

    pl.seed_everything(1, verbose=False)
    sampler = PowerOfChoiceSampler(4, by_size=False)
    trainer = FederatedTrainer(sampler=sampler, callbacks=[Watch()], **quiet)
    trainer.fit(module := Slope(), data)
    cohorts = [sorted(report.cohort) for report in trainer.round_history]
    for value in x[:-1]:
        losses = {name: float(((value - loader.dataset.tensors[0]) ** 2).mean()) for name, loader in data.items()}
        expected.append(sorted(sorted(losses, key=lambda name: -losses[name])[:2]))
    assert cohorts == expected
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    pl.seed_everything(1, verbose=False)
    told = FederatedTrainer(sampler=FixedSampler(cohorts), **quiet)
    told.fit(other := Slope(), data)
    assert torch.equal(module.x, other.x)
    # four candidates download the model on top of the cohort of two, and each sends a number back
    down, up = ([[getattr(r, name) for r in t.round_history] for t in (trainer, told)] for name in SIDES)
    assert down[0] == [3 * num_bytes for num_bytes in down[1]]
    assert up[0] == [num_bytes + 4 * len(pack({"loss": torch.zeros((), dtype=torch.float64)})) for num_bytes in up[1]]


def test_power_of_choice_has_nobody_to_ask_outside_of_a_fit() -> None:
    with pytest.raises(MisconfigurationException, match=r"a running FederatedTrainer.fit.*loss=lambda"):
        PowerOfChoiceSampler(2, by_size=False).cohort(Clients("abcd"), 1, seed=0, round=0)
