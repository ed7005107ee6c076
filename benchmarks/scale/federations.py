"""Small federations to be measured, and what is read off them."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ours import Module, silence
from fl_lightning import FederatedTrainer
from fl_lightning.engines import InProcessEngine
from fl_lightning.local.client import ClientResult
from fl_lightning.types import ClientTask

__all__ = ["QUIET", "Classifier", "Same", "Samples", "TimedEngine", "fit", "fit_plain", "peak_mib"]

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
"""Neither curves nor checkpoints."""

_DEFAULTS: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Same:
    """Any number of clients that all have the same examples."""

    def __init__(self, num_clients: int, examples: int, features: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.ids = range(num_clients)
        self.data = TensorDataset(torch.randn(examples, features, generator=draw), torch.zeros(examples).long())

    def client_ids(self) -> range:
        return self.ids

    def client_size(self, client_id: int) -> int:
        return len(self.data)

    def client_dataloader(self, client_id: int) -> DataLoader[Any]:
        return DataLoader(self.data, 10, shuffle=True)

    def client_eval_dataloader(self, client_id: int) -> DataLoader[Any]:
        return DataLoader(self.data, 50)


class Classifier(Module):
    """The module of the benchmarks with a validation step and momentum to be kept."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Samples(Callback):
    """Resident memory, wall seconds and CPU seconds of each round; the first entry is the time to the first round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.resident: list[float] = []
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(now - self._begin)
        self.cpu.append(cpu - self._cpu_begin)
        self._begin, self._cpu_begin = now, cpu
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * resource.getpagesize() / 2**20)

    def round_ms(self, first: int = 2) -> dict[str, float]:
        """Return the median round in wall and CPU milliseconds, without the first rounds, which warm up."""
        return {"round_ms": 1e3 * median(self.seconds[first:]), "round_cpu_ms": 1e3 * median(self.cpu[first:])}


class TimedEngine(InProcessEngine):
    """The ordinary engine, and the CPU seconds that clients took in it."""

    def __init__(self) -> None:
        self.cpu = 0.0

    def session(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        results = super().session(tasks)
        while True:
            begin = time.process_time()
            result = next(results, None)
            self.cpu += time.process_time() - begin
            if result is None:
                return
            yield result


def fit(data: Any, module: pl.LightningModule, folder: str | Path, ckpt_path: Any = None, **arguments: Any) -> Any:
    """Run a federation without bars and return its trainer."""
    silence()
    trainer = FederatedTrainer(default_root_dir=folder, **{**_DEFAULTS, **arguments})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def fit_plain(loader: DataLoader[Any], module: pl.LightningModule, folder: str | Path, **arguments: Any) -> None:
    """Train one client's data in Lightning's own Trainer."""
    silence()
    pl.Trainer(default_root_dir=folder, **{**_DEFAULTS, **arguments}).fit(module, loader)


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
