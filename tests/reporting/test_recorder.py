from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from fl_lightning.reporting import ClientLogger


class Talkative(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        self.logger.experiment.add_histogram("weights", self.layer.weight, self.global_step)
        self.save_hyperparameters({"lr": 0.1})
        return loss


def fit(logger: Any) -> None:
    trainer = pl.Trainer(
        logger=logger, max_epochs=1, limit_train_batches=3, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(Talkative())


def test_a_real_trainer_is_recorded_without_its_epoch() -> None:
    logger = ClientLogger()
    fit(logger)
    scalars = [(arguments[0], arguments[2]) for method, arguments, _ in logger.records if method == "add_scalar"]
    assert scalars == [("loss", 0), ("loss", 1), ("loss", 2), ("epoch_loss", 2)]
    assert [named or arguments[2] for method, arguments, named in logger.records if method == "add_histogram"] == [
        0,
        1,
        2,
    ]
    assert len(logger.take()) == 7
    assert logger.records == []


def test_tensors_are_kept_as_they_were() -> None:
    # the optimizer changes weights in place: a record that kept the tensor would show three times the last one
    logger = ClientLogger()
    fit(logger)
    first, second, third = (arguments[1] for method, arguments, _ in logger.records if method == "add_histogram")
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not first.requires_grad


def test_a_client_that_nobody_logs_leaves_nothing() -> None:
    logger = ClientLogger(enabled=False)
    fit(logger)
    assert logger.records == []


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda w: w.add_scalar("a", 1.0, 3), 103),
        (lambda w: w.add_scalar("a", 1.0, global_step=3), 103),
        (lambda w: w.add_scalar("a", 1.0), 100),
        (lambda w: w.add_image("a", torch.zeros(1, 2, 2), 3), 103),
        (lambda w: w.add_text("a", "b", global_step=3), 103),
        (lambda w: w.add_embedding(torch.zeros(2, 2), global_step=3), 103),
        (lambda w: w.add_pr_curve("a", torch.ones(2), torch.ones(2), 3), 103),
    ],
)
def test_steps_of_the_experiment_count_on_from_earlier_rounds(call: Any, expected: int) -> None:
    logger = ClientLogger(step_offset=100)
    call(logger.experiment)
    ((_, arguments, named),) = logger.records
    assert named.get("global_step", arguments[-1]) == expected


def test_steps_of_log_metrics_are_taken_as_they_are() -> None:
    logger = ClientLogger(step_offset=100)
    logger.log_metrics({"a": torch.tensor(0.5), "b": {"x": 1, "y": 2}, "epoch": 1}, 105)
    assert logger.records == [
        ("add_scalar", ("a", 0.5, 105), {}),
        ("add_scalar", ("b/x", 1.0, 105), {}),
        ("add_scalar", ("b/y", 2.0, 105), {}),
    ]


def test_figures_become_pixels() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure(figsize=(1, 1), dpi=50)
    figure.subplots().plot([0, 1])
    logger = ClientLogger(step_offset=10)
    logger.experiment.add_figure("picture", figure, global_step=2)
    ((method, arguments, _),) = pickle.loads(pickle.dumps(logger.records))
    assert method == "add_image"
    assert arguments[1].shape == (3, 50, 50)
    assert arguments[1].min() < 255
    assert arguments[2] == 12


def test_records_travel_and_copies_are_independent() -> None:
    logger = ClientLogger(step_offset=1)
    logger.experiment.add_histogram("w", nn.Linear(2, 2).weight, 0)
    logger.log_metrics({"a": 1.0}, 0)
    twin = copy.deepcopy(logger)
    assert pickle.loads(pickle.dumps(logger.records))[1] == logger.records[1]
    twin.log_metrics({"b": 1.0}, 0)
    writer = copy.deepcopy(logger.experiment)  # a module that keeps its writer is copied with it
    writer.add_scalar("c", 1.0, 0)
    assert len(logger.records) == 2
    assert len(twin.records) == 3
    logger.clear()
    assert logger.records == []


def test_what_belongs_to_the_federation_is_ignored() -> None:
    logger = ClientLogger(save_dir="logs", name="digits", version=3)
    logger.log_hyperparams({"lr": 0.1}, {"hp_metric": 1.0})
    logger.log_graph(nn.Linear(1, 1))
    logger.experiment.add_hparams({"lr": 0.1}, {"m": 1.0})
    logger.experiment.add_graph(nn.Linear(1, 1))
    logger.experiment.flush()
    logger.save()
    logger.finalize("success")
    logger.after_save_checkpoint(None)  # type: ignore[arg-type]
    assert logger.records == []
    assert (logger.save_dir, logger.log_dir, logger.name, logger.version) == ("logs", "logs", "digits", 3)
    assert logger.experiment.get_logdir() == logger.experiment.log_dir == "logs"


def test_any_method_of_another_logger_is_recorded() -> None:
    logger = ClientLogger()
    logger.experiment.log_artifact("run", "file.txt", kind="x")
    assert logger.records == [("log_artifact", ("run", "file.txt"), {"kind": "x"})]
