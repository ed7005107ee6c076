"""``python -m benchmarks kernels``: which share of a round runs in torch's kernels, by torch's own profiler.

The share is the time of operators themselves, without that of the operators they call, over the seconds of the profiled
round. What is missing to one is the interpreter: Lightning's outer loop, autograd's bookkeeping, ``nn.Module``,
``vmap``, ``self.log`` and fl_lightning, and what the profiler itself costs for each operator.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Run
from benchmarks.ours import LOOPS, Clients, Module, federation, silence
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["kernels", "main"]

_WARM = 2


class _Profiled(Callback):
    """Profiles the last round."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == _WARM:
            self.profile.start()
            self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += time.perf_counter()
        self.profile.stop()


def kernels(workload: Workload, loop: str) -> tuple[float, dict[str, float]]:
    """Return the seconds of a profiled round, and those of each operator itself, the longest first."""
    silence()
    profiled = _Profiled()
    with TemporaryDirectory() as folder:
        trainer = federation(workload, _WARM + 1, Run(), folder, **LOOPS[loop])
        trainer.callbacks.append(profiled)
        trainer.fit(Module(workload.model(), workload.lr), datamodule=Clients(workload))
    own = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.profile.key_averages()}
    operators = sorted(((s, name) for name, s in own.items() if name.startswith("aten::")), reverse=True)
    return profiled.seconds, {name.removeprefix("aten::"): seconds for seconds, name in operators}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W1", "W2"])
    parser.add_argument("--loops", nargs="+", choices=sorted(LOOPS), default=["lean", "auto"])
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| workload | loop | in kernels | the longest |\n|---|---|---|---|")
    for name in parsed.workloads:
        for loop in parsed.loops:
            seconds, own = kernels(WORKLOADS[name], loop)
            longest = ", ".join(f"{op} {own[op] / seconds:.0%}" for op in list(own)[:6])
            print(f"| {name} | {loop} | {sum(own.values()) / seconds:.0%} | {longest} |", flush=True)
