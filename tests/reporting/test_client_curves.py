from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.loggers
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from fl_lightning.reporting import ClientCurves, ClientLogger, Record


def test_automatic_keeps_the_first_that_take_part_of_a_large_population(tmp_path: Path) -> None:
    curves = ClientCurves([TensorBoardLogger(tmp_path)], "auto", range(10**6))
    assert not curves.wants(999_999)
    curves.join([999_999, 5])
    curves.join(range(1000, 2000))
    curves.update_population(range(10**6 + 1))
    kept = [curves.wants(client) for client in (999_999, 5, 0, 1000, 1097, 1098)]
    assert kept == [True, True, False, True, True, False]


def points(client: Any, start: int, count: int) -> list[Record]:
    logger = ClientLogger()
    for step in range(start, start + count):
        logger.log_metrics({"train_loss": float(step), "train_acc": 0.5, "epoch": 0}, step)
    return logger.take()


@pytest.fixture
def logger(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="run", version=0)


def folder(logger: TensorBoardLogger, name: str) -> Path:
    return Path(logger.log_dir) / "clients" / name


def test_a_client_has_a_run_with_its_own_tags_and_steps(
    logger: TensorBoardLogger, raw_points: Callable[..., Any], accumulated: Callable[..., Any]
) -> None:
    curves = ClientCurves([logger], "auto", [7, "site-a", "a/b"])
    curves.write(0, {7: points(7, 0, 3), "site-a": points("site-a", 0, 2), "a/b": points("a/b", 0, 1)})
    curves.write(1, {7: points(7, 3, 2)})
    assert accumulated(folder(logger, "7")) == {
        "train_loss": [(step, float(step)) for step in range(5)],
        "train_acc": [(step, 0.5) for step in range(5)],
    }
    assert [step for tag, step, _ in raw_points(folder(logger, "7")) if tag == "train_loss"] == [0, 1, 2, 3, 4]
    assert len(raw_points(folder(logger, "site-a"))) == 4
    assert len(raw_points(folder(logger, "a%2Fb"))) == 2


def test_a_thousand_clients_have_a_file_each_and_none_is_open(logger: TensorBoardLogger, raw_points: Any) -> None:
    curves = ClientCurves([logger], True, range(1000))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for round in range(2):
        curves.write(round, {client: points(client, round, 1) for client in range(1000)})
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before
    files = list(Path(logger.log_dir).rglob("*tfevents*"))
    assert len(files) == 1000
    assert [step for tag, step, _ in raw_points(folder(logger, "999")) if tag == "train_loss"] == [0, 1]


def test_a_later_process_goes_on_in_the_same_file_behind_a_torn_record(
    logger: TensorBoardLogger, raw_points: Callable[..., Any]
) -> None:
    ClientCurves([logger], True).write(0, {7: points(7, 0, 3)})
    (file,) = folder(logger, "7").iterdir()
    whole = file.read_bytes()
    for cut in (1, 5, 15, 30):  # inside the footer, the payload, the header
        file.write_bytes(whole[:-cut])
        ClientCurves([logger], True).write(1, {7: points(7, 3, 1)})
        assert raw_points(folder(logger, "7"))[-2:] == [("train_loss", 3, 3.0), ("train_acc", 3, 0.5)]
        assert len(raw_points(folder(logger, "7"))) == 7  # six before, one of them torn, two after
    assert len(list(folder(logger, "7").iterdir())) == 1


