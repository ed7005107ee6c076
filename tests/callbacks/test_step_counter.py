"""FedNova's normaliser against the paper and against torch's SGD, and what counts as a step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_training import Net, plain_fit
from torch import Tensor, nn

from fl_lightning.callbacks import ProximalTerm, StepCounter
from fl_lightning.callbacks.step_counter import UnitGradient


def momentum_norm(steps: int, rho: float) -> float:
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


def proximal_norm(steps: int, rate: float, mu: float) -> float:
    return (1 - (1 - rate * mu) ** steps) / (rate * mu)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_the_normaliser_is_the_papers(steps: int) -> None:
    def norm(mu: float = 0.0, rates: Any = None, **settings: Any) -> float:
        walk = UnitGradient(mu)
        for step in range(steps):
            walk.step(lr=0.1 if rates is None else rates(step), **settings)
        return walk.a_norm

    assert norm() == steps
    for rho in (0.5, 0.9):
        assert norm(momentum=rho) == pytest.approx(momentum_norm(steps, rho), abs=1e-10)
    for mu in (0.1, 3.0):
        assert norm(mu) == pytest.approx(proximal_norm(steps, 0.1, mu), abs=1e-10)
    assert norm(rates=lambda step: 0.2 * 0.9**step) == pytest.approx((1 - 0.9**steps) / (1 - 0.9), abs=1e-10)


@pytest.mark.parametrize(
    ("settings", "mu"),
    [
        ({}, 0.0),
        ({"momentum": 0.9}, 0.0),
        ({"momentum": 0.9, "dampening": 0.5}, 0.0),
        ({"momentum": 0.7, "nesterov": True}, 0.0),
        ({}, 2.0),
        ({"momentum": 0.8}, 1.0),
    ],
)
def test_the_normaliser_is_what_torchs_sgd_makes_of_a_unit_gradient(settings: dict[str, Any], mu: float) -> None:
    class Slope(pl.LightningModule):
        """Its gradient is one everywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.x.sum()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([self.x], lr=0.1, **settings)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    counter, module = StepCounter(mu), Slope()
    plain_fit(module, counter, ProximalTerm(mu))
    assert counter.num_steps == 12
    assert counter.a_norm is not None
    assert counter.distance == pytest.approx(-float(module.x.detach()), abs=1e-12)
    assert counter.a_norm * counter.lr == pytest.approx(counter.distance)


def test_accumulated_batches_are_one_step() -> None:
    counter = StepCounter()
    plain_fit(Net(), counter, accumulate_grad_batches=4)
    assert counter.num_steps == 4  # six batches an epoch: one step after four, one after the last
    assert counter.a_norm == pytest.approx(momentum_norm(4, 0.9))


def test_a_counter_starts_anew_and_lets_go_of_the_optimizer() -> None:
    counter = StepCounter()
    trainer = plain_fit(Net(), counter)
    assert counter.num_steps == 12
    trainer.optimizers[0].step()
    assert counter.num_steps == 12
    plain_fit(Net(), counter, epochs=1)
    assert counter.num_steps == 6


def test_a_counter_refuses_a_proximal_term_of_another_strength() -> None:
    with pytest.raises(MisconfigurationException, match=r"counts for mu=1.0.*mu=2.0 runs.*StepCounter\(mu=2.0"):
        plain_fit(Net(), StepCounter(1.0), ProximalTerm(2.0))


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda params: torch.optim.Adam(params), "the optimizer is Adam"),
        (lambda params: torch.optim.SGD(params, lr=0.1, maximize=True), r"climbs (maximize=True)"),
        (
            lambda params: torch.optim.SGD([{"params": [next(params)], "lr": 0.1}, {"params": list(params)}], lr=0.2),
            "parameter groups differ",
        ),
    ],
)
def test_where_the_normaliser_is_not_defined_the_counter_says_why(optimizer: Any, reason: str) -> None:
    counter = StepCounter()
    plain_fit(Net(optimizer), counter)
    assert counter.num_steps == 12
    assert counter.a_norm is None
    assert reason in counter.report()["no_a_norm"]
