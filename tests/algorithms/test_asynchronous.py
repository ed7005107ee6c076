"""FedBuff and FedAsync against a simulation of their papers in plain torch, and the laws of asynchrony."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import Net, clients, identical, weights
from torch import Tensor
from uneven_clients import SECONDS, SIZES, Fleet, train, whole_batches

from fl_lightning import ErrorFeedback, FedAsync, FedAvg, FedBuff, RandomK, TopK
from fl_lightning.schedules import BufferedSchedule, Occasion, Plan
from fl_lightning.types import Work

LR, STEPS = 0.1, 3

# ---- the papers, in plain torch ------------------------------------------------------------------------------------


def simulate(rounds: int, buffer_size: int, merge: Callable[[list[Tensor], list[Any]], list[Tensor]]) -> list[Tensor]:
    """Run clients of unequal speed around a server, event by event; everyone is always at work.

    Args:
        rounds: server steps.
        buffer_size: arrivals that make the server step.
        merge: from the model and the arrivals (client, staleness, start, end) to the next model.
    """
    data = {name: loader.dataset.tensors for name, loader in whole_batches().items()}
    torch.manual_seed(0)
    pl.seed_everything(5, verbose=False)
    module = Net()
    server = [p.detach().clone() for p in module.parameters()]
    versions = [copy.deepcopy(server)]
    events = [(SECONDS[name], name, 0) for name in sorted(data)]
    heapq.heapify(events)
    arrivals: list[Any] = []
    while len(versions) <= rounds:
        now, name, version = heapq.heappop(events)
        start = versions[version]
        arrivals.append((name, len(versions) - 1 - version, start, local(module, start, data[name])))
        if len(arrivals) == buffer_size:
            versions.append(merge(versions[-1], arrivals))
            arrivals = []
        heapq.heappush(events, (now + SECONDS[name], name, len(versions) - 1))
    return versions[-1]


def local(module: Net, start: list[Tensor], batch: Any) -> list[Tensor]:
    model = copy.deepcopy(module)
    for parameter, value in zip(model.parameters(), start, strict=True):
        parameter.data.copy_(value)
    for _ in range(STEPS):
        grads = torch.autograd.grad(model.loss(batch), list(model.parameters()))
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.data -= LR * grad
    return [parameter.detach() for parameter in model.parameters()]


def close(module: Net, expected: list[Tensor]) -> bool:
    return all(torch.allclose(p, e, atol=1e-6) for p, e in zip(module.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "factor"),
    [
        ({}, lambda age: (1 + age) ** -0.5),
        ({"exponent": 2.0}, lambda age: (1 + age) ** -2.0),
        ({"staleness": "constant"}, lambda age: 1.0),
        ({"staleness": "hinge", "hinge_slope": 3.0, "hinge_delay": 1}, lambda age: 1 / (3 * max(age - 1, 0) + 1)),
        ({"staleness": lambda age: 0.1 * age}, lambda age: 0.1 * age),
    ],
    ids=["polynomial", "exponent", "constant", "hinge", "callable"],
)
def test_fedbuff_is_its_paper_s_algorithm(arguments: dict[str, Any], factor: Callable[[int], float]) -> None:
    def merge(now: list[Tensor], arrivals: list[Any]) -> list[Tensor]:
        return [
            w + 0.8 / len(arrivals) * sum(factor(age) * (end[i] - start[i]) for _, age, start, end in arrivals)
            for i, w in enumerate(now)
        ]

    algorithm = FedBuff(2, None, server_lr=0.8, weights="uniform", **arguments)
    trainer, module = train(algorithm, local_steps=STEPS, fleet=Fleet())
    ages = [report.metrics["staleness/max"] for report in trainer.round_history]
    assert max(ages) >= 3, "nothing was stale"
    assert close(module, simulate(9, 2, merge))


@pytest.mark.parametrize("staleness", ["polynomial", "constant"])
def test_fedasync_is_its_paper_s_algorithm(staleness: Any) -> None:
    def merge(now: list[Tensor], arrivals: list[Any]) -> list[Tensor]:
        ((_, age, _, end),) = arrivals
        rate = 0.6 * ((1 + age) ** -0.5 if staleness == "polynomial" else 1.0)
        return [(1 - rate) * w + rate * e for w, e in zip(now, end, strict=True)]

    trainer, module = train(FedAsync(0.6, staleness=staleness), 14, local_steps=STEPS, fleet=Fleet())
    assert max(report.metrics["staleness/max"] for report in trainer.round_history) >= 3
    assert close(module, simulate(14, 1, merge))


def test_the_examples_of_a_client_are_its_weight() -> None:
    sizes = dict(zip(SECONDS, SIZES, strict=True))

    def merge(now: list[Tensor], arrivals: list[Any]) -> list[Tensor]:
        total = sum(sizes[name] for name, *_ in arrivals)
        return [
            w + sum(sizes[n] * (1 + age) ** -0.5 * (end[i] - start[i]) for n, age, start, end in arrivals) / total
            for i, w in enumerate(now)
        ]

    _, module = train(FedBuff(3), local_steps=STEPS, fleet=Fleet())
    assert close(module, simulate(9, 3, merge))


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transforms", [None, [TopK(0.3)], [ErrorFeedback(RandomK(0.3, shared=False))]])
def test_without_staleness_fedbuff_is_fedavg_to_the_bit(transforms: Any) -> None:
    arguments: dict[str, Any] = {"rounds": 4, "data": clients(SIZES), "local_steps": 3, "transforms": transforms}
    module = Net()
    _, buffered = train(FedBuff(5, 5), module=copy.deepcopy(module), **copy.deepcopy(arguments))
    _, averaged = train(FedAvg(), module=copy.deepcopy(module), **copy.deepcopy(arguments))
    assert identical(weights(buffered), weights(averaged))
    assert not identical(weights(buffered), weights(module))


def test_fedasync_alone_with_one_client_is_fedavg() -> None:
    data = whole_batches((12,))
    _, mixed = train(FedAsync(1.0), 4, data=data, local_steps=2)
    _, averaged = train(FedAvg(), 4, data=data, local_steps=2)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(mixed.parameters(), averaged.parameters(), strict=True))


def plans(schedule: BufferedSchedule, rounds: int, ids: Any, timing: Any = None) -> list[Plan]:
    class Clients:
        def client_ids(self) -> Any:
            return ids

    found, clock, first = [], 0.0, 0
    for round in range(rounds):
        occasion = Occasion(
            round, clock, 3, Clients(), 0, first, 0, 0, None, lambda size: [], lambda c: Work(), lambda c, w: 1, timing
        )  # type: ignore[arg-type]
        plan = schedule.plan(occasion)
        assert plan.downloads is not None
        clock, first = plan.finished_at, first + len(plan.downloads)
        found.append(plan)
    return found


class Uneven:
    """Times between 1 and 10 s that depend on client and moment."""

    def seconds(self, client_id: int, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        return 1.0 + (client_id * 37 + int(at * 13)) % 90 / 10


@pytest.mark.parametrize(("buffer_size", "places", "each"), [(4, 10, 1), (1, 30, 1), (7, 3, 1), (5, 50, 2)])
def test_time_runs_forward_and_everyone_trains_from_the_model_of_the_moment(
    buffer_size: int, places: int, each: int
) -> None:
    found = plans(BufferedSchedule(buffer_size, places, client_concurrency=each), 60, range(30), Uneven())
    flushes = [plan.finished_at for plan in found]
    assert flushes == sorted(flushes)
    dispatches = [dispatch for plan in found for dispatch in plan.dispatches]
    arrivals = [(dispatch.done_at, dispatch.dispatch_id) for dispatch in dispatches]
    assert arrivals == sorted(arrivals)
    assert len({dispatch.dispatch_id for dispatch in dispatches}) == len(dispatches) == 60 * buffer_size
    everything = [*dispatches, *found[-1].in_flight]
    for dispatch in everything:
        before = sum(finished < dispatch.sent_at for finished in flushes[:59])
        until = sum(finished <= dispatch.sent_at for finished in flushes[:59] if dispatch.sent_at)
        # of several flushes at one moment, the client that made room may have been in an earlier one
        assert dispatch.version == until if until <= before + 1 else before < dispatch.version <= until
    for moment in (flushes[20] - 0.01, flushes[20] + 0.01, flushes[40] + 0.05):
        at_work = [d.client_id for d in everything if d.sent_at <= moment < d.done_at]
        assert len(at_work) == places
        assert max(at_work.count(client_id) for client_id in at_work) <= each
    taken = {dispatch.client_id for dispatch in dispatches}
    assert len(taken) == 30, "everyone gets a turn"


def test_a_schedule_that_was_saved_goes_on_alike() -> None:
    whole = plans(BufferedSchedule(3, 8), 1, range(20), Uneven())
    schedule = BufferedSchedule(3, 8)
    assert plans(schedule, 1, range(20), Uneven()) == whole
    twin = BufferedSchedule(3, 8)
    twin.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert plans(twin, 5, range(20), Uneven()) == plans(schedule, 5, range(20), Uneven())


def test_an_update_as_old_as_the_limit_is_taken() -> None:
    free, _ = train(FedBuff(2), 30, local_steps=1, fleet=Fleet())
    oldest = max(int(report.metrics["staleness/max"]) for report in free.round_history)
    limited, _ = train(FedBuff(2, max_staleness=oldest), 30, local_steps=1, fleet=Fleet())
    assert [report.cohort for report in limited.round_history] == [report.cohort for report in free.round_history]
    assert not any(report.dropped for report in limited.round_history)
    below, _ = train(FedBuff(2, max_staleness=oldest - 1), 30, local_steps=1, fleet=Fleet())
    assert any(report.dropped for report in below.round_history)


def test_old_updates_are_dropped_and_named() -> None:
    trainer, _ = train(FedBuff(2, max_staleness=6), 30, local_steps=1, fleet=Fleet())
    dropped = {client_id: reason for report in trainer.round_history for client_id, reason in report.dropped.items()}
    assert set(dropped) == {"site-2"}
    assert "rounds old, and max_staleness=6" in dropped["site-2"]
    assert all(report.metrics["staleness/max"] <= 6 for report in trainer.round_history)
    assert all(len(report.cohort) == 2 for report in trainer.round_history)
    assert "site-2" not in {client_id for report in trainer.round_history for client_id in report.cohort}


def test_without_a_fleet_every_step_takes_a_second() -> None:
    trainer, _ = train(FedBuff(1), 4, data=clients((4, 40)), local_epochs=2)
    # one client has 1 batch and the other 10, in two epochs: the first arrives at 2, 4, 6, ... and the other at 20
    assert [report.metrics["simulated_seconds"] for report in trainer.round_history] == [2.0, 4.0, 6.0, 8.0]
    assert {tuple(report.cohort) for report in trainer.round_history} == {("site-0",)}


class Fragile(Net):
    """Fails on the client with 20 examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) == 20:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_a_client_that_fails_is_skipped_and_its_place_goes_on() -> None:
    with pytest.warns(UserWarning, match="'site-1' is skipped"):
        trainer, _ = train(
            FedBuff(3), 6, module=Fragile(), local_steps=1, fleet=Fleet(), on_bad_update="skip", local_loop="lightning"
        )
    skipped = [report for report in trainer.round_history if report.skipped]
    assert skipped
    for report in trainer.round_history:
        assert len(report.cohort) + ("site-1" in report.skipped) == 3
        assert "site-1" not in report.cohort
