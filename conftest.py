"""What every test and doctest of the house runs under.

It stands at the root because the doctests of the package need it as well: one thread, an empty working folder, seeded
generators, and a look afterwards at whether the test left something behind for the next one.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.utils.data import BatchSampler, DataLoader

ROOT = Path(__file__).parent

# Lightning sets these for itself, and a Trainer leaves some of them behind by design; they are put back silently.
LIGHTNING_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG",  # Trainer(deterministic=True)
    "GLOBAL_RANK",
    "GROUP_RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "PL_GLOBAL_SEED",  # seed_everything
    "PL_SEED_WORKERS",
    "RANK",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "WORLD_SIZE",
}
# Set at import time by libraries, once for the whole process.
LIBRARY_VARIABLES = {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TF2_BEHAVIOR", "TF_CPP_MIN_LOG_LEVEL", "MPLBACKEND"}
# Threads that a library starts once and keeps for the whole process.
LIBRARY_THREADS = ("tqdm_monitor", "TMonitor", "fsspecIO", "execnet")


def pytest_configure(config: pytest.Config) -> None:
    """Set what must hold before the first import of a test: threads, no display, the package for child processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "agg")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests that hold an address: parallel workers would disagree on which tests there are."""
    addressed = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if addressed:
        raise pytest.UsageError(f"Give the parameters of {addressed[0]} ids: an address is another in each run.")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the repository; tests run in an empty folder and find ``configs/`` through this."""
    return ROOT


@pytest.fixture(autouse=True)
def empty_working_folder(unchanged_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in its own folder, so that a relative ``logs/`` or ``checkpoints/`` stays out of the tree.

    It asks for ``unchanged_environment`` first, so that what a test sets by ``monkeypatch`` is undone before the look.
    """
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def seeded_generators() -> None:
    """Start every test from the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the legacy generator is the one that code under test may draw from)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unpatched_loaders() -> Iterator[None]:
    """Put back what Lightning leaves on torch's loaders when a user's ``train_dataloader`` raises."""
    yield
    for loader in (DataLoader, BatchSampler):
        for name in ("__init__", "__setattr__", "__delattr__"):
            if f"__old{name}" in vars(loader):
                setattr(loader, name, vars(loader)[f"__old{name}"])
                delattr(loader, f"__old{name}")


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Fail a test that leaves environment variables behind, and put back those that Lightning leaves by design."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    leaked = changed - LIGHTNING_VARIABLES - LIBRARY_VARIABLES - {"PYTEST_CURRENT_TEST"}
    assert not leaked, f"The test left environment variables changed: {sorted(leaked)}. Use monkeypatch.setenv."


@pytest.fixture(autouse=True)
def unchanged_switches() -> Iterator[None]:
    """Fail a test that changes torch's global switches; undo those that ``Trainer(deterministic=...)`` sets."""
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    before = {"threads": threads, "default dtype": dtype, "grad enabled": grad}
    after = {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad enabled": torch.is_grad_enabled(),
    }
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    torch.autograd.set_detect_anomaly(False)
    assert before == after, f"The test left torch's global switches changed: before {before}, after {after}."


@pytest.fixture(autouse=True)
def rank_zero_again() -> Iterator[None]:
    """End a process group that the test left open, and let this process be rank zero for the next test."""
    yield
    left_open = torch.distributed.is_available() and torch.distributed.is_initialized()
    if left_open:
        torch.distributed.destroy_process_group()
    rank_zero_only.rank = 0


@pytest.fixture(autouse=True)
def no_stray_threads() -> Iterator[None]:
    """Fail a test that leaves a thread running (a writer that was not closed, a worker that was not joined)."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5.0  # a thread that was told to end may need a moment
    while (stray := _stray_threads(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stray, f"The test left threads running: {[thread.name for thread in stray]}. Close or join them."


def _stray_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    now = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    return [thread for thread in now if not _known(thread)]


def _known(thread: threading.Thread) -> bool:
    return thread.name.startswith(LIBRARY_THREADS) or type(thread).__name__.startswith(LIBRARY_THREADS)
