"""Clients that train in groups keep the laws of those that train one by one, for every algorithm.

Twenty of twenty-four clients a round make lanes of two and three clients, so that groups are formed and are uneven.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import ALGORITHMS, Net, clients, identical, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from quadratics import quiet_trainer
from torch import Tensor

from fl_lightning.transforms import ErrorFeedback, Quantize, RandomK, TopK

SIZES = tuple(7 + 5 * (k % 4) for k in range(24))
# asynchronous ones flush a few clients at a time: too few for two in a lane, whatever the group size
LAWFUL = sorted(ALGORITHMS.keys() - {"FedAsync", "FedBuff"})
ONE_BY_ONE = {  # why these never group
    "AFL": "callback StartPass",
    "APFL": "callback _Mixture",
    "APFL adaptive": "callback _Mixture",
    "Ditto": "several phases",
    "FedPer": "stays with its client",
    "FedProx adaptive": "callback StartPass",
    "FedRep": "stays with its client",
    "MimeLite": "callback StartPass",
    "QFedAvg": "callback StartPass",
    "Scaffold I": "callback StartPass",
}


class Watch(pl.Callback):
    """Keeps whether groups were formed, and why not."""

    groups = False
    reason: str | None = None

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        loop = trainer.federated_fit.federation.engine.client_half.loop
        self.groups, self.reason = loop.groups, loop.together.reason or loop.together.trouble


def train(name: str, module: Net, group_size: int, **arguments: Any) -> tuple[dict[str, Tensor], Watch]:
    pl.seed_everything(5, verbose=False)
    watch = Watch()
    ckpt_path = arguments.pop("ckpt_path", None)
    callbacks = [watch, *arguments.pop("callbacks", [])]
    defaults = {"max_rounds": 3, "clients_per_round": 20, "local_epochs": 2, "local_loop": "lean"}
    trainer = quiet_trainer(
        algorithm=ALGORITHMS[name](), group_size=group_size, callbacks=callbacks, **{**defaults, **arguments}
    )
    trainer.fit(module, clients(SIZES), ckpt_path=ckpt_path)
    return weights(module), watch


def net() -> Net:
    torch.manual_seed(1)
    return Net()


@pytest.mark.parametrize("name", LAWFUL)
def test_groups_agree_with_one_by_one(name: str) -> None:
    alone, _ = train(name, net(), 1)
    group, watch = train(name, net(), 4)
    start = weights(net())
    for key, value in alone.items():
        assert (group[key] - value).norm() <= 1e-4 * (value - start[key]).norm(), key
    assert max((value - start[key]).norm() for key, value in alone.items()) > 1e-2
    if name in ONE_BY_ONE:
        assert identical(alone, group)
    else:
        assert watch.groups, watch.reason
        assert watch.reason is None
        assert not identical(alone, group), "to the bit the same: was there a group at all?"


GROUPED = [name for name in LAWFUL if name not in ONE_BY_ONE]


@pytest.mark.parametrize("name", GROUPED)
def test_a_resumed_run_in_groups_is_the_uninterrupted_one_to_the_bit(name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    arguments: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    silent = ModelCheckpoint(tmp_path, save_top_k=0)
    whole, _ = train(name, net(), 4, max_rounds=4, callbacks=[silent], **arguments)
    train(name, net(), 4, max_rounds=2, callbacks=[saver], **arguments)
    resumed, watch = train(
        name, Net(), 4, max_rounds=4, ckpt_path=tmp_path / "last.ckpt", callbacks=[silent], **arguments
    )
    assert watch.groups
    assert identical(whole, resumed)


@pytest.mark.parametrize(
    ("transform", "tolerance"),
    [(TopK(fraction=0.5), 1e-3), (RandomK(fraction=0.5), 1e-4), (ErrorFeedback(TopK(fraction=0.5)), 1e-3),
     (Quantize(bits=8), 1e-1)],
    ids=repr,
)  # fmt: skip
def test_transforms_see_what_they_see_of_clients_alone(transform: Any, tolerance: float) -> None:
    """A coordinate at the edge of a level or of the k largest may fall to the other side; the rest is rounding."""
    alone, _ = train("FedAvg", net(), 1, transforms=[transform])
    group, watch = train("FedAvg", net(), 4, transforms=[transform])
    assert watch.groups
    start = weights(net())
    for key, value in alone.items():
        assert (group[key] - value).norm() <= tolerance * (value - start[key]).norm(), key


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    """A group never crosses a lane, and a lane is never cut between processes."""
    program = Path(__file__).with_name("group_processes.py")
    results = []
    for count in (1, 2):
        target = tmp_path / f"{count}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
        done = subprocess.run(
            [*command, str(program), str(target)], capture_output=True, text=True, timeout=580, env=environment,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(target, weights_only=True))
    one, two = results
    assert sorted(one) == LAWFUL
    assert [name for name in one if not identical(one[name], two[name])] == []
