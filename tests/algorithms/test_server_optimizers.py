"""The adaptive servers against algorithm 2 of Reddi et al. and against torch, where torch has the same rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from algorithm_zoo import Net, clients, identical, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import OPTIMA, STEPS, Quadratic, quiet_trainer, shares, trajectory, unequal

from fl_lightning.algorithms import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from fl_lightning.algorithms.server_optimizers import ServerAdagrad, ServerAdam, ServerYogi

UPDATES = [0.5, -0.2, 0.1, 0.1, -0.7, 0.0, 2.0]


def algorithm_2(kind: str, lr: float, beta1: float, beta2: float, tau: float, start: float | None) -> list[float]:
    """Lines 8 to 14 of the paper's algorithm, with v_{-1} = tau^2 unless given."""
    x, m, v, values = 0.0, 0.0, tau**2 if start is None else start, []
    for delta in UPDATES:
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            sign = (v > delta**2) - (v < delta**2)
            v = v - (1 - beta2) * delta**2 * sign
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + lr * m / (v**0.5 + tau)
        values.append(x)
    return values


@pytest.mark.parametrize("start", [None, 0.0, 0.04])
@pytest.mark.parametrize("tau", [1e-3, 0.1])
@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("adagrad", FedAdagrad), ("adam", FedAdam), ("yogi", FedYogi)],
    ids=["adagrad", "adam", "yogi"],
)
def test_the_steps_are_the_papers(kind: str, algorithm: Any, tau: float, start: float | None) -> None:
    settings = {"lr": 0.3, "beta1": 0.8, "tau": tau, "initial_v": start}
    if kind != "adagrad":
        settings["beta2"] = 0.95
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = algorithm(**settings).server_optimizer([parameter])
    values = []
    for delta in UPDATES:
        parameter.grad = torch.full_like(parameter, -delta)
        optimizer.step()
        values.append(parameter.item())
    assert values == pytest.approx(algorithm_2(kind, 0.3, 0.8, 0.95, tau, start), abs=1e-12)


def test_adagrad_is_torchs_when_nothing_is_averaged() -> None:
    """torch adds eps outside of the root too, and its accumulator starts where it is told to."""
    mine, other = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    ours = ServerAdagrad([mine], lr=0.1, beta1=0.0, tau=1e-3, initial_v=0.25)
    torchs = torch.optim.Adagrad([other], lr=0.1, eps=1e-3, initial_accumulator_value=0.25)
    for seed in range(5):
        for parameter, optimizer in ((mine, ours), (other, torchs)):
            parameter.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            optimizer.step()
    assert torch.allclose(mine, other, rtol=1e-13)


def test_adam_differs_from_torchs_by_the_bias_correction_only() -> None:
    mine, other = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    ours = ServerAdam([mine], lr=0.1, beta1=0.9, beta2=0.99, tau=1e-12, initial_v=0.0)
    torchs = torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for step in range(1, 6):
        before = mine.detach().clone(), other.detach().clone()
        for parameter, optimizer in ((mine, ours), (other, torchs)):
            parameter.grad = torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.step()
        correction = (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
        assert torch.allclose((mine - before[0]) * correction, other - before[1], rtol=1e-8)


def test_their_state_goes_through_a_state_dict() -> None:
    def run(split: bool) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = ServerYogi([parameter], lr=0.1)
        for step in range(4):
            if split and step == 2:
                saved = optimizer.state_dict()
                optimizer = ServerYogi([parameter], lr=5.0)
                optimizer.load_state_dict(saved)
            parameter.grad = torch.tensor([0.3, -1.0]) * (step + 1)
            optimizer.step()
        return parameter.detach()

    assert torch.equal(run(split=True), run(split=False))


def mean_update(x: float, lr: float = 0.01) -> float:
    moves = [(1 - (1 - lr) ** steps) * (e - x) for e, steps in zip(OPTIMA, STEPS, strict=True)]
    return 0.5 * moves[0] + 0.3 * moves[1] + 0.2 * moves[2]


def test_the_federation_steps_with_the_mean_update_of_its_clients() -> None:
    x, m, v, expected = 2.0, 0.0, 0.01**2, [2.0]
    for _ in range(4):
        delta = mean_update(x)
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        x += 0.2 * m / (v**0.5 + 0.01)
        expected.append(x)
    values = trajectory(FedAdam(lr=0.2, tau=0.01, weights=shares), unequal(), rounds=4, module=Quadratic(2.0))
    assert values == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_server_momentum(nesterov: bool) -> None:
    x, v, expected = 2.0, 0.0, [2.0]
    for _ in range(4):
        delta = mean_update(x)
        v = 0.6 * v + delta
        x += 0.5 * (delta + 0.6 * v if nesterov else v)
        expected.append(x)
    algorithm = FedAvgM(0.6, lr=0.5, nesterov=nesterov, weights=shares)
    assert trajectory(algorithm, unequal(), rounds=4, module=Quadratic(2.0)) == pytest.approx(expected, abs=1e-12)


def test_torchs_own_adam_is_an_alternative() -> None:
    algorithm = FedAvg(server_optimizer=partial(torch.optim.Adam, lr=0.1), weights=shares)
    values = trajectory(algorithm, unequal(), rounds=1, module=Quadratic(2.0))
    assert values[1] == pytest.approx(2.0 + 0.1, abs=1e-6)  # the first step of Adam is lr times the sign


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvgM(momentum=1.0), r"FedAvgM expected momentum to be a number in \[0, 1\), got 1.0; 0 is FedAvg"),
        (lambda: FedAvgM(lr=0.0), "FedAvgM expected lr to be a finite number > 0, got 0.0"),
        (lambda: FedAdam(lr=-1.0), "FedAdam expected lr to be a finite number > 0, got -1.0"),
        (lambda: FedAdam(beta1=1.0), r"expected beta1 to be a number in \[0, 1\)"),
        (lambda: FedYogi(beta2=-0.1), r"FedYogi expected beta2 to be a number in \[0, 1\)"),
        (lambda: FedAdagrad(tau=0.0), "FedAdagrad expected tau to be a finite number > 0"),
        (lambda: FedAdagrad(initial_v=-1.0), "expected initial_v to be a finite number >= 0, got -1.0"),
    ],
)
def test_values_out_of_range_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


class Needs(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Needs])
def test_an_optimizer_that_asks_for_the_gradient_again_is_refused(kind: Any) -> None:
    trainer = quiet_trainer(algorithm=FedAvg(server_optimizer=partial(kind, lr=1.0)), max_rounds=1)
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} evaluates its closure.*SGD or Adam.*clients"):
        trainer.fit(Net(), clients())


def test_lbfgs_can_train_the_clients() -> None:
    class Newton(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

    module = Newton()
    before = weights(module)
    quiet_trainer(algorithm=FedAvg(), max_rounds=1).fit(module, clients(batch_size=50))
    assert not identical(weights(module), before)