def test_what_a_module_draws_is_in_its_client_s_run(logger: TensorBoardLogger, raw_events: Callable[..., Any]) -> None:
    recorder = ClientLogger(step_offset=50)
    recorder.experiment.add_histogram("weights", torch.arange(10.0), 1)
    recorder.experiment.add_image("sample", torch.rand(3, 4, 4), 2)
    recorder.experiment.add_text("note", "hello", 3)
    recorder.experiment.add_scalars("both", {"a": 1.0, "b": 2.0}, 4)
    recorder.experiment.add_embedding(torch.rand(3, 2), global_step=5, tag="space")
    recorder.experiment.log_artifact("not for TensorBoard")
    curves = ClientCurves([logger], True)
    curves.write(0, {7: recorder.take(), 8: points(8, 0, 1)})
    seen = {(value.tag, event.step) for event in raw_events(folder(logger, "7")) for value in event.summary.value}
    assert seen == {("weights", 51), ("sample", 52), ("note/text_summary", 53), ("both/a", 54), ("both/b", 54)}
    assert "space" in (folder(logger, "7") / "projector_config.pbtxt").read_text()
    assert [path.name for path in folder(logger, "8").iterdir()] == ["events.out.tfevents.0000000000.client"]


def test_only_the_wanted_are_written(logger: TensorBoardLogger) -> None:
    ClientCurves([logger], [7], [7, 8]).write(0, {7: points(7, 0, 1), 8: points(8, 0, 1)})
    assert [path.name for path in (Path(logger.log_dir) / "clients").iterdir()] == ["7"]


def test_a_bad_call_names_client_and_round(logger: TensorBoardLogger) -> None:
    recorder = ClientLogger()
    recorder.experiment.add_image("sample", "no image", 2)
    with pytest.raises(RuntimeError, match="Client 7 logged something in round 3 that TensorBoard does not take"):
        ClientCurves([logger], True).write(3, {7: recorder.take()})


def test_the_old_package_s_logger_is_a_tensorboard_logger(tmp_path: Path, raw_points: Callable[..., Any]) -> None:
    logger: Any = pytorch_lightning.loggers.TensorBoardLogger(str(tmp_path), name="run", version=0)
    ClientCurves([logger], True).write(0, {7: points(7, 0, 1)})
    assert len(raw_points(folder(logger, "7"))) == 2


class Store(Logger):
    """Any other logger."""

    name, version = "store", 0

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


def test_other_loggers_get_names_in_their_one_run() -> None:
    store = Store()
    ClientCurves([store], "auto", [7, "a/b"]).write(0, {7: points(7, 4, 2), "a/b": points("a/b", 0, 1)})
    assert store.rows == [
        ({"client/7/train_loss": 4.0, "client/7/train_acc": 0.5}, 4),
        ({"client/7/train_loss": 5.0, "client/7/train_acc": 0.5}, 5),
        ({"client/a%2Fb/train_loss": 0.0, "client/a%2Fb/train_acc": 0.5}, 0),
    ]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(True, set(range(100))), ("*9", set(range(9, 1000, 10))), (list(range(500, 700)), set(range(500, 600)))],
)
def test_other_loggers_get_a_hundred_clients_at_most(rule: Any, expected: set[int]) -> None:
    store = Store()
    curves = ClientCurves([store], rule, range(1000))
    curves.write(0, {client: points(client, 0, 1) for client in reversed(range(1000))})
    names = {name for metrics, _ in store.rows for name in metrics}
    assert names == {f"client/{client}/{name}" for client in expected for name in ("train_loss", "train_acc")}


def test_csv_and_tensorboard_side_by_side(tmp_path: Path, logger: TensorBoardLogger, accumulated: Any) -> None:
    table = CSVLogger(tmp_path, name="table", version=0)
    ClientCurves([logger, table], True, [7]).write(0, {7: points(7, 0, 2)})
    table.save()
    with open(Path(table.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["client/7/train_loss"]) for row in rows] == [("0", "0.0"), ("1", "1.0")]
    assert accumulated(folder(logger, "7"))["train_loss"] == [(0, 0.0), (1, 1.0)]


def test_a_remote_folder_gets_names_in_the_one_run() -> None:
    logger = TensorBoardLogger("memory://logs", name="run", version=0)
    written: list[Any] = []
    logger.log_metrics = lambda metrics, step=None: written.append((metrics, step))  # type: ignore[method-assign]
    ClientCurves([logger], True, [7]).write(0, {7: points(7, 0, 1)})
    assert written == [({"client/7/train_loss": 0.0, "client/7/train_acc": 0.5}, 0)]
    assert not Path("memory:").exists()
