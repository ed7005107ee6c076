"""Start adapters in the environments of their libraries; a library that is not installed is skipped with one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.contenders import Contender, Run
from benchmarks.program import sizes_of
from benchmarks.workloads import Workload

__all__ = ["PEERS", "ROOT", "last_run", "peers"]

PEERS: dict[str, Callable[[int], list[str]] | None] = {
    "pfl": lambda processes: ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"],
    "blazefl": lambda processes: [],  # it starts threads of its own
    "fluke": None,  # it is parallel over GPUs only
    "flower": lambda processes: [],  # it starts Ray
}
"""What stands between Python and the adapter where a library works in several processes; ``None`` if it does not."""

ROOT = Path(__file__).resolve().parents[2]


def peers(folder: Path | None, processes: int = 1) -> tuple[dict[str, Contender], list[str]]:
    """Return the peers whose environments are in a folder, and a line for each that is not there.

    Args:
        folder: holds one virtual environment a peer, named as the peer; docs/performance.md says how to make them.
        processes: in how many processes a peer works, or threads where it has those instead.
    """
    found: dict[str, Contender] = {}
    missing = []
    for name, launcher in PEERS.items():
        python = folder / name / "bin" / "python" if folder is not None else None
        if python is None or not python.exists():
            missing.append(f"{name}: skipped, no environment (--peers FOLDER with FOLDER/{name}/bin/python)")
        elif processes > 1 and launcher is None:
            missing.append(f"{name}: skipped, it works in one process")
        else:
            before = launcher(processes) if launcher is not None and processes > 1 else []
            found[name] = partial(_run, command=[str(python), *before], name=name, processes=processes)
    return found, missing


def _run(workload: Workload, rounds: int, command: list[str], name: str, processes: int) -> Run:
    adapter = ["-m", f"benchmarks.peers.{name}_adapter", *sizes_of(workload, rounds, processes)]
    return last_run([*command, *adapter], f"{name} on {workload.name}")


def last_run(command: list[str], name: str) -> Run:
    """Run a program on one thread a process and read the run that it prints last.

    Raises:
        RuntimeError: when the program fails; the end of what it wrote is in the message.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return Run(**json.loads(done.stdout.strip().splitlines()[-1]))
