"""Transforms and lanes of clients that train in groups; the laws of every algorithm stand in ``test_laws``.

Twenty of twenty-four clients a round make lanes of two and three clients, so that groups are formed and are uneven.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import ALGORITHMS, Net, clients, weights
from quadratics import quiet_trainer
from torch import Tensor

from fl_lightning.transforms import ErrorFeedback, Quantize, RandomK, TopK

SIZES = tuple(7 + 5 * (k % 4) for k in range(24))


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
    defaults = {"max_rounds": 3, "clients_per_round": 20, "local_epochs": 2, "local_loop": "lean"}
    trainer = quiet_trainer(
        algorithm=ALGORITHMS[name](), group_size=group_size, callbacks=[watch], **{**defaults, **arguments}
    )
    trainer.fit(module, clients(SIZES))
    return weights(module), watch


def net() -> Net:
    torch.manual_seed(1)
    return Net()


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
