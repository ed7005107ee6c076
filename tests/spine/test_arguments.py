"""Every argument has its place, and a wrong one its error."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from spine_zoo import (
    QUIET,
    Classifier,
    fit_federated,
    sites,
)

from fl_lightning.algorithms import FedAvg
from fl_lightning.arguments import TRAINER_ARGUMENTS
from fl_lightning.errors import MisconfigurationException
from fl_lightning.trainer import FederatedTrainer

# ---- the table of arguments -----------------------------------------------------------------------------------------


def test_every_argument_of_lightnings_trainer_has_a_row() -> None:
    names = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert names == set(TRAINER_ARGUMENTS)
    assert {row.side for row in TRAINER_ARGUMENTS.values()} <= {"server", "client", "both", "refused"}
    assert all(len(row.why) > 10 for row in TRAINER_ARGUMENTS.values())


@pytest.mark.parametrize("name", [n for n, row in TRAINER_ARGUMENTS.items() if row.side == "refused"])
def test_a_refused_argument_says_what_to_do_instead(name: str) -> None:
    value = {"sync_batchnorm": True, "val_check_interval": 0.5}.get(name, 3)
    with pytest.raises(MisconfigurationException, match=name):
        FederatedTrainer(**{**QUIET, name: value})
    default = inspect.signature(pl.Trainer.__init__).parameters[name].default
    FederatedTrainer(**{**QUIET, name: default, "max_rounds": 1})  # what Lightning means by nothing is no refusal


@pytest.mark.parametrize("name", [n for n, row in TRAINER_ARGUMENTS.items() if row.side == "client"])
def test_a_clients_argument_does_not_reach_the_server(name: str) -> None:
    value = {"gradient_clip_val": 0.25, "gradient_clip_algorithm": "value", "detect_anomaly": True}.get(name, 2)
    trainer = FederatedTrainer(**{**QUIET, name: value})
    assert trainer.local_settings().trainer_arguments[name] == value
    server = {
        "limit_train_batches": trainer.limit_train_batches, "overfit_batches": trainer.overfit_batches,
        "accumulate_grad_batches": trainer.accumulate_grad_batches, "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm, "detect_anomaly": trainer._detect_anomaly,
    }[name]  # fmt: skip
    assert server != value


def test_max_rounds_and_max_epochs_exclude_each_other() -> None:
    with pytest.raises(MisconfigurationException, match="max_rounds"):
        FederatedTrainer(max_rounds=2, max_epochs=2)
    with pytest.raises(MisconfigurationException, match="local_epochs"):
        FederatedTrainer(max_epochs=2)


def test_swa_warns(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    with pytest.warns(UserWarning, match="StochasticWeightAveraging changes the server's learning rate"):
        FederatedTrainer(**QUIET, callbacks=[StochasticWeightAveraging(0.1)])


# ---- arguments ------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"clients_per_round": 0}, "clients_per_round"),
    ({"clients_per_round": 1.5}, r"fraction in \(0, 1\]"),
    ({"clients_per_round": True}, "clients_per_round"),
    ({"local_epochs": 0}, "local_epochs"),
    ({"local_steps": 0}, "local_steps"),
    ({"min_clients": 0}, "min_clients"),
    ({"local_loop": "fast"}, "local_loop to be one of"),
    ({"client_state": "forget"}, "client_state to be one of"),
    ({"batch_norm": "mean"}, "batch_norm to be one of"),
    ({"memory_format": "channels"}, "memory_format to be one of"),
    ({"on_bad_update": "ignore"}, "on_bad_update to be one of"),
    ({"group_size": 0}, "group_size"),
    ({"algorithm": "fedavg"}, "algorithm"),
    ({"evaluate_clients": 2.0}, "evaluate_clients"),
    ({"max_rounds": -2}, "max_rounds"),
    ({"max_rounds": 1.5}, "max_rounds"),
    (
        {"client_overrides": {"a": {"momentum": 1}}},
        r"expected any of \['batch_size', 'epochs', 'lr', 'steps', 'width'\]",
    ),
    ({"client_overrides": {"a": {"epochs": 1, "steps": 1}}}, "both epochs and steps"),
    ({"client_overrides": {"a": {"lr": -1.0}}}, "> 0, got -1.0"),
    ({"strategy": "fsdp", "devices": 2}, "strategy='fsdp' shards the model"),
    ({"num_lanes": 3}, "power of two"),
    ({"local_epochs": 2, "local_steps": 5}, "local_epochs=2 and local_steps=5 both say when a client's round ends"),
    ({"sampler": "uniform"}, r"sampler to be an object with a method cohort\(\)"),
    ({"engine": "spawned"}, r"engine to be an object with a method session\(\)"),
    ({"client_callbacks": [3]}, "client_callbacks to be Lightning callbacks, got 3"),
    ({"client_lr_schedule": lambda round: None}, r"client_lr_schedule\(0\) to return a finite factor >= 0, got None"),
    ({"client_lr_schedule": lambda round: -0.1}, r"finite factor >= 0, got -0.1"),
    (
        {"client_overrides": lambda client: {"speed": 1}},
        r"client_overrides\['s[01]'\] has \['speed'\]; expected any of",
    ),
    ({"client_overrides": {"s9": {"epochs": 2}}}, r"names 's9', which is none of the 2 clients .*=lambda client_id"),
    ({"client_lr_schedule": 0.5}, "client_lr_schedule to be a function of the round"),
]


@pytest.mark.parametrize(("arguments", "match"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit_federated(Classifier(), sites(2), **arguments)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none(weight: float) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"weights to return a finite number >= 0, got .* for client 's[01]'"
    ):
        fit_federated(Classifier(), sites(2), algorithm=FedAvg(weights=lambda update: weight))


def test_weights_that_add_up_to_nothing() -> None:
    with pytest.raises(MisconfigurationException, match="positive sum of client weights"):
        fit_federated(Classifier(), sites(2), algorithm=FedAvg(weights=lambda update: 0.0))
