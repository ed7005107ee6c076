"""A round in which the sampler draws nobody, as a Poisson sampler may: it counts, and nothing moves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import Judged, Net, Normalised, Sites, clients, identical, weights
from everyone import ASYNCHRONOUS, EVERYONE, Gap, Seen, assert_same, cohort, train
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from quadratics import quiet_trainer
from torch.utils.data import DataLoader

from fl_lightning import FedAvg, FedAvgM
from fl_lightning.errors import NotEnoughClientsError
from fl_lightning.schedules import PoissonSampler
from fl_lightning.transforms import ErrorFeedback, TopK

SYNCHRONOUS = sorted(EVERYONE.keys() - set(ASYNCHRONOUS))  # those draw nobody by a sampler: clients work all the time


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_nothing_moves_and_a_resume_goes_on_from_there(name: str, tmp_path: Path) -> None:
    whole, resumed = Seen(), Seen()
    arguments: dict[str, Any] = {"rounds": 3, "sampler": Gap(1), "local_steps": 2, "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    first = train(name, Net(), callbacks=[saver, whole], default_root_dir=str(tmp_path / "whole"), **arguments)
    before, empty, after = first.round_history
    assert (empty.round, empty.cohort, empty.num_examples, empty.num_steps) == (1, [], 0, 0)
    assert (empty.num_bytes_down, empty.num_bytes_up, empty.metrics) == (0, 0, {})
    assert set(before.cohort) == set(after.cohort) == set(cohort())
    assert_same(whole.weights[1], whole.weights[0])
    assert_same(whole.states[1], whole.states[0])
    assert not identical(whole.weights[2], whole.weights[1])
    trainer = train(
        name, Net(), callbacks=[resumed, ModelCheckpoint(tmp_path / "saved", save_top_k=0)],
        ckpt_path=str(tmp_path / "saved" / "epoch=1.ckpt"), default_root_dir=str(tmp_path / "resumed"), **arguments,
    )  # fmt: skip
    assert_same(resumed.weights, whole.weights[2:])
    assert_same(resumed.states, whole.states[2:])
    assert [report.cohort for report in trainer.round_history] == [before.cohort, [], after.cohort]


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "Scaffold II", "FedDyn", "Krum", "FLTrust"])
def test_a_run_of_empty_rounds_only_ends(name: str) -> None:
    module = Net()
    start = weights(module)
    trainer = train(name, module, rounds=3, sampler=PoissonSampler(1e-9))
    assert [report.cohort for report in trainer.round_history] == [[], [], []]
    assert identical(weights(module), start)


def test_everything_around_a_round_takes_an_empty_one(tmp_path: Path) -> None:
    """Charts, curves, evaluation, recalibration, a compressed wire, a device's clock, a server's schedule."""
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    class Both(Normalised, Judged):
        pass

    trainer = quiet_trainer(
        algorithm=FedAvgM(server_lr_scheduler=schedule), max_rounds=4, sampler=Gap(0, 2), evaluate_clients=True,
        batch_norm="recalibrate", transforms=[ErrorFeedback(TopK(fraction=0.5))], fleet=Seconds(),
        logger=TensorBoardLogger(tmp_path), log_clients=True, enable_progress_bar=True, callbacks=[Rates()],
        default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(Both(), Sites())
    assert rates == [1.0, 0.5, 0.25, 0.125]  # rounds are what a server's schedule counts
    reports = trainer.round_history
    assert [len(report.cohort) for report in reports] == [0, 3, 0, 3]
    assert [report.metrics["simulated_seconds"] for report in reports] == [0.0, 1.0, 1.0, 2.0]
    assert reports[2].metrics["clients/val_loss"] == reports[1].metrics["clients/val_loss"]
    assert "train_loss" in reports[1].metrics
    assert "train_loss" not in reports[2].metrics


class Seconds:
    """Every client takes a second."""

    def seconds(self, client_id: Any, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        return 1.0


@pytest.mark.parametrize(("monitor", "first"), [("train_loss", 1), ("val_loss", 0)])
def test_checkpoints_watch_values_that_an_empty_round_has_not(monitor: str, first: int, tmp_path: Path) -> None:
    """A training value of the round before is not this one's, also where the server validates."""
    saver = ModelCheckpoint(tmp_path, monitor=monitor, save_top_k=1)
    trainer = quiet_trainer(
        max_rounds=4, sampler=Gap(first, 2), callbacks=[saver], enable_checkpointing=True,
        default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(Judged(), clients(), DataLoader(clients()["site-0"].dataset, batch_size=6))
    reports = trainer.round_history
    assert [round for round, report in enumerate(reports) if not report.cohort] == sorted({first, 2})
    assert [round for round, report in enumerate(reports) if "train_loss" not in report.metrics] == sorted({first, 2})
    assert all("val_loss" in report.metrics for report in reports)
    best = min(report.metrics[monitor] for report in reports if monitor in report.metrics)
    assert float(saver.best_model_score) == pytest.approx(best)


def test_a_cohort_that_must_not_be_empty_says_so() -> None:
    trainer = quiet_trainer(algorithm=FedAvg(), max_rounds=1, sampler=PoissonSampler(1e-9), min_clients=2)
    with pytest.raises(NotEnoughClientsError, match=r"min_clients=2, but only 0 clients.*Leave min_clients at 1"):
        trainer.fit(Net(), clients())


def test_another_sampler_that_draws_nobody_is_wrong() -> None:
    class Nobody(Gap):
        may_draw_nobody = False

    with pytest.raises(NotEnoughClientsError, match="only 0 clients are available"):
        quiet_trainer(algorithm=FedAvg(), max_rounds=1, sampler=Nobody(0)).fit(Net(), clients())


def test_poisson_runs_are_the_same_after_a_resume_through_empty_rounds(tmp_path: Path) -> None:
    """At this rate about a third of the cohorts of three are empty."""
    whole, resumed = Seen(), Seen()
    arguments: dict[str, Any] = {"rounds": 8, "sampler": PoissonSampler(0.3), "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    first = train("FedAdam", Net(), clients(), callbacks=[saver, whole], default_root_dir=str(tmp_path), **arguments)
    sizes = [len(report.cohort) for report in first.round_history]
    assert 2 <= sizes.count(0) <= 6
    begin = sizes.index(0)
    train(
        "FedAdam", Net(), clients(), callbacks=[resumed, ModelCheckpoint(tmp_path / "saved", save_top_k=0)],
        ckpt_path=str(tmp_path / "saved" / f"epoch={begin}.ckpt"), default_root_dir=str(tmp_path / "b"), **arguments,
    )  # fmt: skip
    assert_same(resumed.weights, whole.weights[begin + 1 :])
    assert_same(resumed.states, whole.states[begin + 1 :])
