"""What must not grow: ``python -m benchmarks.scale population|rounds|large|resume|evaluation|workers|round|client``.

Every measurement runs in a process of its own, so that a peak of memory belongs to it alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contenders import Run
from benchmarks.ours import Clients, Module, federation, silence
from benchmarks.workloads import WORKLOADS
from fl_lightning import FederatedTrainer

__all__ = ["PROGRAMS"]


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
    """Resident memory and the seconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.resident: list[float] = []
        self._begin = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._begin)
        self._begin = now
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * resource.getpagesize() / 2**20)


def _fit(data: Any, module: pl.LightningModule, folder: str, ckpt_path: Any = None, **arguments: Any) -> Any:
    silence()
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    trainer = FederatedTrainer(**{**defaults, **arguments})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def population(num_clients: int) -> dict[str, float]:
    """Start and rounds of a population, with memory on disk and the curves of ten clients."""
    begin = time.perf_counter()
    samples = Samples()
    with TemporaryDirectory() as folder:
        _fit(
            Same(num_clients, 50, 60), Classifier(nn.Linear(60, 10), 0.1), folder, max_rounds=8, clients_per_round=40,
            client_state="keep", log_clients=10, callbacks=[samples],
        )  # fmt: skip
    return {
        "clients": num_clients, "seconds_to_first_round": samples.seconds[0],
        "seconds_a_round": median(samples.seconds[2:]),
        "seconds": time.perf_counter() - begin, "peak_mib": _peak(),
    }  # fmt: skip


def rounds(count: int) -> dict[str, float]:
    """Memory, files and checkpoint after some rounds with kept client state."""
    samples = Samples()
    with TemporaryDirectory() as folder:
        _fit(
            Same(20, 50, 60), Classifier(nn.Linear(60, 10), 0.1), folder, max_rounds=count, clients_per_round=10,
            client_state="keep", log_clients=5, callbacks=[samples],
        )  # fmt: skip
        memory, (checkpoint,) = list(Path(folder).rglob("*.memory")), Path(folder).rglob("*.ckpt")
        size = checkpoint.stat().st_size
    warm = min(20, count // 2)
    return {
        "rounds": count, "resident_mib_early": samples.resident[warm], "resident_mib_late": samples.resident[-1],
        "memory_files": len(memory), "checkpoint_bytes": size,
        "seconds_a_round_early": median(samples.seconds[2 : warm + 1]),
        "seconds_a_round_late": median(samples.seconds[-warm:]),
    }  # fmt: skip


def large(num_clients: int) -> dict[str, float]:
    """A round of a model of 25 million parameters (100 MB), one step a client; 0 trains the plain module."""
    network = nn.Sequential(nn.Linear(60, 5000), nn.ReLU(), nn.Linear(5000, 4900), nn.ReLU(), nn.Linear(4900, 10))
    module = Module(network, 0.01)
    data = Same(max(num_clients, 1), 10, 60)
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
        if num_clients:
            _fit(data, module, folder, max_rounds=1, **quiet)
        else:
            silence()
            plain = pl.Trainer(
                max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=folder, **quiet,
            )  # fmt: skip
            plain.fit(module, data.client_dataloader(0))
    model = sum(p.numel() * 4 for p in network.parameters()) / 2**20
    return {"clients": num_clients, "model_mib": model, "peak_mib": _peak(), "seconds": time.perf_counter() - begin}


def resume(count: int) -> dict[str, float]:
    """Seconds from the call of ``fit(ckpt_path=...)`` to the first round after it."""
    with TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {"clients_per_round": 10, "client_state": "keep"}
        trainer = _fit(Same(100, 50, 60), Classifier(nn.Linear(60, 10), 0.1), folder, max_rounds=count, **arguments)
        path = trainer.checkpoint_callback.best_model_path
        samples = Samples()
        _fit(
            Same(100, 50, 60), Classifier(nn.Linear(60, 10), 0.1), folder, path, max_rounds=count + 2,
            callbacks=[samples], **arguments,
        )  # fmt: skip
    return {"rounds": count, "seconds_to_resume": samples.seconds[0]}


def evaluation(num_clients: int) -> dict[str, float]:
    """What ``evaluate_clients=True`` adds to a round."""
    found = []
    for evaluate in (False, True):
        samples = Samples()
        with TemporaryDirectory() as folder:
            _fit(
                Same(num_clients, 50, 60), Classifier(nn.Linear(60, 10), 0.1), folder, max_rounds=4,
                clients_per_round=10, evaluate_clients=evaluate, callbacks=[samples], logger=False,
            )  # fmt: skip
        found.append(median(samples.seconds[2:]))
    return {"clients": num_clients, "seconds_a_client": (found[1] - found[0]) / num_clients}


def workers(num_workers: int) -> dict[str, float]:
    """Clients a second when their loaders have worker processes (W1's data, 20 clients a round)."""
    run, workload = Run(), WORKLOADS["W1"]
    silence()
    with TemporaryDirectory() as folder:
        trainer = federation(workload, 3, run, folder, clients_per_round=20)
        trainer.fit(Module(workload.model(), workload.lr), datamodule=Clients(workload, num_workers))
    return {"workers": num_workers, "clients_a_second": 20 / median(run.wall[1:])}


def outer(count: int) -> dict[str, float]:
    """Milliseconds of a round with TensorBoard and the default checkpoint beside those of its one client."""
    samples = Samples()
    with TemporaryDirectory() as folder:
        trainer = _fit(Same(1, 10, 60), Module(nn.Linear(60, 10), 0.1), folder, max_rounds=count, callbacks=[samples])
    inside = median(report.seconds for report in trainer.round_history[5:])
    return {"rounds": count, "outer_ms": 1e3 * (median(samples.seconds[5:]) - inside), "client_ms": 1e3 * inside}


def client(steps: int) -> dict[str, float]:
    """Milliseconds of a client in LightningLoop by its number of steps (curves off)."""
    found = {}
    for loop in ("lightning", "lean"):
        samples = Samples()
        with TemporaryDirectory() as folder:
            _fit(
                Same(20, 10 * steps, 60), Module(nn.Linear(60, 10), 0.1), folder, max_rounds=8, local_loop=loop,
                group_size=1, logger=False, enable_checkpointing=False, callbacks=[samples],
            )  # fmt: skip
        found[f"{loop}_ms"] = 1e3 * min(samples.seconds[2:]) / 20
    return {"steps": steps, **found}


PROGRAMS: dict[str, tuple[Callable[[int], dict[str, float]], tuple[int, ...]]] = {
    "population": (population, (1_000, 1_000_000)),
    "rounds": (rounds, (50, 500)),
    "large": (large, (0, 8, 1000)),
    "resume": (resume, (5, 50)),
    "evaluation": (evaluation, (1000,)),
    "workers": (workers, (0, 2)),
    "round": (outer, (50,)),
    "client": (client, (1, 21)),
}
"""A measurement, and the sizes at which it is made."""


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _measure(name: str, size: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(PROGRAMS[name][0](size))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("programs", nargs="*", default=[name for name in PROGRAMS if name != "large"])
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of the program's own")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in arguments.programs:
        for size in arguments.sizes or PROGRAMS[name][1]:
            ours, theirs = context.Pipe()
            process = context.Process(target=_measure, args=(name, size, theirs))
            process.start()
            theirs.close()
            values = {key: round(value, 5) for key, value in ours.recv().items()}
            process.join()
            sys.stdout.write(f"{name}: {json.dumps(values)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
