from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from fl_lightning.reporting import (
    ClientCurves,
    ClientLogger,
    continue_runs,
    continue_version,
    cut_logs,
    flush_logs,
    newest_checkpoint,
    newest_version,
    truncate_events,
)


class Rounds(BoringModel):
    """One batch an epoch, as a federated round is, with a curve and hyperparameters."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("round_number", float(self.current_epoch))
        return super().training_step(batch, batch_idx)


class CutAndWrite(pl.Callback):
    """What the federation does: cut on resume, client curves with each round, flush before a checkpoint."""

    def __init__(self, steps: int, resume: int | None = None) -> None:
        self.steps, self.resume = steps, resume

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.curves = ClientCurves(trainer.loggers, True, [7, 8])
        if self.resume is not None:
            cut_logs(trainer.loggers, self.resume, {7: self.steps * self.resume})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        recorder = ClientLogger()
        for step in range(self.steps):
            recorder.log_metrics({"loss": float(trainer.current_epoch)}, trainer.current_epoch * self.steps + step)
        self.curves.write(trainer.current_epoch, {7: recorder.take()})

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        flush_logs(trainer.loggers)


def run(loggers: Any, rounds: int, ckpt_path: Any = None, resume: int | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        logger=loggers, max_epochs=rounds, limit_train_batches=1, limit_val_batches=0, log_every_n_steps=1,
        callbacks=[CutAndWrite(3, resume), ModelCheckpoint(save_top_k=-1, every_n_epochs=1)], accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Rounds(), ckpt_path=ckpt_path)
    return trainer


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def event_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*tfevents*"))


# ---- which run and which checkpoint -------------------------------------------------------------------------------


def checkpoint(path: Path, age: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1}, path)
    os.utime(path, (10**9 - age, 10**9 - age))
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    old = checkpoint(tmp_path / "checkpoints" / "z-old.ckpt", age=30)
    new = checkpoint(tmp_path / "checkpoints" / "deep" / "a-new.ckpt", age=20)
    torn = checkpoint(tmp_path / "checkpoints" / "torn.ckpt", age=10)
    torn.write_bytes(torn.read_bytes()[:-30])
    flipped = checkpoint(tmp_path / "flipped.ckpt", age=5)
    data = bytearray(flipped.read_bytes())
    data[data.index(b"epoch")] ^= 1
    flipped.write_bytes(data)
    (tmp_path / "checkpoints" / "empty.ckpt").touch()
    (tmp_path / "checkpoints" / "sharded.ckpt").mkdir()
    (tmp_path / "checkpoints" / "dangling.ckpt").symlink_to("nowhere")
    assert newest_checkpoint(tmp_path) == str(new)
    new.unlink()
    assert newest_checkpoint(str(tmp_path)) == str(old)


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_the_newest_run_with_a_checkpoint_goes_on(tmp_path: Path, kind: Any) -> None:
    assert continue_version(kind(tmp_path, name="run")) is None
    for version in (2, 10, 9):  # 10 comes after 9, in numbers
        checkpoint(tmp_path / "run" / f"version_{version}" / "checkpoints" / "x.ckpt", age=0)
    (tmp_path / "run" / "version_11").mkdir()  # killed before its first checkpoint
    (tmp_path / "run" / "version_x").mkdir()
    checkpoint(tmp_path / "other" / "version_50" / "checkpoints" / "x.ckpt", age=0)
    logger = kind(tmp_path, name="run")
    assert newest_version(logger) == 10
    assert kind(tmp_path, name="run").version == 12  # what Lightning would take
    assert continue_version(logger) == tmp_path / "run" / "version_10"
    assert logger.version == 10


def test_a_version_that_the_user_gave_is_kept(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run" / "mine" / "checkpoints" / "x.ckpt", age=0)
    checkpoint(tmp_path / "run" / "version_3" / "checkpoints" / "x.ckpt", age=0)
    assert continue_version(TensorBoardLogger(tmp_path, name="run", version="mine")) == tmp_path / "run" / "mine"
    assert newest_version(TensorBoardLogger(tmp_path, name="run", version=3, sub_dir="tb")) == 3
    assert newest_version(TensorBoardLogger(tmp_path, name="run", version=4)) is None


def test_all_loggers_of_a_run_go_on(tmp_path: Path) -> None:
    def fresh() -> list[Any]:
        return [TensorBoardLogger(tmp_path, name="run"), CSVLogger(tmp_path, name="run"), CSVLogger(tmp_path / "csv")]

    assert continue_runs(fresh()) is None
    first = fresh()
    run(first, 2)
    assert [logger.version for logger in first] == [0, 1, 0]
    again = fresh()
    assert continue_runs(again) == tmp_path / "run" / "version_0"
    assert [logger.version for logger in again] == [0, 1, 0]


# ---- logs without duplicates and orphans --------------------------------------------------------------------------


def test_a_resumed_run_has_the_logs_of_an_uninterrupted_one(
    tmp_path: Path, raw_points: Callable[..., Any], accumulated: Callable[..., Any]
) -> None:
    def loggers(name: str) -> list[Any]:
        return [TensorBoardLogger(tmp_path, name=name), CSVLogger(tmp_path, name=f"{name}_csv")]

    straight = loggers("straight")
    run(straight, 6)
    run(loggers("broken"), 4)  # the checkpoint of round 1 is the last that survives
    for path in (tmp_path / "broken" / "version_0" / "checkpoints").glob("epoch=[23]*"):
        path.unlink()
    resumed = loggers("broken")
    folder = continue_runs(resumed)
    assert folder is not None
    run(resumed, 6, ckpt_path=newest_checkpoint(folder), resume=2)

    for run_dir in ("", "clients/7"):
        one, other = Path(straight[0].log_dir) / run_dir, Path(resumed[0].log_dir) / run_dir
        assert accumulated(other) == accumulated(one)
        assert sorted(raw_points(other)) == sorted(raw_points(one))
        assert [p for p in raw_points(other) if p[0] != "hp_metric"] == [
            p for p in raw_points(one) if p[0] != "hp_metric"
        ]
    assert rows(resumed[1]) == rows(straight[1])
    assert len(rows(resumed[1])) > 6
    assert len(event_files(Path(resumed[0].log_dir) / "clients" / "7")) == 1


def test_curves_of_clients_that_the_checkpoint_does_not_know_go(tmp_path: Path, raw_points: Any) -> None:
    logger, table = TensorBoardLogger(tmp_path, version=0), CSVLogger(tmp_path / "csv", version=0)
    recorder = ClientLogger()
    for step in range(4):
        recorder.log_metrics({"loss": 1.0}, step)
    records = recorder.take()
    ClientCurves([logger, table], True, [1, "1", 2]).write(0, {1: records, "1": records, 2: records})
    table.log_metrics({"client/loss": 0.5}, 1)  # the server's own, whatever its name
    table.log_metrics({"val": 0.5}, 3)
    cut_logs([logger, table], 3, {1: 3, "1": 1})
    folder = Path(logger.log_dir) / "clients"
    assert [len(raw_points(folder / name)) for name in ("1", "~1", "2")] == [3, 1, 0]
    kept = [(name, row["step"]) for row in rows(table) for name, value in row.items() if value and name != "step"]
    assert kept == [
        *(("client/1/loss", step) for step in "012"), ("client/~1/loss", "0"), ("client/loss", "1"),
    ]  # fmt: skip


def test_prefixed_names_of_clients_in_a_table(tmp_path: Path) -> None:
    table = CSVLogger(tmp_path, version=0, prefix="fl")
    recorder = ClientLogger()
    recorder.log_metrics({"loss": 1.0}, 5)
    ClientCurves([table], True, [1]).write(0, {1: recorder.take()})
    table.log_metrics({"val": 0.5}, 1)
    cut_logs([table], 2, {1: 6})
    assert [row["step"] for row in rows(table)] == ["5", "1"]
    cut_logs([table], 2, {1: 5})
    assert [row["step"] for row in rows(table)] == ["1"]


def test_what_the_new_process_says_again_is_not_said_twice(tmp_path: Path, raw_events: Callable[..., Any]) -> None:
    for session in range(3):
        logger = TensorBoardLogger(tmp_path, version=0)
        logger.log_hyperparams({"lr": 0.1})
        logger.experiment.add_custom_scalars({"c": {"x": ["Multiline", [str(session)]]}})
        if session == 0:
            logger.experiment.add_text("note", "only here", 0)
        else:
            cut_logs([logger], session * 10, {})
        logger.log_metrics({"a": 1.0}, session * 10)
        logger.finalize("success")
    tags = [value.tag for event in raw_events(Path(logger.log_dir)) for value in event.summary.value]
    assert sorted(tags) == sorted(
        ["note/text_summary", "hp_metric", "custom_scalars__config__", "a", "a", "a"]
        + [f"_hparams_/{part}" for part in ("experiment", "session_start_info", "session_end_info")]
    )


def test_resuming_at_round_zero_keeps_the_hyperparameters(tmp_path: Path, raw_points: Callable[..., Any]) -> None:
    logger = TensorBoardLogger(tmp_path, version=0)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"a": 1.0}, 0)
    cut_logs([logger], 0, {})
    logger.finalize("success")
    assert raw_points(Path(logger.log_dir)) == [("hp_metric", 0, -1.0)]


def test_server_runs_in_subfolders_are_cut_and_client_runs_are_not(
    tmp_path: Path, raw_points: Callable[..., Any]
) -> None:
    logger = TensorBoardLogger(tmp_path, version=0)
    for step in range(4):
        logger.log_metrics({"both": {"a": 1.0, "b": 2.0}}, step)  # type: ignore[dict-item]
    recorder = ClientLogger()
    recorder.log_metrics({"loss": 1.0}, 100)
    ClientCurves([logger], True).write(0, {7: recorder.take()})
    cut_logs([logger], 2, {7: 101})
    logger.finalize("success")
    assert [step for _, step, _ in raw_points(Path(logger.log_dir) / "both_a")] == [0, 1]
    assert [step for _, step, _ in raw_points(Path(logger.log_dir) / "clients" / "7")] == [100]


def test_files_of_one_second_are_read_in_the_order_of_their_writing(
    tmp_path: Path, accumulated: Callable[..., Any]
) -> None:
    for number, suffix in enumerate((".9", ".10")):  # as text, 10 comes before 9
        with SummaryWriter(str(tmp_path), filename_suffix=suffix) as writer:
            writer.add_scalar("a", 1.0, number)
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        newest.rename(tmp_path / f"events.out.tfevents.1700000000.host.1{suffix}")
    assert [step for step, _ in accumulated(tmp_path)["a"]] == [1, 0]
    assert truncate_events(tmp_path, 10) == 0
    assert [step for step, _ in accumulated(tmp_path)["a"]] == [0, 1]
    assert truncate_events(tmp_path, 1) == 1
    assert [step for step, _ in accumulated(tmp_path)["a"]] == [0]


def test_folders_without_events(tmp_path: Path) -> None:
    assert truncate_events(tmp_path, 3) == 0
    assert truncate_events(tmp_path / "nowhere", 3) == 0


# ---- Lightning's CSV log ------------------------------------------------------------------------------------------


def table_of(tmp_path: Path) -> CSVLogger:
    logger = CSVLogger(tmp_path, version=0)
    for step in range(4):
        logger.log_metrics({"b": step, "a": -step}, step)
    logger.save()
    checkpoint(Path(logger.log_dir) / "checkpoints" / "x.ckpt", age=0)
    return logger


def test_lightning_deletes_the_table_and_a_continued_run_does_not(tmp_path: Path) -> None:
    table_of(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logger = CSVLogger(tmp_path)
        continue_version(logger)
        logger.log_metrics({"b": 9}, 9)
        logger.log_metrics({"c": 10}, 10)  # a new column
        logger.save()
    assert said == []
    assert [(row["step"], row["a"], row["b"], row["c"]) for row in rows(logger)] == [
        ("0", "0", "0", ""), ("1", "-1", "1", ""), ("2", "-2", "2", ""), ("3", "-3", "3", ""),
        ("9", "", "9", ""), ("10", "", "", "10"),
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="will be deleted"):
        assert CSVLogger(tmp_path, version=0).experiment.metrics == []
    assert not (Path(logger.log_dir) / "metrics.csv").exists()


def test_a_half_written_row_and_columns_in_another_order(tmp_path: Path) -> None:
    old = table_of(tmp_path)
    path = Path(old.log_dir) / "metrics.csv"
    path.write_text("step,b,a\r\n0,1,2\r\n1,3,4\r\n2,5")
    logger = CSVLogger(tmp_path)
    continue_version(logger)
    logger.log_metrics({"a": 6.0, "b": 7.0}, 2)
    logger.save()
    assert [(row["step"], row["a"], row["b"]) for row in rows(logger)] == [
        ("0", "2", "1"), ("1", "4", "3"), ("2", "6.0", "7.0"),
    ]  # fmt: skip


def test_points_that_wait_in_memory_are_cut_and_flushed_too(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    for step in range(4):
        logger.log_metrics({"a": step}, step)
    assert not (Path(logger.log_dir) / "metrics.csv").exists()
    cut_logs([logger], 2, {})
    assert [row["step"] for row in rows(logger)] == ["0", "1"]
    logger.log_metrics({"a": 2}, 2)
    flush_logs([logger])
    assert [row["step"] for row in rows(logger)] == ["0", "1", "2"]


def test_flushed_points_are_on_disk(tmp_path: Path, raw_points: Callable[..., Any]) -> None:
    logger = TensorBoardLogger(tmp_path, version=0, max_queue=1000)
    flush_logs([logger, TensorBoardLogger(tmp_path, version=1)])
    assert not (tmp_path / "lightning_logs" / "version_1").exists()  # a logger that did not log is not opened
    for step in range(50):
        logger.log_metrics({"a": 1.0}, step)
    flush_logs([logger])
    written = len(raw_points(Path(logger.log_dir)))
    logger.finalize("success")
    assert written == 50
