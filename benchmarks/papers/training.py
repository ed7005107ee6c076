"""What all reproductions share: a quiet federation with curves in TensorBoard, and the curves as a picture."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import Algorithm

__all__ = ["WithoutTrainingMetrics", "draw", "federate", "silence"]


class WithoutTrainingMetrics(pl.LightningModule):
    """Trains a classifier without logging each step: the papers report only what the server evaluates."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self(inputs), labels)


def federate(
    module: pl.LightningModule, data: Any, algorithm: Algorithm, folder: Path, label: str, seed: int, **arguments: Any
) -> FederatedTrainer:
    """Train from a seed and return the trainer, whose ``round_history`` is the curve.

    Args:
        module: its weights are drawn anew from the seed, so that all algorithms start from the same model.
        data: the clients.
        algorithm: what is reproduced.
        folder: of the experiment; the curve goes into ``folder/label``.
        label: names the run in TensorBoard.
        seed: of cohorts, weights and batches.
        arguments: of ``FederatedTrainer``.
    """
    lightning.seed_everything(seed, verbose=False)
    module.apply(_draw_again)
    trainer = FederatedTrainer(
        algorithm=algorithm,
        accelerator="cpu",
        num_threads=1,
        logger=TensorBoardLogger(folder.parent, name=folder.name, version=label),
        log_clients=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, data)
    return trainer


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
