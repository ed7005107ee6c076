"""The fixtures of ``conftest.py`` really fail a test that leaves something behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

LEAKING = """
import os, random, threading, time
from pathlib import Path
import numpy, torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

def test_leaks_a_variable():
    os.environ["LEFT_BEHIND"] = "1"

def test_is_clean_again():
    assert "LEFT_BEHIND" not in os.environ and "PL_GLOBAL_SEED" not in os.environ

def test_may_use_monkeypatch(monkeypatch):
    monkeypatch.setenv("UNDONE", "1")

def test_leaks_a_thread():
    threading.Thread(target=time.sleep, args=(8,), daemon=True).start()

def test_joins_its_thread():
    thread = threading.Thread(target=time.sleep, args=(0.05,))
    thread.start()
    thread.join()

def test_leaks_a_number_of_threads():
    torch.set_num_threads(2)

def test_leaks_a_default_dtype():
    torch.set_default_dtype(torch.float64)

def test_has_one_thread_and_float32():
    assert torch.get_num_threads() == 1 and torch.get_default_dtype() == torch.float32

def test_draws_the_same_numbers():
    Path("drawn").write_text("here")
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == %s

def test_draws_the_same_numbers_again():
    assert not Path("drawn").exists()  # every test has its own folder
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == %s

def test_becomes_another_rank():
    rank_zero_only.rank = 3

def test_is_rank_zero():
    assert rank_zero_only.rank == 0
"""
# random.seed(0), numpy.random.seed(0), torch.manual_seed(0): the first numbers that each of them documents or prints
FIRST_NUMBERS = "(0.8444218515250481, 0.5488135039273248, 0.49625658988952637)"


def test_a_test_that_leaves_something_behind_fails(tmp_path: Path, repository: Path) -> None:
    shutil.copy(repository / "conftest.py", tmp_path)
    (tmp_path / "test_leaking.py").write_text(LEAKING % (FIRST_NUMBERS, FIRST_NUMBERS))
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    errors = {line.split("::")[1].split(" ")[0] for line in run.stdout.splitlines() if line.startswith("ERROR ")}
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED ")]
    assert errors == {
        "test_leaks_a_variable",
        "test_leaks_a_thread",
        "test_leaks_a_number_of_threads",
        "test_leaks_a_default_dtype",
    }, run.stdout
    assert not failed, run.stdout
    assert "LEFT_BEHIND" in run.stdout
    assert run.returncode == 1
