"""The papers' claims as numbers: what each algorithm converges to on quadratics, in closed form.

F_k(x) = h_k/2 (x - e_k)^2, weights p = (.5, .3, .2), optima e = (0, 1, 10), local steps (1, 5, 20), lr .01. One round
of FedAvg maps x - e_k to (1 - lr h_k)^tau_k (x - e_k) on each client, so with c_k = 1 - (1 - lr h_k)^tau_k its fixed
point is sum(p c e) / sum(p c); FedNova divides c_k by tau_k.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from quadratics import (
    OPTIMA,
    STEPS,
    WEIGHTS,
    Quadratic,
    client,
    fixed_point,
    parabola,
    quiet_trainer,
    shares,
    trajectory,
    unequal,
)
from torch.utils.data import DataLoader

from fl_lightning.algorithms import FedAvg, FedDyn, FedNova, FedProx, MimeLite, Scaffold
from fl_lightning.callbacks import GradientClip
from fl_lightning.schedules import FixedSampler
from fl_lightning.types import ClientTask, ClientUpdate


def weighted_fixed_point(factors: list[float]) -> float:
    pulls = [p * c for p, c in zip(WEIGHTS, factors, strict=True)]
    return sum(c * e for c, e in zip(pulls, OPTIMA, strict=True)) / sum(pulls)


def contraction(steps: int, lr: float = 0.01, h: float = 1.0) -> float:
    return 1 - (1 - lr * h) ** steps


def test_fedavg_converges_to_another_objective() -> None:
    closed = weighted_fixed_point([contraction(steps) for steps in STEPS])
    assert closed == pytest.approx(6.7512174750, abs=1e-9)
    values = trajectory(FedAvg(weights=shares), unequal(), rounds=40)
    assert fixed_point(values) == pytest.approx(closed, abs=1e-8)
    # and it gets there: the distance shrinks by the factor of the closed form in every round
    factor = 1 - sum(p * contraction(steps) for p, steps in zip(WEIGHTS, STEPS, strict=True))
    assert values[-1] - closed == pytest.approx(-closed * factor**40, rel=1e-10)


def test_fednova_almost_removes_the_inconsistency() -> None:
    closed = weighted_fixed_point([contraction(steps) / steps for steps in STEPS])
    assert closed == pytest.approx(2.1666591591, abs=1e-9)
    values = trajectory(FedNova(weights=shares), unequal(), rounds=3)
    assert fixed_point(values) == pytest.approx(closed, abs=1e-8)


def test_local_steps_by_override_equal_local_steps_by_data() -> None:
    clients = {name: client(parabola(1.0, e)) for name, e in zip("abc", OPTIMA, strict=True)}
    overrides = {name: {"steps": steps} for name, steps in zip("abc", STEPS, strict=True)}
    by_override = trajectory(FedNova(weights=shares), clients, rounds=3, client_overrides=overrides)
    assert by_override == trajectory(FedNova(weights=shares), unequal(), rounds=3)


@pytest.mark.parametrize("rate", [1e-4, 1e-5])
def test_small_steps_show_the_bias_of_fedavg_and_its_absence_in_fednova(rate: float) -> None:
    module = partial(Quadratic, lr=rate)
    avg = fixed_point(trajectory(FedAvg(weights=shares), unequal(), rounds=2, module=module()))
    nova = fixed_point(trajectory(FedNova(weights=shares), unequal(), rounds=2, module=module()))
    optimum = sum(p * e for p, e in zip(WEIGHTS, OPTIMA, strict=True))
    assert avg == pytest.approx(6.916667, abs=20 * rate)
    assert nova == pytest.approx(optimum, abs=20 * rate)
    assert optimum == pytest.approx(2.3)


@pytest.mark.parametrize(
    ("momentum", "mu", "decay"),
    [(0.0, 0.0, 1.0), (0.9, 0.0, 1.0), (0.5, 0.0, 0.9), (0.0, 2.0, 1.0), (0.0, 0.0, 0.8), (0.9, 1.0, 0.95)],
)
def test_fednova_leaves_the_same_fixed_point_for_small_rates_whatever_the_local_solver(
    momentum: float, mu: float, decay: float
) -> None:
    module = Quadratic(lr=1e-5, momentum=momentum, decay=decay)
    values = trajectory(FedNova(mu=mu, weights=shares), unequal(), rounds=2, module=module)
    assert fixed_point(values) == pytest.approx(2.3, abs=2e-2)
    with_fedprox = trajectory(FedProx(mu=mu, weights=shares), unequal(), rounds=2, module=module)
    assert fixed_point(with_fedprox) > 4  # the inconsistency that is to be removed


def test_fednova_is_consistent_for_unequal_learning_rates() -> None:
    overrides = {"a": {"lr": 4e-5}, "b": {"lr": 1e-5}, "c": {"lr": 3e-5}}
    values = trajectory(FedNova(weights=shares), unequal(), rounds=2, client_overrides=overrides)
    assert fixed_point(values) == pytest.approx(2.3, abs=2e-2)


def test_fednova_takes_a_server_momentum() -> None:
    momentum = FedNova(weights=shares, server_optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.5))
    plain = trajectory(FedNova(weights=shares), unequal(), rounds=2)
    heavy = trajectory(momentum, unequal(), rounds=2)
    assert heavy[1] == plain[1]
    # v2 = .5 v1 + step(x1), and x1 is the same in both
    assert heavy[2] == pytest.approx(plain[2] + 0.5 * (plain[1] - plain[0]), abs=1e-12)


def drifting(steps: int = 10) -> dict[str, DataLoader[Any]]:
    """f1 = x^2/2 + 10 x and f2 = -10 x: opposite slopes, different curvatures, optimum 0."""
    return {"one": client((1.0, -10.0, 0.0), steps), "two": client((0.0, 10.0, 0.0), steps)}


def test_fedavg_sticks_on_the_drifting_pair() -> None:
    values = trajectory(FedAvg(weights="uniform"), drifting(), rounds=3, module=Quadratic(1.0, 0.05))
    assert fixed_point(values) == pytest.approx(2.46065359, abs=1e-8)


@pytest.mark.parametrize(
    ("option", "expected"),
    [("I", {1: 1.29305, 2: 1.00894, 5: 0.455932}), ("II", {1: 1.29305, 2: 1.06256, 5: 0.490904})],
)
def test_scaffold_follows_the_table_and_reaches_the_optimum(option: Any, expected: dict[int, float]) -> None:
    values = trajectory(Scaffold(option), drifting(), rounds=30, module=Quadratic(1.0, 0.05))
    for round, value in expected.items():
        assert values[round] == pytest.approx(value, rel=1e-5)
    assert values == pytest.approx(scaffold_by_hand(option, rounds=30), abs=1e-12)
    assert abs(scaffold_by_hand(option, rounds=200)[-1]) < 1e-8


def scaffold_by_hand(option: str, rounds: int, x: float = 1.0, lr: float = 0.05, steps: int = 10) -> list[float]:
    """Algorithm 1 of the paper on the drifting pair, number by number."""
    problems = [(1.0, -10.0), (0.0, 10.0)]
    control, own, values = 0.0, [0.0, 0.0], [x]
    for _ in range(rounds):
        ends, changes = [], []
        for k, (h, linear) in enumerate(problems):
            y = x
            for _ in range(steps):
                y -= lr * ((h * y - linear) - own[k] + control)
            new = h * x - linear if option == "I" else own[k] - control + (x - y) / (steps * lr)
            changes.append(new - own[k])
            own[k] = new
            ends.append(y)
        x = sum(ends) / 2
        control += sum(changes) / 2
        values.append(x)
    return values


@pytest.mark.parametrize("mu", [0.0, 0.5, 3.0])
def test_fedprox_with_exact_local_solves(mu: float) -> None:
    curvatures = (1.0, 2.0, 0.5)
    module = Quadratic(lr=0.2)
    overrides = {name: {"steps": 300} for name in "abc"}
    values = trajectory(
        FedProx(mu, weights=shares), unequal(curvatures), rounds=2, module=module, client_overrides=overrides
    )
    # the local solve goes h/(h + mu) of the way to the client's optimum
    pulls = [p * h / (h + mu) for p, h in zip(WEIGHTS, curvatures, strict=True)]
    closed = sum(w * e for w, e in zip(pulls, OPTIMA, strict=True)) / sum(pulls)
    assert values[1] == pytest.approx(sum(w * e for w, e in zip(pulls, OPTIMA, strict=True)), abs=1e-8)
    assert fixed_point(values) == pytest.approx(closed, abs=1e-8)


@pytest.mark.parametrize(("steps", "alpha", "rate"), [(STEPS, 1.0, 0.4), ((4, 4, 4), 0.5, 0.3)])
def test_feddyn_reaches_the_true_optimum_for_any_number_of_steps(
    steps: tuple[int, ...], alpha: float, rate: float
) -> None:
    clients = {n: client(parabola(1.0, e), tau) for n, e, tau in zip("abc", OPTIMA, steps, strict=True)}
    values = trajectory(FedDyn(alpha), clients, rounds=40, module=Quadratic(lr=rate))
    assert values[-1] == pytest.approx(sum(OPTIMA) / 3, abs=1e-8)
    if steps == STEPS:  # where FedAvg does not
        assert abs(fixed_point(trajectory(FedAvg(weights="uniform"), clients, 2, Quadratic(lr=rate))) - 11 / 3) > 0.5


def test_feddyn_follows_the_paper_number_by_number() -> None:
    alpha, lr, x, h, own = 0.5, 0.1, 2.0, 0.0, [0.0, 0.0, 0.0]
    expected = [x]
    for _ in range(4):
        moves = []
        for k, (e, steps) in enumerate(zip(OPTIMA, STEPS, strict=True)):
            y = x
            for _ in range(steps):
                y -= lr * ((y - e) - own[k] + alpha * (y - x))
            own[k] -= alpha * (y - x)
            moves.append(y - x)
        h -= alpha * sum(moves) / 3
        x = x + sum(moves) / 3 - h / alpha
        expected.append(x)
    values = trajectory(FedDyn(alpha), unequal(), rounds=4, module=Quadratic(2.0, lr))
    assert values == pytest.approx(expected, abs=1e-12)


def two_of_four(algorithm: Any) -> list[float]:
    """Optima 2, 6, 10 and 14; one step of lr .5 each; the first two take part, then the others, then the first."""
    clients = {name: client(parabola(1.0, e)) for name, e in zip("abcd", (2.0, 6.0, 10.0, 14.0), strict=True)}
    sampler = FixedSampler([["a", "b"], ["c", "d"]])
    return trajectory(algorithm, clients, rounds=3, module=Quadratic(0.0, 0.5), sampler=sampler)


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_moves_the_global_control_variate_by_the_share_of_those_who_took_part(option: Any) -> None:
    """Round 0: ends 1 and 3, c_a = -2, c_b = -6, c = -8/4. Round 1 at 2: gradients -8 - 2 and -12 - 2, ends 7 and 9,
    c = -2 - 20/4. Round 2 at 8: gradients 6 + 2 - 7 and 2 + 6 - 7, ends 7.5."""
    assert two_of_four(Scaffold(option)) == [0.0, 2.0, 8.0, 7.5]


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_feddyn_divides_what_came_by_all_clients(alpha: float) -> None:
    """Round 0: moves 1 and 3, h = -alpha 4/4, so 0 + 2 + 1. Round 1 at 3: moves 3.5 and 5.5, h/alpha = -1 - 9/4, so
    3 + 4.5 + 3.25. Round 2 at 10.75: gradients 8.75 + alpha and 4.75 + 3 alpha."""
    moves = (-0.5 * (8.75 + alpha), -0.5 * (4.75 + 3 * alpha))
    last = 10.75 + sum(moves) / 2 + 3.25 + sum(moves) / 4
    assert two_of_four(FedDyn(alpha)) == [0.0, 3.0, 10.75, last]


@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_mimelite_follows_the_paper_number_by_number(beta: float) -> None:
    lr, x, momentum = 0.1, 2.0, 0.0
    expected = [x]
    for _ in range(5):
        moves, gradient = 0.0, 0.0
        for p, e, steps in zip(WEIGHTS, OPTIMA, STEPS, strict=True):
            y = x
            for _ in range(steps):
                y -= lr * ((1 - beta) * (y - e) + beta * momentum)
            moves += p * (y - x)
            gradient += p * (x - e)
        x += moves
        momentum = beta * momentum + (1 - beta) * gradient
        expected.append(x)
    values = trajectory(MimeLite(beta, weights=shares), unequal(), rounds=5, module=Quadratic(2.0, lr))
    assert values == pytest.approx(expected, abs=1e-12)


def test_adaptive_fedprox_raises_mu_while_the_loss_rises_and_lowers_it_after_five_better_rounds() -> None:
    algorithm = FedProx(mu=0.2, adaptive=True)
    state, memory = algorithm.init_state({}), {}
    seen = []
    for loss in [3.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 1.2, 1.2]:
        update = ClientUpdate("a", {}, {}, num_examples=2, num_steps=1, extra={"start_loss": loss})
        total, memory = algorithm.contribute(update, ClientTask("a", 0, 0, {}, seed=0), memory)
        _, state = algorithm.apply(total, state, num_clients=3)
        seen.append(round(state["mu"], 6))
    assert seen == [0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.2, 0.2, 0.3, 0.3]


def test_adaptive_fedprox_is_not_misled_by_unlike_cohorts() -> None:
    """Losses of two clients, near 0 and near 50, that take turns: each falls, from round to round they jump."""
    clients = {"low": client(parabola(1.0, 1.0)), "high": client(parabola(1.0, 10.0))}

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            mus.append(round(trainer.federated_fit.federation.state["mu"], 6))

    for lr, expected in ((0.01, [0.3] * 6 + [0.2] * 4), (2.5, [0.3, 0.3, 0.4, 0.5])):
        mus: list[float] = []
        trainer = quiet_trainer(
            algorithm=FedProx(0.3, adaptive=True), max_rounds=len(expected), callbacks=[Watch()],
            sampler=FixedSampler([["high"], ["low"]]),
        )  # fmt: skip
        trainer.fit(Quadratic(0.0, lr), clients)
        assert mus == expected


def test_adaptive_fedprox_measures_the_loss_of_the_global_model() -> None:
    # lr 2.2 on (x - 1)^2 / 2 multiplies the distance by -1.2: the loss rises in every round
    clients = {"a": client(parabola(1.0, 1.0))}
    values = trajectory(FedProx(mu=0.0, adaptive=True), clients, rounds=3, module=Quadratic(0.0, 2.2))
    assert values[1] - 1 == pytest.approx(1.2)
    assert values[2] - 1 == pytest.approx(-(1.2**2))
    # one local step starts at the global model, where the proximal term is zero: only a second step feels it
    two = {"a": client(parabola(1.0, 1.0), 2)}
    values = trajectory(FedProx(mu=0.0, adaptive=True), two, rounds=3, module=Quadratic(0.0, 2.2))
    plain = trajectory(FedAvg(), two, rounds=3, module=Quadratic(0.0, 2.2))
    assert values[:3] == plain[:3]
    assert values[3] != plain[3]


@pytest.mark.parametrize("loop", ["lean", "lightning"])
@pytest.mark.parametrize("where", ["callback", "trainer"])
def test_scaffold_and_fednova_with_clipping_are_what_their_pages_say(where: str, loop: Any) -> None:
    """Plain numbers: a callback clips gradients before SCAFFOLD corrects them, the Trainer's argument afterwards."""

    def clip(g: float) -> float:
        return max(-limit, min(limit, g))

    lr, limit, x, c, rounds = 0.1, 0.8, 2.0, 0.0, 4
    own, expected, nova, y = [0.0] * 3, [], [], 2.0
    for _ in range(rounds):
        moves, changes, steps_of = [], [], []
        for k, (e, steps) in enumerate(zip(OPTIMA, STEPS, strict=True)):
            w, v = x, y
            for _ in range(steps):
                g = w - e
                w -= lr * (clip(g) - own[k] + c if where == "callback" else clip(g - own[k] + c))
                v -= lr * clip(v - e)
            changes.append(-(w - x) / (lr * steps) - c)
            moves.append(w - x)
            steps_of.append((v - y, steps))
        x += sum(moves) / 3
        own = [before + change for before, change in zip(own, changes, strict=True)]
        c += sum(changes) / 3
        expected.append(x)
        y += sum(p * n for p, (_, n) in zip(WEIGHTS, steps_of, strict=True)) * sum(
            p * move / n for p, (move, n) in zip(WEIGHTS, steps_of, strict=True)
        )
        nova.append(y)
    arguments: dict[str, Any] = {"client_callbacks": [GradientClip(value=limit)]}
    if where == "trainer":
        arguments = {"gradient_clip_val": limit, "gradient_clip_algorithm": "value"}
    for algorithm, values in ((Scaffold("II"), expected), (FedNova(weights=shares), nova)):
        found = trajectory(algorithm, unequal(), rounds, Quadratic(2.0, lr), local_loop=loop, **arguments)
        assert found[1:] == pytest.approx(values, abs=1e-10)
