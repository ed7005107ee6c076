"""Where a hyperparameter is neutral an algorithm is FedAvg; the table of laws in the documentation is true."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_zoo import Net, identical, weights
from everyone import ALONE, ASYNCHRONOUS, EVERYONE, ONE_STEP, cohort, train

from fl_lightning.algorithms import (
    AFL,
    APFL,
    Algorithm,
    BufferedHeteroFL,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAsync,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedYogi,
    HeteroFL,
    MimeLite,
    QFedAvg,
    Scaffold,
)
from fl_lightning.algorithms.robust import ALittleIsEnough, CoordinateMedian, NormClipping, TrimmedMean

HUGE: dict[str, Any] = {"lr": 1e6, "beta1": 0.0, "tau": 1e6, "initial_v": 0.0}
UNIFORM = partial(FedAvg, weights="uniform")


def first(number: int) -> dict[str, Any]:
    """Return so many of the clients."""
    return {"data": dict(list(cohort().items())[:number])}


# by name: why in a word, the neutral algorithm, what it is like, arguments, and how near (0 is to the bit)
NEUTRAL: dict[str, tuple[str, Callable[[], Algorithm], Callable[[], Algorithm], dict[str, Any], float]] = {
    "AFL": ("first round", AFL, UNIFORM, {"rounds": 1}, 0.0),
    "APFL": ("any alpha: the global model", partial(APFL, 0.3), FedAvg, {}, 0.0),
    "APFL adaptive": ("any alpha: the global model", partial(APFL, 0.3, True), FedAvg, {}, 0.0),
    "BufferedHeteroFL": (
        "no staleness, width = 1",
        partial(BufferedHeteroFL, 5), FedAvg, {"local_steps": 3, "client_overrides": None}, 0.0,
    ),
    "Ditto": ("any lam: the global model", partial(Ditto, 0.7), FedAvg, {}, 0.0),
    "FedAdagrad": ("tau = lr → ∞", partial(FedAdagrad, **HUGE), FedAvg, {"rounds": 1}, 1e-5),
    "FedAdam": ("tau = lr → ∞", partial(FedAdam, beta2=0.0, **HUGE), FedAvg, {}, 1e-5),
    "FedAdam of torch": (
        "eps = lr → ∞",
        partial(FedAvg, partial(torch.optim.Adam, lr=1e6, eps=1e6, betas=(0.0, 0.0))),
        FedAvg, {}, 1e-5,
    ),
    "FedAsync": ("alpha = 1, one client", partial(FedAsync, 1.0), FedAvg, first(1), 1e-6),
    "FedAvg": ("itself", partial(FedAvg, partial(torch.optim.SGD, lr=1.0)), FedAvg, {}, 0.0),
    "FedAvgM": ("momentum = 0", partial(FedAvgM, 0.0, nesterov=True), FedAvg, {}, 0.0),
    "FedBuff": ("no staleness", partial(FedBuff, 5), FedAvg, {"local_steps": 3}, 0.0),
    "FedDyn": (
        "alpha → 0 doubles the first step",
        partial(FedDyn, 1e-6), partial(UNIFORM, partial(torch.optim.SGD, lr=2.0)), {"rounds": 1}, 1e-5,
    ),
    "FedNova": ("equal steps", FedNova, FedAvg, {"local_steps": 3}, 1e-6),
    "FedNova proximal": ("mu = 0", partial(FedNova, 0.0), FedAvg, {"local_steps": 3}, 1e-6),
    "FedPer": ("shared layers of the first round", partial(FedPer, ["head.*"]), FedAvg, {"rounds": 1}, 0.0),
    "FedProx": ("mu = 0", partial(FedProx, 0.0), FedAvg, {}, 0.0),
    "FedProx adaptive": ("mu = 0 in the first round", partial(FedProx, 0.0, True), FedAvg, {"rounds": 1}, 0.0),
    "FedYogi": ("tau = lr → ∞", partial(FedYogi, beta2=0.0, **HUGE), FedAvg, {"rounds": 1}, 1e-5),
    "HeteroFL": ("width = 1", HeteroFL, FedAvg, {"client_overrides": None}, 0.0),
    "MimeLite": ("momentum = 0", partial(MimeLite, 0.0), FedAvg, {}, 0.0),
    "QFedAvg": ("q = 0", partial(QFedAvg, 0.0), FedAvg, {}, 0.0),
    "Scaffold I": ("first round", partial(Scaffold, "I"), UNIFORM, {"rounds": 1}, 0.0),
    "Scaffold II": ("first round", partial(Scaffold, "II"), UNIFORM, {"rounds": 1}, 0.0),
    "CoordinateMedian": ("two clients", CoordinateMedian, UNIFORM, first(2), 1e-6),
    "TrimmedMean fraction": ("fraction = 0", partial(TrimmedMean, 0.0), UNIFORM, {}, 1e-6),
    "TrimmedMean f": ("f = 0", partial(TrimmedMean, f=0), UNIFORM, {}, 1e-6),
    "NormClipping": ("max_norm → ∞", partial(NormClipping, 1e6), UNIFORM, {}, 1e-6),
    "ALittleIsEnough FedAvg": (
        "one who knows nobody",
        partial(ALittleIsEnough, FedAvg(), ["site-1"], omniscient=False), FedAvg, {}, 1e-6,
    ),
}  # fmt: skip
WITHOUT = {
    "FedRep": "alternates",
    "GeometricMedian": "a median",
    "GeometricMedian examples": "a median",
    "Krum": "one update",
    "MultiKrum": "f + 2 are left out",
    "FLTrust": "root data",
    "ALittleIsEnough Median": "a median",
}
"""Why there is none; what holds instead stands in ``test_quadratics``, ``test_own_models`` and ``test_rules``."""


def test_everyone_has_a_neutral_value_or_a_reason() -> None:
    assert NEUTRAL.keys() | WITHOUT.keys() == EVERYONE.keys()
    assert not NEUTRAL.keys() & WITHOUT.keys()


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_hyperparameter_is_fedavg(name: str) -> None:
    _, neutral, like, arguments, tolerance = NEUTRAL[name]
    module = Net(momentum=0.0 if name.startswith("Scaffold") else 0.5)
    other, before = copy.deepcopy(module), weights(module)
    train(name, module, algorithm=neutral(), **arguments)
    train("FedAvg", other, algorithm=like(), **arguments)
    shared = {key: value for key, value in weights(module).items() if not (name == "FedPer" and key.startswith("head"))}
    expected = {key: weights(other)[key] for key in shared}
    if tolerance == 0.0:
        assert identical(shared, expected)
    for key, value in shared.items():
        assert torch.allclose(value, expected[key], rtol=0.0, atol=tolerance), key
        assert not torch.allclose(value, before[key], rtol=0.0, atol=1e-4), key


def row(name: str) -> str:
    """Return a row of the table: one step, neutral value, groups, an empty round."""
    one = ONE_STEP[name][0] if name in ONE_STEP else "yes"
    neutral = NEUTRAL[name][0] if name in NEUTRAL else f"no: {WITHOUT[name]}"
    groups = f"no: {ALONE[name].removeprefix('callback ')}" if name in ALONE else "yes"
    empty = "no sampler" if name in ASYNCHRONOUS else "yes"
    return f"| {name} | {one} | {neutral} | {groups} | {empty} |"


def test_the_table_in_the_documentation_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithms" / "laws.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.split("|")[1].strip() in EVERYONE]
    assert rows == [row(name) for name in EVERYONE]
