"""FedBuff and FedAsync against a simulation of their papers in plain torch, and the laws of asynchrony."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import Net, clients, identical, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import DeviceFleet, ErrorFeedback, FedAsync, FedAvg, FedBuff, RandomK, TopK
from fl_lightning.schedules import BufferedSchedule, Occasion, Plan, UniformSampler
from fl_lightning.types import Arrival, Contribution, Work

SECONDS = {"site-0": 1.0, "site-1": 2.503, "site-2": 7.01, "site-3": 2.017, "site-4": 0.753}  # never two at once
SIZES = (12, 20, 7, 9, 16)
LR, STEPS = 0.1, 3


class Fleet:
    """Clients of unequal speed, whatever they have to do."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.times = SECONDS if seconds is None else seconds

    def seconds(self, client_id: str, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        return self.times[client_id]


def whole_batches(sizes: tuple[int, ...] = SIZES) -> dict[str, DataLoader[Any]]:
    """Return clients that see all of their data in every step, in one order."""
    return {
        name: DataLoader(TensorDataset(*loader.dataset.tensors), batch_size=len(loader.dataset))  # type: ignore[attr-defined, arg-type]
        for name, loader in clients(sizes).items()
    }


def train(algorithm: Any, rounds: int = 9, data: Any = None, module: Any = None, **arguments: Any) -> tuple[Any, Any]:
    pl.seed_everything(5, verbose=False)
    module = module if module is not None else Net()
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=rounds, **arguments)
    trainer.fit(module, data if data is not None else whole_batches())
    return trainer, module


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


# ---- resume and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [lambda: FedBuff(3, 4), lambda: FedAsync(0.5, 4, mu=0.1)])
def test_a_resume_with_clients_in_flight_is_bit_exact(algorithm: Any, tmp_path: Path) -> None:
    """With residuals and momentum in the clients' memory, and a client that is in a flush more than once."""

    def run(folder: str, rounds: int, **fit: Any) -> tuple[Any, Any]:
        saver = ModelCheckpoint(tmp_path / folder / "checkpoints", save_top_k=-1, filename="{epoch}")
        trainer = quiet_trainer(
            algorithm=algorithm(), max_rounds=rounds, local_epochs=1, fleet=Fleet(), client_state="keep",
            transforms=[ErrorFeedback(TopK(0.2))], default_root_dir=str(tmp_path / folder), callbacks=[saver],
            enable_checkpointing=True,
        )  # fmt: skip
        pl.seed_everything(5, verbose=False)
        module = Net(momentum=0.9)
        trainer.fit(module, clients(SIZES), **fit)
        return trainer, module

    whole, expected = run("whole", 11)
    assert any(len(set(report.cohort)) < len(report.cohort) for report in whole.round_history) or algorithm().mu
    run("half", 6)
    path = tmp_path / "half" / "checkpoints" / "epoch=5.ckpt"
    saved = torch.load(path, weights_only=True)["fl_lightning"]
    in_flight = saved["schedule"]["BufferedSchedule"]["in_flight"]
    assert len(in_flight) >= 3
    assert set(saved["versions"]) == {d["version"] for d in in_flight}, "one copy of each version in flight, no more"
    resumed, module = run("half", 11, ckpt_path=path)
    assert identical(weights(module), weights(expected))
    assert [r.cohort for r in resumed.round_history] == [r.cohort for r in whole.round_history]
    assert [r.metrics for r in resumed.round_history] == [r.metrics for r in whole.round_history]


def test_only_versions_in_flight_are_kept() -> None:
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            dispatcher = trainer.federated_fit.federation.dispatcher
            needed = {d["version"] for d in dispatcher.schedule.state_dict()["in_flight"]}
            assert set(dispatcher.versions) == needed
            tensors = [t.data_ptr() for sent in dispatcher.versions.values() for t in sent["model"].values()]
            assert len(tensors) == len(set(tensors))
            own = {p.data_ptr() for p in pl_module.parameters()}
            assert own.isdisjoint(tensors), "the server would step a version that clients still train from"
            seen.append(len(needed))

    train(FedBuff(2), 15, local_steps=1, fleet=Fleet(), callbacks=[Watch()])
    assert max(seen) > 2


