"""Lightning's own features work on rounds: checkpoints, early stopping, loggers, resume, limits, evaluation."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from spine_zoo import (
    QUIET,
    Classifier,
    ServedSites,
    assert_same_bits,
    fit_federated,
    loader,
    sites,
    val_loader,
    weights,
)

from fl_lightning.algorithms import FedAvg
from fl_lightning.data import IID, FederatedDataModule
from fl_lightning.trainer import FederatedTrainer

SAVING = {"enable_checkpointing": True}


def adam() -> FedAvg:
    return FedAvg(
        server_optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        server_lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    )


def test_checkpoint_early_stopping_and_the_best_model(tmp_path: Path) -> None:
    keep = ModelCheckpoint(
        tmp_path / "kept", monitor="val_acc", mode="max", save_top_k=2, filename="{epoch}-{val_acc:.3f}"
    )
    stop = EarlyStopping("val_loss", patience=1, min_delta=0.05)
    module = Classifier(lr=0.3, hidden=4)
    trainer = fit_federated(module, ServedSites(sites(4)), max_rounds=40, callbacks=[keep, stop], **SAVING)
    rounds = len(trainer.round_history)
    assert 3 < rounds < 40
    losses = [report.metrics["val_loss"] for report in trainer.round_history]
    assert losses[-1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    best = max(range(rounds), key=lambda r: trainer.round_history[r].metrics["val_acc"])
    assert f"epoch={best}-" in keep.best_model_path

    (tested,) = trainer.test(ckpt_path="best", verbose=False)
    loaded = Classifier.load_from_checkpoint(keep.best_model_path)  # weights_only is torch's default
    assert loaded.hparams == {"lr": 0.3, "hidden": 4}
    (plain,) = pl.Trainer(**QUIET).test(loaded, ServedSites({}).test_dataloader(), verbose=False)
    assert tested == plain
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()
    assert checkpoint["epoch"] == best


def test_validation_is_what_plain_lightning_says() -> None:
    module = Classifier()
    trainer = fit_federated(module, ServedSites(sites(3)), max_rounds=2)
    (mine,) = trainer.validate(module, verbose=False)
    (plain,) = pl.Trainer(**QUIET).validate(module, val_loader(), verbose=False)
    assert mine == plain
    assert mine["val_loss"] == pytest.approx(trainer.round_history[-1].metrics["val_loss"], rel=1e-6)
    assert trainer.test(module, verbose=False)[0]["test_loss"] > 0
    predicted = torch.cat(trainer.predict(module))
    assert predicted.shape == (12,)
    assert predicted.tolist() == module(ServedSites({}).predict_dataloader().dataset.tensors[0]).argmax(-1).tolist()


def test_validation_after_a_mapping_uses_its_loader() -> None:
    module = Classifier()
    trainer = fit_federated(module, sites(3), val_loader())
    assert trainer.validate(module, verbose=False) == pl.Trainer(**QUIET).validate(module, val_loader(), verbose=False)


def test_clients_are_evaluated_on_their_part_of_each_of_several_loaders() -> None:
    """The exact value over all clients is what the server's validation finds on the same loaders."""

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(48, batch_size=8)

        def val_dataloader(self) -> Any:
            return [loader(31, seed=5, batch_size=10, shuffle=False), loader(7, seed=6, batch_size=4, shuffle=False)]

    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    data = FederatedDataModule(Data(), IID(num_clients=5, seed=2))
    metrics = fit_federated(Several(), data, evaluate_clients=True).round_history[-1].metrics
    for index in (0, 1):
        for name in ("val_loss", "val_acc"):
            key = f"{name}/dataloader_idx_{index}"
            assert metrics[f"clients/{key}"] == pytest.approx(metrics[key], abs=1e-6)


def test_evaluation_after_the_fit_leaves_the_history() -> None:
    module = Classifier()
    trainer = fit_federated(module, ServedSites(sites(3)), max_rounds=2)
    before = copy.deepcopy(trainer.round_history)
    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    assert trainer.round_history == before


def test_a_second_fit_with_the_same_trainer_starts_anew() -> None:
    pl.seed_everything(7, verbose=False)
    trainer = FederatedTrainer(max_rounds=2, **QUIET)
    start = Classifier()
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    trainer.fit(first, sites(3))
    reports = copy.deepcopy(trainer.round_history)
    # as in plain Lightning, a Trainer that has reached its epochs goes on only when it is given more
    trainer.fit_loop.max_epochs = 4
    trainer.fit(second, sites(3))
    assert len(trainer.round_history) == 2
    assert [r.round for r in trainer.round_history] == [2, 3]
    assert [r.round for r in reports] == [0, 1]


