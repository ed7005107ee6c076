"""The laws that every robust rule keeps in a federation."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from robust_zoo import RULES, Net, clients, identical, root, train, weights

import fl_lightning.algorithms.robust
from fl_lightning.algorithms import FedAvg
from fl_lightning.algorithms.fltrust import FLTrust
from fl_lightning.algorithms.robust import CoordinateMedian, GeometricMedian, NormClipping, TrimmedMean
from fl_lightning.callbacks.base import ClientCallback
from fl_lightning.types import ClientTask, Memory

every_rule = pytest.mark.parametrize("name", RULES)


def test_the_suite_covers_every_rule() -> None:
    covered = {type(make()).__name__ for make in RULES.values()}
    assert covered == {"FLTrust", *fl_lightning.algorithms.robust.__all__} - {"Cohort", "RobustAlgorithm"}


@every_rule
def test_the_client_half_pickles(name: str) -> None:
    algorithm = RULES[name]()
    algorithm.root_data()
    assert type(pickle.loads(pickle.dumps(algorithm))) is type(algorithm)


@pytest.mark.parametrize("loop", ["lightning", "lean"])  # no group has running statistics
@every_rule
def test_frozen_parameters_and_batch_norm_behave(name: str, loop: Any) -> None:
    module = Net(normalised=True)
    module.body.weight.requires_grad_(False)
    before = weights(module)
    train(RULES[name](), module, local_loop=loop)
    after = weights(module)
    assert {key for key in after if torch.equal(after[key], before[key])} == {"body.weight"}
    assert all(torch.isfinite(value).all() for value in after.values())
    # two epochs of 3, 5, 2, 3 and 4 batches: the median client counts 6 a round, whoever says what of its size
    assert int(after["norm.num_batches_tracked"]) == 3 * 6


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    program = Path(__file__).parent / "processes.py"
    results = []
    for count in (1, 2):
        target = tmp_path / f"{count}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
        done = subprocess.run(
            [*command, str(program), str(target)], capture_output=True, text=True, timeout=580, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(target, weights_only=True))
    one, two = results
    assert one.keys() == RULES.keys()
    assert [name for name in one if not identical(one[name], two[name])] == []


@pytest.mark.parametrize(
    "neutral",
    [NormClipping(1e6, "examples")],
    ids=lambda rule: type(rule).__name__,
)
def test_the_neutral_hyperparameter_keeps_other_weights(neutral: Any) -> None:
    module = Net()
    other = copy.deepcopy(module)
    train(neutral, module)
    train(FedAvg(weights=neutral.weights), other)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "rule", [CoordinateMedian(), TrimmedMean(f=0), GeometricMedian(), NormClipping(1e6)], ids=lambda r: type(r).__name__
)
def test_with_one_client_every_rule_is_fedavg(rule: Any) -> None:
    module = Net()
    other = copy.deepcopy(module)
    train(rule, module, data=clients((12,)))
    train(FedAvg(), other, data=clients((12,)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_the_server_trains_on_its_root_data_as_a_client_would() -> None:
    """A client with the very same data agrees wholly and is taken as it is."""
    module = Net()
    other = copy.deepcopy(module)
    data = clients((12,), shuffle=False)
    train(FLTrust(data["site-0"]), module, data=data)
    train(FedAvg(), other, data=data)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_what_the_root_data_say_decides() -> None:
    """Root data with other labels give another model, and the server is no client of the report."""
    module = Net()
    other = copy.deepcopy(module)
    trainer = train(FLTrust(root), module)
    assert trainer.round_history[0].cohort == [f"site-{k}" for k in range(5)]
    assert trainer.round_history[0].num_examples == 65
    train(FLTrust(lambda: clients((24, 24), shuffle=False)["site-1"]), other)
    assert not identical(weights(module), weights(other))


def test_a_number_of_root_examples_is_drawn_once() -> None:
    algorithm = FLTrust(root(), num_examples=10, seed=3)
    first = algorithm.root_data()
    assert len(first.dataset) == 10
    assert algorithm.root_data() is first
    again = FLTrust(root(), num_examples=10, seed=3).root_data()
    other = FLTrust(root(), num_examples=10, seed=4).root_data()
    assert list(first.dataset.indices) == list(again.dataset.indices)
    assert list(first.dataset.indices) != list(other.dataset.indices)


class Poisoned(ClientCallback):
    """A client that lies about running statistics."""

    def begin(self, task: ClientTask, memory: Memory) -> None:
        self.lies = task.client_id == "site-1"

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.lies:
            pl_module.norm.running_mean.fill_(1e9)


def test_running_statistics_of_one_client_cannot_move_the_models() -> None:
    module, other = Net(normalised=True), Net(normalised=True)
    train(CoordinateMedian(1), module, client_callbacks=[Poisoned()])
    assert module.norm.running_mean.abs().max() < 10
    train(FedAvg(), other, client_callbacks=[Poisoned()])
    assert other.norm.running_mean.abs().max() > 1e7


def test_a_skipped_client_is_left_out(tmp_path: Path) -> None:
    class Breaks(ClientCallback):
        def begin(self, task: ClientTask, memory: Memory) -> None:
            if task.client_id == "site-2":
                raise ZeroDivisionError("a broken sensor")

    module, other = Net(), Net()
    other.load_state_dict(module.state_dict())
    data = clients()
    with pytest.warns(UserWarning, match="'site-2' is skipped"):
        train(CoordinateMedian(1), module, on_bad_update="skip", client_callbacks=[Breaks()])
    del data["site-2"]
    train(CoordinateMedian(1), other, data=data)
    assert identical(weights(module), weights(other))