def test_values_are_drawn_over_virtual_time_and_a_resume_doubles_no_point(tmp_path: Path) -> None:
    def run(rounds: int, **fit: Any) -> Any:
        logger = TensorBoardLogger(tmp_path, name="run", version=0, default_hp_metric=False)
        saver = ModelCheckpoint(tmp_path / "run" / "version_0" / "checkpoints", save_top_k=-1, filename="{epoch}")
        pl.seed_everything(5, verbose=False)
        trainer = quiet_trainer(
            algorithm=FedBuff(1), max_rounds=rounds, local_steps=2, logger=logger, callbacks=[saver],
            enable_checkpointing=True,
        )  # fmt: skip
        trainer.fit(Net(), whole_batches(), **fit)
        return trainer

    run(8)
    whole = run(12, ckpt_path=tmp_path / "run" / "version_0" / "checkpoints" / "epoch=4.ckpt")
    found = EventAccumulator(str(tmp_path / "run" / "version_0" / "simulated_time"))
    found.Reload()
    expected = [(round(r.metrics["simulated_seconds"]), r.metrics["train_loss"]) for r in whole.round_history]
    # everyone takes two seconds, so five rounds are complete at every moment
    assert [step for step, _ in expected] == [2] * 5 + [4] * 5 + [6] * 2
    assert [e.step for e in found.Scalars("train_loss")] == [step for step, _ in expected]
    assert [e.value for e in found.Scalars("train_loss")] == pytest.approx([loss for _, loss in expected])
    assert {"staleness/mean", "staleness/max"} <= set(found.Tags()["scalars"])
    server = EventAccumulator(str(tmp_path / "run" / "version_0"))
    server.Reload()
    assert [e.step for e in server.Scalars("simulated_seconds")] == list(range(12))


def test_fast_dev_run_is_a_small_rehearsal() -> None:
    trainer, _ = train(FedBuff(4, 5), None, fast_dev_run=True)
    assert len(trainer.round_history) == 1
    assert len(trainer.round_history[0].cohort) == 2


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedBuff(0), r"FedBuff expected buffer_size to be an integer >= 1, got 0"),
        (lambda: FedBuff(2, 0), r"FedBuff expected concurrency to be an integer >= 1, got 0"),
        (lambda: FedBuff(2, 1.5), r"concurrency as a count >= 1 or as a fraction in \(0, 1\], got 1.5"),
        (lambda: FedBuff(2, staleness="linear"), r"staleness='constant', 'polynomial', 'hinge' or a callable"),
        (lambda: FedBuff(2, exponent=-1.0), r"exponent to be a finite number >= 0"),
        (lambda: FedBuff(2, hinge_slope=0.0), r"hinge_slope to be a finite number > 0"),
        (lambda: FedBuff(2, max_staleness=-1), r"max_staleness to be an integer >= 0"),
        (lambda: FedBuff(2, client_concurrency=0), r"client_concurrency to be an integer >= 1"),
        (lambda: FedBuff(2, server_lr=0.5, server_optimizer=torch.optim.SGD), r"Pass one of them"),
        (lambda: FedAsync(0.0), r"alpha to be a number in \(0, 1\], got 0.0"),
        (lambda: FedAsync(mu=-1.0), r"FedAsync expected mu"),
        (lambda: quiet_trainer(algorithm=FedBuff(2), clients_per_round=7), r"FedBuff\(\.\.\., concurrency=7\)"),
        (lambda: quiet_trainer(algorithm=FedBuff(2), sampler=UniformSampler()), r"Leave sampler out"),
        (lambda: quiet_trainer(algorithm=FedAsync(), schedule=BufferedSchedule(2)), r"Leave schedule out"),
        (lambda: quiet_trainer(algorithm=FedBuff(2), min_clients=3), r"Lower min_clients"),
        (lambda: train(FedBuff(2, 6), 1), r"concurrency=6 asks for more clients at work than exist \(5\)"),
        (lambda: train(FedBuff(2), 1, transforms=[RandomK(0.5, shared=True)]), r"Write shared=False"),
        (lambda: train(FedBuff(2, staleness=lambda age: -1.0), 1), r"staleness\(0\) to return a finite number >= 0"),
        (lambda: train(FedBuff(2), 1, fleet=Fleet(dict.fromkeys(SECONDS, float("nan")))), r"takes nan seconds"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_a_fleet_of_devices_tells_the_time_and_says_that_it_tells_no_more(caplog: pytest.LogCaptureFixture) -> None:
    fleet = DeviceFleet(speed=lambda client_id: 1.0 / SECONDS[client_id])
    with caplog.at_level("INFO"):
        trainer, _ = train(FedBuff(1), 4, local_steps=2, fleet=fleet)
    assert "not whether they are online" in caplog.text
    # steps are twice as long as the table says, and the network adds its part
    assert [report.cohort for report in trainer.round_history][:2] == [["site-4"], ["site-0"]]
    first = trainer.round_history[0].metrics["simulated_seconds"]
    assert 2 * SECONDS["site-4"] <= first < 2 * SECONDS["site-4"] + 1.0


def test_running_statistics_are_a_mean_of_fresh_and_old_ones() -> None:
    arrived = Contribution({"delta": {"w": torch.ones(1)}, "buffers": {"m": torch.tensor([8.0])}}, {"buffers": 4.0})
    received = FedBuff(2).receive(arrived, Arrival(staleness=3))
    assert received.trees["buffers"]["m"] / received.scalars["buffers"] == 2.0
    assert received.scalars["buffers"] == 2.0
    now = {"model": {"w": torch.zeros(1)}, "buffers": {"m": torch.tensor([4.0])}}
    mixed = FedAsync(0.5).receive(arrived, Arrival(0, {"model": {"w": torch.zeros(1)}}, now))
    assert mixed.trees["buffers"]["m"] / mixed.scalars["buffers"] == 3.0  # half way from 4 to 8 / 4