def test_learning_rate_monitor_sees_the_servers_schedule(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit_federated(
        Classifier(), sites(2), max_rounds=4, algorithm=adam(), logger=logger, callbacks=[LearningRateMonitor()]
    )
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    rates = [float(row["server_lr"]) for row in rows if row.get("server_lr")]
    assert rates == pytest.approx([0.05, 0.05, 0.025, 0.025])


def test_csv_rows_are_rounds(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = fit_federated(Classifier(), sites(3), val_loader(), max_rounds=3, logger=logger)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    logged = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert logged == pytest.approx([report.metrics["val_loss"] for report in trainer.round_history])
    train = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert train == pytest.approx([report.metrics["train_loss"] for report in trainer.round_history])


def test_a_timer_stops_between_rounds() -> None:
    class Slow(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            import time

            time.sleep(0.3)

    trainer = fit_federated(Classifier(), sites(2), max_rounds=50, max_time="00:00:00:01", callbacks=[Slow()])
    assert 1 <= len(trainer.round_history) <= 6
    timer = fit_federated(Classifier(), sites(2), max_rounds=50, callbacks=[Slow(), Timer("00:00:00:01")])
    assert 1 <= len(timer.round_history) <= 6


def test_fast_dev_run_is_one_round_of_two_clients_and_one_batch() -> None:
    pl.seed_everything(7, verbose=False)
    module = Classifier()
    trainer = FederatedTrainer(max_rounds=9, local_epochs=3, fast_dev_run=True, accelerator="cpu",
                               enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, ServedSites(sites(5)))
    (report,) = trainer.round_history
    assert len(report.cohort) == 2
    assert report.num_steps == 2
    assert not Path("logs").exists()
    assert not Path("checkpoints").exists()
    assert "val_loss" in report.metrics


class CountsValidation(Callback):
    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.batches = 0
        self.sanity = 0

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking:
            self.sanity += 1
        else:
            self.batches += 1

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.rounds.append(trainer.current_epoch)


def test_validation_arguments_count_rounds_and_batches() -> None:
    seen = CountsValidation()
    trainer = fit_federated(
        Classifier(), ServedSites(sites(2)), max_rounds=5, callbacks=[seen], check_val_every_n_epoch=2,
        limit_val_batches=2, num_sanity_val_steps=1,
    )  # fmt: skip
    assert (seen.rounds, seen.batches, seen.sanity) == ([1, 3], 4, 1)
    assert ["val_loss" in r.metrics for r in trainer.round_history][:2] == [False, True]


def test_limit_train_batches_holds_for_each_client() -> None:
    trainer = fit_federated(Classifier(), sites(4), max_rounds=1, local_epochs=2, limit_train_batches=1)
    assert trainer.round_history[0].num_steps == 4 * 2


def test_limit_test_and_predict_batches() -> None:
    module = Classifier()
    trainer = fit_federated(module, ServedSites(sites(2)), limit_test_batches=1, limit_predict_batches=2)
    trainer.test(module, verbose=False)
    assert trainer.num_test_batches == [1]
    assert len(trainer.predict(module)) == 2


def test_barebones_trains_the_same_weights() -> None:
    start = Classifier()
    ends = []
    for arguments in ({"barebones": True, "accelerator": "cpu"}, QUIET):
        module = copy.deepcopy(start)
        pl.seed_everything(7, verbose=False)
        trainer = FederatedTrainer(max_rounds=2, **arguments)
        trainer.fit(module, sites(3))
        ends.append(weights(module))
        assert len(trainer.round_history) == 2
    assert_same_bits(*ends)


def test_the_simple_profiler_measures_rounds(tmp_path: Path) -> None:
    from lightning.pytorch.profilers import SimpleProfiler

    profiler = SimpleProfiler(tmp_path, "profile")
    fit_federated(Classifier(), sites(2), max_rounds=3, profiler=profiler)
    text = next(tmp_path.glob("*profile*.txt")).read_text()
    assert "run_training_epoch" in text
    (row,) = [line for line in text.splitlines() if "|  run_training_epoch" in line]
    assert row.split("|")[3].strip() == "3"


def test_deterministic_and_precision_reach_the_clients() -> None:
    seen: dict[str, Any] = {}

    class Reads(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
            seen["precision"] = trainer.precision
            seen["clip"] = trainer.gradient_clip_val
            seen["autocast"] = type(trainer.precision_plugin).__name__

    fit_federated(
        Classifier(),
        sites(2),
        deterministic=True,
        precision="bf16-mixed",
        gradient_clip_val=0.5,
        client_callbacks=[Reads()],
    )
    assert seen == {"deterministic": True, "precision": "bf16-mixed", "clip": 0.5, "autocast": "MixedPrecision"}


def test_evaluation_runs_in_the_users_precision_and_the_server_in_float32() -> None:
    dtypes = set()

    class Looks(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            dtypes.add((self(batch[0]).dtype, self.net[0].weight.dtype))

    for precision in ("bf16-mixed", "bf16-true", "64-true"):
        fit_federated(Looks(), ServedSites(sites(2)), precision=precision)
    assert dtypes == {(torch.bfloat16, torch.float32), (torch.float64, torch.float64)}


def test_the_servers_metrics_are_finite_numbers() -> None:
    trainer = fit_federated(Classifier(), sites(3), val_loader(), max_rounds=2)
    for report in trainer.round_history:
        assert set(report.metrics) >= {"train_loss", "train_loss_epoch", "val_loss", "val_acc"}
        assert all(math.isfinite(value) for value in report.metrics.values())


# ---- the module afterwards ------------------------------------------------------------------------------------------


def test_an_error_gives_the_module_its_class_back() -> None:
    class Breaks(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ValueError("broken on purpose")

    module = Breaks()
    with pytest.raises(ValueError, match="broken on purpose"):
        fit_federated(module, ServedSites(sites(2)))
    assert type(module) is Breaks
    assert "trainer" not in vars(module)
    torch.testing.assert_close(module(torch.zeros(1, 8)), module.net(torch.zeros(1, 8)))


def test_the_fitted_module_trains_in_plain_lightning_afterwards() -> None:
    module = Classifier()
    fit_federated(module, sites(2))
    before = weights(module)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "limit_val_batches": 0})
    trainer.fit(module, loader(), val_loader())
    assert trainer.global_step == 3
    assert not torch.equal(before["net.0.weight"], module.net[0].weight)
