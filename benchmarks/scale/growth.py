"""What must not grow: with the population, with rounds, with the cohort."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from benchmarks.ours import Module
from benchmarks.scale.federations import QUIET, Classifier, Same, Samples, fit, fit_plain, peak_mib

__all__ = ["large", "population", "resume", "rounds"]


def _logistic() -> Classifier:
    return Classifier(nn.Linear(60, 10), 0.1)


def population(num_clients: int) -> dict[str, float]:
    """Start and rounds of a population, with memory on disk and the curves of ten clients."""
    samples = Samples()
    with TemporaryDirectory() as folder:
        fit(
            Same(num_clients, 50, 60), _logistic(), folder, max_rounds=12, clients_per_round=40,
            client_state="keep", log_clients=10, callbacks=[samples],
        )  # fmt: skip
    return {
        "clients": num_clients, "ms_to_first_round": 1e3 * samples.seconds[0],
        "cpu_ms_to_first_round": 1e3 * samples.cpu[0], **samples.round_ms(), "peak_mib": peak_mib(),
    }  # fmt: skip


def rounds(count: int) -> dict[str, float]:
    """Memory, files, checkpoint and the seconds of a round after some rounds with kept client state."""
    samples = Samples()
    with TemporaryDirectory() as folder:
        fit(
            Same(20, 50, 60), _logistic(), folder, max_rounds=count, clients_per_round=10,
            client_state="keep", log_clients=5, callbacks=[samples],
        )  # fmt: skip
        memory, (checkpoint,) = list(Path(folder).rglob("*.memory")), Path(folder).rglob("*.ckpt")
        size = checkpoint.stat().st_size
    warm = min(20, count // 2)
    return {
        "rounds": count, "resident_mib_early": samples.resident[warm], "resident_mib_late": samples.resident[-1],
        "memory_files": len(memory), "checkpoint_bytes": size,
        "round_cpu_ms_early": 1e3 * median(samples.cpu[2 : warm + 1]),
        "round_cpu_ms_late": 1e3 * median(samples.cpu[-warm:]),
    }  # fmt: skip


def large(num_clients: int, width: int = 4950) -> dict[str, float]:
    """A round of a model of 25 million parameters (100 MB), one step a client; 0 trains the plain module."""
    network = nn.Sequential(nn.Linear(60, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    module = Module(network, 0.01)
    data = Same(max(num_clients, 1), 10, 60)
    begin, cpu = time.perf_counter(), time.process_time()
    with TemporaryDirectory() as folder:
        if num_clients:
            fit(data, module, folder, max_rounds=1, **QUIET)
        else:
            fit_plain(data.client_dataloader(0), module, folder, max_epochs=1, **QUIET)
    model = sum(p.numel() * 4 for p in network.parameters()) / 2**20
    return {
        "clients": num_clients, "model_mib": model, "peak_mib": peak_mib(),
        "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip


def resume(count: int) -> dict[str, float]:
    """Milliseconds from the making of the trainer to the first round after a resume, and to that of a new run."""
    arguments: dict[str, Any] = {"clients_per_round": 10, "client_state": "keep"}
    with TemporaryDirectory() as folder:
        new = Samples()
        trainer = fit(Same(100, 50, 60), _logistic(), folder, max_rounds=count, callbacks=[new], **arguments)
        path = trainer.checkpoint_callback.best_model_path
        again = Samples()
        fit(Same(100, 50, 60), _logistic(), folder, path, max_rounds=count + 2, callbacks=[again], **arguments)
    return {
        "rounds": count, "ms_to_first_round": 1e3 * new.seconds[0], "ms_to_resume": 1e3 * again.seconds[0],
        "cpu_ms_to_resume": 1e3 * again.cpu[0],
    }  # fmt: skip
