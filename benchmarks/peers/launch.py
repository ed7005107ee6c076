"""Start adapters in the environments of their libraries; a library that is not installed is skipped with one line."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path

from benchmarks.contenders import Contender, Run
from benchmarks.workloads import Workload

__all__ = ["PEERS", "peers"]

PEERS = ("pfl", "blazefl", "fluke", "flower")
ROOT = Path(__file__).resolve().parents[2]


def peers(folder: Path | None) -> tuple[dict[str, Contender], list[str]]:
    """Return the peers whose environments are in a folder, and a line for each that is not there.

    Args:
        folder: holds one virtual environment a peer, named as the peer; docs/performance.md says how to make them.
    """
    found: dict[str, Contender] = {}
    missing = []
    for name in PEERS:
        python = folder / name / "bin" / "python" if folder is not None else None
        adapter = Path(__file__).with_name(f"{name}_adapter.py")
        if python is None or not python.exists():
            missing.append(f"{name}: skipped, no environment (--peers FOLDER with FOLDER/{name}/bin/python)")
        elif not adapter.exists():
            missing.append(f"{name}: skipped, no adapter")
        else:
            found[name] = partial(_run, python=python, name=name)
    return found, missing


def _run(workload: Workload, rounds: int, python: Path, name: str) -> Run:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", f"benchmarks.peers.{name}_adapter", workload.name, str(rounds)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed on {workload.name}:\n{done.stderr[-2000:]}")
    return Run(**json.loads(done.stdout.strip().splitlines()[-1]))
