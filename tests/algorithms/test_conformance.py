"""What every algorithm keeps beside the laws of ``test_laws``: it learns, its halves are pure, its state is plain."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import (
    ALGORITHMS,
    WITH_OWN_MODELS,
    Net,
    Normalised,
    clients,
    drawn,
    identical,
    on_one_process_and_on_two,
    weights,
)
from everyone import assert_same
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import quiet_trainer
from torch import Tensor

import fl_lightning.algorithms
from fl_lightning.algorithms import (
    Algorithm,
    FedAvg,
    FedAvgM,
    FedProx,
    QFedAvg,
)
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Tree

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def train(
    algorithm: Algorithm, module: pl.LightningModule, rounds: int = 3, data: Any = None, **arguments: Any
) -> pl.LightningModule:
    pl.seed_everything(5, verbose=False)
    if "local_steps" not in arguments:
        arguments["local_epochs"] = 2
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=rounds, **arguments)
    trainer.fit(module, data if data is not None else clients())
    return module


def test_the_suite_covers_every_algorithm() -> None:
    covered = {type(make()).__name__ for make in ALGORITHMS.values()}
    assert covered == set(fl_lightning.algorithms.__all__) - {"Algorithm"}


@every_algorithm
def test_training_lowers_the_loss(name: str) -> None:
    data = clients()
    batch = [torch.cat(parts) for parts in zip(*(loader.dataset.tensors for loader in data.values()), strict=True)]
    module = Net()
    before = float(module.loss(batch).detach())
    train(ALGORITHMS[name](), module, rounds=8, data=data)
    with torch.no_grad():
        assert float(module.loss(batch)) < before - 0.01


@pytest.mark.parametrize("loop", ["lightning", "lean"])  # no group has running statistics
@every_algorithm
def test_frozen_parameters_and_batch_norm_behave(name: str, loop: Any) -> None:
    module = Normalised()
    before = weights(module)
    train(ALGORITHMS[name](), module, local_loop=loop)
    after = weights(module)
    still = {"frozen.weight", "frozen.bias", "scale"}
    if name in ("FedPer", "FedRep"):
        still |= {"head.weight", "head.bias"}
    for key, value in after.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, before[key]) == (key in still), key
    assert after["norm.num_batches_tracked"].dtype == torch.int64
    assert (after["norm.running_var"] > 0).all()
    if not drawn(name, 1):
        return  # who is in a round is a matter of time
    # two epochs of 3, 5 and 2 batches (FedRep's head has three before), averaged by 12, 20 and 7 examples, in each of
    # three rounds
    epochs = 5 if name == "FedRep" else 2
    total, tracked = 0, 0
    for _ in range(3):
        tracked = round((12 * (total + 3 * epochs) + 20 * (total + 5 * epochs) + 7 * (total + 2 * epochs)) / 39)
        total = tracked
    assert int(after["norm.num_batches_tracked"]) == tracked


def test_a_checkpoint_is_one_of_the_users_class(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    train(FedAvg(), Net(lr=0.07), 1, callbacks=[saver], default_root_dir=str(tmp_path), enable_checkpointing=True)
    assert Net.load_from_checkpoint(tmp_path / "last.ckpt").hparams.lr == 0.07


def test_an_algorithm_of_another_name_does_not_resume(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    train(FedAvg(), Net(), rounds=1, callbacks=[saver], default_root_dir=str(tmp_path), enable_checkpointing=True)
    trainer = quiet_trainer(algorithm=FedProx(0.1), max_rounds=2)
    with pytest.raises(MisconfigurationException, match=r"written by FedAvg.*FedProx"):
        trainer.fit(Net(), clients(), ckpt_path=str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("neutral", [FedProx(mu=0.0, weights="uniform"), QFedAvg(q=0.0, weights="uniform")])
def test_the_neutral_hyperparameter_keeps_other_weights(neutral: Algorithm) -> None:
    module = Net(momentum=0.5)
    other = copy.deepcopy(module)
    train(neutral, module)
    train(FedAvg(weights="uniform"), other)
    assert identical(weights(module), weights(other))


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "MimeLite", "Scaffold I", "Ditto", "FedAvgM"])
@pytest.mark.parametrize("num_examples", [3, 10, 49, 601])
def test_a_weight_leaves_no_trace_on_a_single_client(name: str, num_examples: int) -> None:
    """Where the product with the weight is exact, so is the quotient; a product with its inverse would not be."""
    algorithm, delta = ALGORITHMS[name](), torch.arange(-1000.0, 1000.0) / 1024
    model = {"w": torch.zeros_like(delta)}
    state = algorithm.init_state(model)
    task = ClientTask("a", 0, 0, {"model": model, **algorithm.broadcast(state)}, seed=0)
    extra = {"start_grad": {"w": delta}, "distance": 0.2, "lr": 0.1, "personal": {"w": delta}, "start_loss": 1.0}
    update = ClientUpdate("a", {"w": delta}, {}, num_examples, num_steps=2, a_norm=2.0, extra=extra)
    contribution, _ = algorithm.contribute(update, task, {})
    gradient, _ = algorithm.apply(contribution, state, num_clients=1)
    assert torch.equal(gradient["w"], -delta)


@every_algorithm
def test_the_client_half_pickles(name: str) -> None:
    algorithm = ALGORITHMS[name]()
    twin = pickle.loads(pickle.dumps((algorithm, algorithm.client_callbacks())))[0]
    assert type(twin) is type(algorithm)


@every_algorithm
def test_both_halves_are_pure_and_the_state_is_plain(name: str) -> None:
    algorithm, model = ALGORITHMS[name](), {"w": torch.tensor([1.0, -2.0])}
    state = algorithm.init_state(model)
    for round in range(3):
        before, results = copy.deepcopy(state), []
        for _ in range(2):
            total = summed(algorithm, model, state, round)
            frozen = copy.deepcopy(total)
            results.append(algorithm.apply(total, state, num_clients=3))
            assert_same(total.trees, frozen.trees)
            assert_same(state, before)
        assert_same(results[0][0], results[1][0])
        assert_same(results[0][1], results[1][1])
        gradient, state = results[0]
        assert gradient.keys() == model.keys()
        assert_plain(state)


def summed(algorithm: Algorithm, model: Tree, state: Any, round: int) -> Contribution:
    total = Contribution()
    for client_id, delta in (("a", 0.5), ("b", -0.25)):
        broadcast = {"model": model, **algorithm.broadcast(state)}
        task = ClientTask(client_id, round, 0, broadcast, seed=0)
        extra: dict[str, Any] = {"start_loss": 1.0 + delta, "start_grad": {"w": torch.tensor([delta, 1.0])}}
        extra.update(lr=0.1, distance=0.2, personal={"w": torch.ones(2)})
        update = ClientUpdate(
            client_id, {"w": torch.tensor([delta, 0.1])}, {}, num_examples=3, num_steps=2, a_norm=2.0, extra=extra
        )
        memory: dict[str, Any] = {}
        contribution, _ = algorithm.contribute(update, task, memory)
        assert memory == {}
        for key, tree in contribution.trees.items():
            total.trees[key] = {n: t + total.trees[key][n] if key in total.trees else t for n, t in tree.items()}
        for key, value in contribution.scalars.items():
            total.scalars[key] = total.scalars.get(key, 0.0) + value
    return total


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            assert isinstance(key, str)
            assert_plain(item)
    else:
        assert value is None or isinstance(value, bool | int | float | str | Tensor), type(value)


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    """All algorithms in one program, started on one process and then on two."""
    one, two = on_one_process_and_on_two("processes.py", tmp_path)
    own_models = {f"{name}: own models" for name in WITH_OWN_MODELS}
    others = {"power of choice", "FedAdam: empty rounds", "FLTrust: empty rounds"}
    assert one.keys() == ALGORITHMS.keys() | own_models | others
    assert all("clients/val_loss" in one[f"{name}: own models"] for name in WITH_OWN_MODELS)
    assert "clients/personal/val_loss" in one["APFL: own models"]
    assert one["FLTrust: empty rounds"]["sizes"].tolist() == [0, 5, 0, 5]
    different = [name for name in one if not identical(one[name], two[name])]
    assert not different


def test_a_server_schedule_scales_the_rounds() -> None:
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda round: 0.5**round)
    module = Net()
    steps = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            steps.append(trainer.optimizers[0].param_groups[0]["lr"])

    train(FedAvgM(0.5, lr=0.8, server_lr_scheduler=schedule), module, callbacks=[Watch()])
    assert steps == [0.8, 0.4, 0.2]
