"""q-FedAvg and AFL: what they converge to, and whom they help."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import OPTIMA, STEPS, WEIGHTS, Quadratic, client, parabola, quiet_trainer, shares, trajectory, unequal
from torch import Tensor

from fl_lightning.algorithms import AFL, QFedAvg
from fl_lightning.algorithms.afl import simplex
from fl_lightning.schedules import FixedSampler
from fl_lightning.types import ClientTask, ClientUpdate, Contribution


def one_step() -> dict[str, Any]:
    return {name: client(parabola(1.0, e)) for name, e in zip("abc", OPTIMA, strict=True)}


@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_qfedavg_follows_the_paper_number_by_number(q: float) -> None:
    lr, x = 0.1, 2.0
    expected = [x]
    for _ in range(4):
        top, bottom = 0.0, 0.0
        for p, e, steps in zip(WEIGHTS, OPTIMA, STEPS, strict=True):
            loss = (x - e) ** 2 / 2
            local = e + (1 - lr) ** steps * (x - e)
            step = (x - local) / lr  # L (w - w_k), with L = 1 / lr
            top += p * loss**q * step
            bottom += p * (q * loss ** (q - 1) * step**2 + loss**q / lr)
        x -= top / bottom
        expected.append(x)
    values = trajectory(QFedAvg(q, weights=shares), unequal(), rounds=4, module=Quadratic(2.0, lr))
    assert values == pytest.approx(expected, abs=1e-10)


def test_qfedavg_reaches_the_fair_optimum_and_helps_the_worst_client() -> None:
    """The optimum of sum |x - e|^(2q + 2) is between the mean 11/3 (q = 0) and the middle 5 (q large)."""
    ends = [trajectory(QFedAvg(q, weights="uniform"), one_step(), 25, Quadratic(2.0, 0.5))[-1] for q in (0.0, 1.0, 4.0)]
    for q, end in zip((0.0, 1.0, 4.0), ends, strict=True):
        slope = sum(abs(end - e) ** (2 * q) * (end - e) for e in OPTIMA)
        curvature = sum((2 * q + 1) * abs(end - e) ** (2 * q) for e in OPTIMA)
        assert abs(slope / curvature) < 1e-3
    worst = [max((end - e) ** 2 / 2 for e in OPTIMA) for end in ends]
    spread = [torch.tensor([(end - e) ** 2 / 2 for e in OPTIMA]).var().item() for end in ends]
    assert worst == sorted(worst, reverse=True)
    assert spread == sorted(spread, reverse=True)
    assert worst[0] - worst[2] > 3


@pytest.mark.parametrize("steps", [STEPS, (1, 1, 1), (2, 2, 2)])
def test_afl_reaches_the_middle_of_the_extremes_for_any_number_of_steps(steps: tuple[int, ...]) -> None:
    data = {n: client(parabola(1.0, e), tau) for n, e, tau in zip("abc", OPTIMA, steps, strict=True)}
    values = trajectory(AFL(step_size=0.005), data, rounds=70, module=Quadratic(lr=0.8))
    assert values[-1] == pytest.approx(5.0, abs=1e-8)


def test_absent_clients_keep_their_share_of_the_mixture() -> None:
    algorithm, states = AFL(step_size=0.05), []

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            states.append(trainer.federated_fit.federation.state)

    sampler = FixedSampler([["a", "b"], ["b", "c"], ["a", "c"]])
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=6, sampler=sampler, callbacks=[Keep()])
    trainer.fit(Quadratic(2.0, 0.1), unequal())
    assert set(states[0]["shares"]) == {"'a'", "'b'"}
    assert states[1]["shares"]["'a'"] == states[0]["shares"]["'a'"]
    for state in states[1:]:
        assert sum(state["shares"].values()) == pytest.approx(1.0)
    assert sum(states[0]["shares"].values()) == pytest.approx(2 / 3)


def test_who_comes_later_has_the_share_of_everyone_in_a_uniform_mixture() -> None:
    """Two rounds by hand: of four clients, "a" alone, then "a" and "b", whose share is still a quarter."""
    algorithm = AFL(step_size=0.1)
    state = algorithm.init_state({})
    values = []
    for cohort in ({"a": (2.0, 5.0)}, {"a": (2.0, 5.0), "b": (-6.0, 1.0)}):
        broadcast, weight, delta, losses = algorithm.broadcast(state), 0.0, torch.zeros(1), {}
        for name, (move, loss) in cohort.items():
            update = ClientUpdate(name, {"w": torch.tensor([move])}, {}, 1, 1, extra={"start_loss": loss})
            sent, _ = algorithm.contribute(update, ClientTask(name, 0, 0, broadcast, seed=0), {})
            weight, delta = weight + sent.scalars["weight"], delta + sent.trees["delta"]["w"]
            losses.update({key: value for key, value in sent.scalars.items() if key != "weight"})
        gradient, state = algorithm.apply(Contribution({"delta": {"w": delta}}, {"weight": weight, **losses}), state, 4)
        values.append(-float(gradient["w"]))
    # alone, "a" keeps its quarter whatever its loss; then both move by half of the difference of their losses
    assert values == pytest.approx([2.0, (0.25 * 2.0 - 0.25 * 6.0) / 0.5])
    assert state["shares"] == pytest.approx({"'a'": 0.25 + 0.2, "'b'": 0.25 - 0.2})


def test_the_projection_is_the_nearest_point() -> None:
    draw = random.Random(0)
    for _ in range(50):
        values = [draw.gauss(0, 1) for _ in range(4)]
        total = draw.random()
        nearest = simplex(values, total)
        assert min(nearest) >= 0
        assert sum(nearest) == pytest.approx(total)
        # the condition of a projection: no point of the set lies in the direction that was cut off
        for _ in range(20):
            cuts = sorted(draw.random() for _ in range(3))
            other = [total * (b - a) for a, b in zip([0, *cuts], [*cuts, 1], strict=True)]
            gaps = zip(values, nearest, other, strict=True)
            assert sum((v - n) * (o - n) for v, n, o in gaps) <= 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QFedAvg(q=-1.0), "QFedAvg expected q to be a finite number >= 0, got -1.0; q=0 is FedAvg"),
        (lambda: QFedAvg(lipschitz=0.0), "QFedAvg expected lipschitz to be a finite number > 0"),
        (lambda: AFL(step_size=0.0), "AFL expected step_size to be a finite number > 0, got 0.0"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_qfedavg_needs_losses_above_zero_and_a_rate() -> None:
    task = ClientTask("a", 0, 0, {}, seed=0)

    def update(**extra: Any) -> ClientUpdate:
        return ClientUpdate("a", {"w": torch.ones(1)}, {}, num_examples=1, num_steps=1, extra=extra)

    with pytest.raises(MisconfigurationException, match=r"needs them > 0; the loss of client 'a' is -0.5"):
        QFedAvg().contribute(update(start_loss=-0.5, lr=0.1), task, {})
    with pytest.raises(MisconfigurationException, match=r"client 'a' has none: the optimizer is Adam.*lipschitz="):
        QFedAvg().contribute(update(start_loss=0.5, lr=0.0, no_a_norm="the optimizer is Adam"), task, {})
    contribution, _ = QFedAvg(1.0, lipschitz=2.0).contribute(update(start_loss=0.5, lr=0.0), task, {})
    assert contribution.scalars["weight"] == 0.5 + 2.0


def test_clients_without_loss_leave_the_model_where_it_is() -> None:
    class Perfect(Quadratic):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0.0 * self.x.sum()

    assert trajectory(QFedAvg(2.0), one_step(), rounds=2, module=Perfect(3.0)) == [3.0, 3.0, 3.0]
