"""The contenders of the table do the same work, and what compares them would notice if one did not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import kernels, processes, program, table
from benchmarks.by_hand import by_hand
from benchmarks.contenders import Contender, Run, Stopwatch, cpu_of_processes
from benchmarks.leanest import leanest
from benchmarks.ours import LOOPS, ours
from benchmarks.peers.adapter import CountingLoss
from benchmarks.peers.launch import PEERS, peers
from benchmarks.workloads import WORKLOADS

SMALL = replace(WORKLOADS["W1"], num_clients=12, cohort=4)
CONTENDERS: dict[str, Contender] = {table.BASELINE: by_hand, "leanest": leanest}
CONTENDERS.update({name: ours(**arguments) for name, arguments in LOOPS.items()})


def test_all_contenders_do_the_same_steps_and_learn(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table.compare(SMALL, CONTENDERS, turns=1, rounds=4)
    assert [row.name for row in rows] == list(CONTENDERS)
    assert {row.steps for row in rows} == {24}
    assert all(row.seconds > 0 and row.wall > 0 for row in rows)
    # other cohorts and other orders of the same data: the losses are alike and not equal
    first, last = [row.first_loss for row in rows], [row.last_loss for row in rows]
    assert max(first) - min(first) < 0.05
    assert max(last) < min(first)
    table.print_table(SMALL, rows)
    printed = capsys.readouterr().out
    assert "4 of 12 clients a round" in printed
    assert f"| {table.BASELINE} |" in printed


def test_one_client_a_round_learns_what_the_loop_by_hand_learns() -> None:
    # nobody is left out and a batch is all that a client has: neither cohorts nor orders differ
    alone = replace(SMALL, num_clients=1, cohort=1, batch_size=60)
    expected = by_hand(alone, 3).losses
    for name in ("leanest", *LOOPS):
        assert CONTENDERS[name](alone, 3).losses == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_workload_has_the_data_that_it_says(name: str) -> None:
    few = replace(WORKLOADS[name], num_clients=2)
    inputs, labels = few.data()
    assert len(inputs) == len(labels) == 2 * few.examples
    outputs = few.model()(inputs[:2])
    assert cross_entropy(outputs, labels[:2]).isfinite()
    cohort = WORKLOADS[name].cohort_of(3)
    assert len(set(cohort)) == WORKLOADS[name].cohort
    assert cohort == WORKLOADS[name].cohort_of(3) != WORKLOADS[name].cohort_of(4)


def run_of(steps: int, *losses: float, seconds: float = 1.0) -> Run:
    each = [seconds] * len(losses)
    return Run(each, each, [steps] * len(losses), list(losses), [0.1] * len(losses))


def test_other_steps_and_no_learning_are_found() -> None:
    table.check(SMALL, "honest", run_of(24, 2.0, 1.0))
    with pytest.raises(AssertionError, match=r"lazy did \[12, 12\] steps on W1, not 24"):
        table.check(SMALL, "lazy", run_of(12, 2.0, 1.0))
    with pytest.raises(AssertionError, match="stuck did not learn W1"):
        table.check(SMALL, "stuck", run_of(24, 2.0, 2.0))


def test_ratios_are_of_the_same_turn() -> None:
    speeds = iter([4.0, 2.0, 1.0, 1.0])  # the machine slows the first turn of both

    def contender(workload: Any, rounds: int) -> Run:
        return run_of(24, 2.0, 1.0, seconds=next(speeds))

    first, second = table.compare(SMALL, {table.BASELINE: contender, "other": contender}, turns=2, rounds=1)
    assert (first.ratio, second.ratio, second.low, second.high) == (1.0, 1.5, 1.0, 2.0)
    assert first.seconds == 2.5


def test_two_processes_are_compared_by_wall_and_by_the_busier_one(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run_of(24, 2.0, 1.0, seconds=3.0), Run([2.0] * 2, [1.5] * 2, [24] * 2, [2.0, 1.0], [0.1] * 2)
    found = processes.compare(SMALL, {"one": lambda *_: one, "two": lambda *_: two}, turns=3, rounds=1)
    assert found == {"one": [(3.0, 3.0)] * 3, "two": [(2.0, 1.5)] * 3}
    processes._print(SMALL, found, "one")
    assert "| two | 2 | 1.50 (1.50-1.50) | 1.5 | 2.00 (2.00-2.00) |" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_learn_to_the_bit_what_one_learns() -> None:
    one, two = (processes.ours_in(number)(SMALL, 3) for number in (1, 2))
    assert one.losses == two.losses
    assert one.steps == two.steps == [24, 24, 24]


def test_cpu_seconds_of_children_count() -> None:
    ticks = 0.05  # the kernel counts in hundredths, and rounds down
    before, watch, run = cpu_of_processes(), Stopwatch(cpu_of_processes), Run()
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)  # one that has ended
    assert cpu_of_processes() - before >= 0.3 - ticks
    watch.lap(run)
    assert run.cpu[0] >= 0.3 - ticks
    child = subprocess.Popen([sys.executable, "-c", spin + "\ninput()"], stdin=subprocess.PIPE)
    try:  # and one that still lives
        deadline = time.monotonic() + 30
        while cpu_of_processes(child.pid) < 0.3 - ticks and time.monotonic() < deadline:
            time.sleep(0.02)
        assert cpu_of_processes(child.pid) >= 0.3 - ticks
        assert cpu_of_processes(os.getpid()) >= cpu_of_processes(child.pid)
    finally:
        child.communicate(b"\n")


# ---- programs and peers ---------------------------------------------------------------------------------------------


def test_a_program_gets_its_workload_and_prints_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    def contender(workload: Any, rounds: int, number: int) -> Run:
        return run_of(workload.steps, *[2.0 / (1 + r) for r in range(rounds)], seconds=float(number))

    threads = torch.get_num_threads()
    program.run_program(contender, program.sizes_of(SMALL, 2, 3))
    torch.set_num_threads(threads)
    assert Run(**json.loads(capsys.readouterr().out.splitlines()[-1])) == run_of(24, 2.0, 1.0, seconds=3.0)
    program.run_program(lambda *_: None, program.sizes_of(SMALL, 2, 3))
    assert capsys.readouterr().out == ""


def test_the_counting_loss_is_cross_entropy_and_counts_for_all_copies() -> None:
    loss, outputs, labels = CountingLoss(), torch.randn(8, 3), torch.randint(3, (8,))
    assert deepcopy(loss)(outputs, labels) == loss(outputs, labels) == cross_entropy(outputs, labels)
    run = Run()
    loss.report(run)
    assert run.steps == [2]
    assert run.losses == pytest.approx([cross_entropy(outputs, labels).item()])
    assert run.accuracies == pytest.approx([(outputs.argmax(1) == labels).float().mean().item()])
    assert loss.sums() == (0, 0.0, 0.0)


def environment(folder: Path, name: str, script: str) -> None:
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_every_peer_has_an_adapter() -> None:
    root = Path(processes.__file__).parent / "peers"
    assert {file.name for file in root.glob("*_adapter.py")} == {f"{name}_adapter.py" for name in PEERS}


def test_a_peer_runs_in_its_own_environment(tmp_path: Path) -> None:
    answer = json.dumps(run_of(24, 2.0, 1.0).as_dict())
    environment(tmp_path, "fluke", f"echo \"$@\" > '{tmp_path}/asked'; echo banner; echo '{answer}'")
    environment(tmp_path, "pfl", "echo no torch >&2; exit 3")
    found, missing = peers(tmp_path)
    assert sorted(found) == ["fluke", "pfl"]
    assert [line.split(":")[0] for line in missing] == ["blazefl", "flower"]
    assert found["fluke"](SMALL, 2) == run_of(24, 2.0, 1.0)
    asked = "-m benchmarks.peers.fluke_adapter W1 2 --processes 1 --clients 12 --cohort 4"
    assert (tmp_path / "asked").read_text().strip() == asked
    with pytest.raises(RuntimeError, match="pfl on W1 failed:\nno torch"):
        found["pfl"](SMALL, 2)
    found, missing = peers(tmp_path, processes=2)
    assert sorted(found) == ["pfl"]
    assert "fluke: skipped, it works in one process" in missing
    assert len(peers(None)[1]) == len(PEERS)


def test_the_profile_of_a_round_says_where_its_time_went() -> None:
    seconds, own = kernels.kernels(SMALL, "lean")
    assert 0 < sum(own.values()) < seconds
    assert "mm" in list(own)[:5], "products of matrices are most of it"
