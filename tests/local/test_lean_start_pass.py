"""Algorithms that look at a client's loss or gradient before it trains do so in the lean loop, with the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from grouped import ragged
from torch import Tensor
from zoo import ZOO, broadcast_of, settings_for, sgd

from fl_lightning.algorithms.afl import AFL
from fl_lightning.algorithms.base import Algorithm
from fl_lightning.algorithms.fedprox import FedProx
from fl_lightning.algorithms.mimelite import MimeLite
from fl_lightning.algorithms.qfedavg import QFedAvg
from fl_lightning.algorithms.scaffold import Scaffold
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.lightning_loop import LightningLoop


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


@pytest.mark.parametrize("kind", ["sgd", "torchmetrics", "dropout"])
@pytest.mark.parametrize(
    "algorithm",
    [QFedAvg(q=1.0, lipschitz=10.0), AFL(), MimeLite(), Scaffold(option="I"), FedProx(mu=0.1, adaptive=True)],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_the_lean_loop_makes_the_pass(algorithm: Algorithm, kind: str) -> None:
    torch.manual_seed(0)
    module: Any = ZOO[kind]()
    module.optimizer = sgd
    settings = settings_for(module, algorithm, group_size="auto")
    broadcast = broadcast_of(module, settings)
    broadcast.update(algorithm.broadcast(algorithm.init_state(broadcast["model"])))
    oracle = LightningLoop(copy.deepcopy(module), algorithm, settings)
    loop = LeanLoop(copy.deepcopy(module), algorithm, settings)
    jobs = ragged(epochs=2)(broadcast)
    for left, right in zip(oracle.run(jobs), loop.run(jobs), strict=True):
        for outcome in (left, right):
            if outcome.error is not None:
                raise outcome.error
        assert left.update is not None
        assert right.update is not None
        assert left.update.extra["start_loss"] > 0
        assert same(left.update.extra, right.update.extra)
        assert same(left.update.delta, right.update.delta)
        assert any(delta.any() for delta in left.update.delta.values())
    assert loop.reason is None, "it never left the lean loop"
