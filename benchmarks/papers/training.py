"""What all reproductions share: a quiet federation with curves in TensorBoard, and the curves as a picture."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import Algorithm

__all__ = ["WithoutTrainingMetrics", "add_resume", "draw", "federate", "silence"]


class WithoutTrainingMetrics(pl.LightningModule):
    """Trains a classifier without logging each step: the papers report only what the server evaluates."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self(inputs), labels)


def federate(
    module: pl.LightningModule,
    data: Any,
    algorithm: Algorithm,
    folder: Path,
    label: str,
    seed: int,
    resumes: bool = False,
    callbacks: Sequence[Callback] = (),
    **arguments: Any,
) -> FederatedTrainer:
    """Train from a seed and return the trainer, whose ``round_history`` is the curve.

    Args:
        module: its weights are drawn anew from the seed, so that all algorithms start from the same model.
        data: the clients.
        algorithm: what is reproduced.
        folder: of the experiment; the curve goes into ``folder/label``.
        label: names the run in TensorBoard.
        seed: of cohorts, weights and batches.
        resumes: keep a checkpoint of the last round in the curve's folder, and go on from one that is there: an
            experiment of hours may be stopped at any time.
        callbacks: of the federation.
        arguments: of ``FederatedTrainer``.
    """
    lightning.seed_everything(seed, verbose=False)
    module.apply(_draw_again)
    checkpoints = folder / label / "checkpoints"
    keeper = [ModelCheckpoint(dirpath=checkpoints)] if resumes else []
    trainer = FederatedTrainer(
        algorithm=algorithm,
        accelerator="cpu",
        num_threads=1,
        logger=TensorBoardLogger(folder.parent, name=folder.name, version=label),
        log_clients=False,
        enable_checkpointing=resumes,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, *keeper],
        **arguments,
    )
    trainer.fit(module, data, ckpt_path="last" if resumes and any(checkpoints.glob("*.ckpt")) else None)
    return trainer


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Let an experiment of hours go on where it was stopped."""
    parser.add_argument("--resume", action="store_true", help="keep checkpoints, and go on from those of a stopped run")


def _draw_again(part: torch.nn.Module) -> None:
    reset = getattr(part, "reset_parameters", None)
    if callable(reset):
        reset()


def silence() -> None:
    """Keep Lightning's banners out of the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def draw(
    path: Path, curves: Mapping[str, Sequence[float]], ylabel: str, title: str, level: float | None = None
) -> None:
    """Write curves over rounds as a PNG.

    Args:
        path: of the picture.
        curves: values of every round, by legend.
        ylabel: what the values are.
        title: of the picture.
        level: a line across, where a published target lies.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=label, linewidth=1.2)
    if level is not None:
        axes.axhline(level, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="round", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
