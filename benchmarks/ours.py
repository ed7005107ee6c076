"""fl_lightning with an ordinary LightningModule, in each of its loops; as a program, in one process or several."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.contenders import Contender, Run, Stopwatch
from benchmarks.program import run_program
from benchmarks.workloads import Workload
from fl_lightning import FederatedTrainer
from fl_lightning.aggregation import gather_objects

__all__ = ["LOOPS", "Clients", "Module", "Rounds", "federation", "ours", "silence"]

LOOPS: dict[str, dict[str, Any]] = {
    "lightning": {"local_loop": "lightning"},
    "lean": {"local_loop": "lean", "group_size": 1},
    "auto": {"local_loop": "auto"},
    "channels_last": {"local_loop": "auto", "memory_format": "channels_last"},
}
"""Arguments of FederatedTrainer by contender; ``auto`` is what a user gets."""


class Module(pl.LightningModule):
    """The user's module: a loss and an accuracy are logged."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        outputs = self.network(inputs)
        loss = cross_entropy(outputs, labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("acc", (outputs.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Clients:
    """The user's data: a loader for each client, made when it is asked for.

    Args:
        workload: says how many.
        num_workers: worker processes of each loader.
        data_set: makes a data set of a client's tensors; only a ``TensorDataset`` is read without its loader.
    """

    def __init__(
        self, workload: Workload, num_workers: int = 0, data_set: Callable[..., Dataset[Any]] = TensorDataset
    ) -> None:
        self.workload = workload
        self.num_workers = num_workers
        self.data_set = data_set
        self.inputs, self.labels = workload.data()

    def client_ids(self) -> range:
        return range(self.workload.num_clients)

    def client_size(self, client_id: int) -> int:
        return self.workload.examples

    def client_dataloader(self, client_id: int) -> DataLoader[Any]:
        size = self.workload.examples
        part = slice(client_id * size, (client_id + 1) * size)
        data = self.data_set(self.inputs[part], self.labels[part])
        return DataLoader(data, self.workload.batch_size, shuffle=True, num_workers=self.num_workers)


class Rounds(Callback):
    """Laps from the start of one round to the start of the next, the outer Trainer's own work included."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._clock: Stopwatch | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap()

    def _lap(self) -> None:
        if self._clock is None:
            self._clock = Stopwatch()
        else:
            self._clock.lap(self.run)


def silence() -> None:
    """Keep Lightning's banners out of the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def federation(workload: Workload, rounds: int, run: Run, folder: str | Path, **arguments: Any) -> FederatedTrainer:
    """Return the trainer of a contender; loggers and checkpoints are off unless the arguments say otherwise."""
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    return FederatedTrainer(
        max_rounds=rounds,
        clients_per_round=workload.cohort,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Rounds(run)],
        **{**defaults, **arguments},
    )


def ours(**arguments: Any) -> Contender:
    """Return fl_lightning as a contender."""
    return partial(_run, arguments=arguments)


def _run(workload: Workload, rounds: int, arguments: dict[str, Any]) -> Run:
    run = _of_this_rank(workload, rounds, 1, arguments)
    assert run is not None
    return run


def _of_this_rank(workload: Workload, rounds: int, processes: int, arguments: dict[str, Any]) -> Run | None:
    silence()
    run = Run()
    group = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
    with TemporaryDirectory() as folder:
        trainer = federation(workload, rounds, run, folder, **group, **arguments)
        trainer.fit(Module(workload.model(), workload.lr), datamodule=Clients(workload))
    run.steps = [report.num_steps for report in trainer.round_history]
    run.losses = [report.metrics["loss"] for report in trainer.round_history]
    run.accuracies = [report.metrics["acc"] for report in trainer.round_history]
    # a round is as long as that of the process with the most to do, when each has a core to itself
    run.cpu = [max(ranks) for ranks in zip(*gather_objects(run.cpu), strict=True)]
    return run if trainer.is_global_zero else None


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--loop", choices=sorted(LOOPS), default="auto")
    chosen, rest = parser.parse_known_args()
    pl.seed_everything(0, verbose=False)  # cohorts and losses of one process are then those of two
    run_program(partial(_of_this_rank, arguments=LOOPS[chosen.loop]), rest)


if __name__ == "__main__":
    main()
