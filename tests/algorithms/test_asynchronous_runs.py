"""Asynchronous rounds over a whole run: resume, the versions that are kept, virtual time, and what is refused."""

from __future__ import annotations

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
from uneven_clients import SECONDS, SIZES, Fleet, train, whole_batches

from fl_lightning import DeviceFleet, ErrorFeedback, FedAsync, FedBuff, RandomK, TopK
from fl_lightning.schedules import BufferedSchedule, UniformSampler
from fl_lightning.types import Arrival, Contribution

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
        (lambda: train(FedBuff(2, staleness=lambda age: -1.0), 1), r"number >= 0 at 0 rounds for client 'site"),
        (lambda: train(FedBuff(2), 1, fleet=Fleet(dict.fromkeys(SECONDS, float("nan")))), r"takes nan seconds"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_a_fleet_of_devices_tells_the_time() -> None:
    fleet = DeviceFleet(speed=lambda client_id: 1.0 / SECONDS[client_id])
    trainer, _ = train(FedBuff(1), 4, local_steps=2, fleet=fleet)
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
