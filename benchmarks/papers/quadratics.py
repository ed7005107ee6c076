"""What algorithms converge to on quadratics, against closed forms: no randomness, float64, to 1e-8.

Client k has F_k(x) = h/2 (x - e_k)^2 with weights p = (.5, .3, .2), optima e = (0, 1, 10) and local steps (1, 5, 20).
SCAFFOLD's pair is x^2/2 + 10 x and -10 x. The closed forms stand beside the rows that use them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.papers.rows import Row
from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import AFL, Algorithm, Ditto, FedAvg, FedDyn, FedNova, FedProx, QFedAvg, Scaffold

__all__ = ["Quadratic", "clients", "run", "scaffold_by_hand", "trajectory"]

WEIGHTS, OPTIMA, STEPS = (0.5, 0.3, 0.2), (0.0, 1.0, 10.0), (1, 5, 20)
TOLERANCE = 1e-8
Example = tuple[float, float]


class Quadratic(pl.LightningModule):
    """One parameter; an example (h, l) is the loss h/2 x^2 - l x."""

    def __init__(self, start: float = 0.0, lr: float = 0.01) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h, slope = batch[0].unbind(-1)
        return (h / 2 * self.x**2 - slope * self.x).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.x], self.lr)


class Positive(Quadratic):
    """The same, above zero: q-FedAvg raises losses to a power, and AFL compares them."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h, slope = batch[0].unbind(-1)
        return (h / 2 * (self.x - slope / h) ** 2).mean()


class Recorder(pl.Callback):
    """The global parameter after every round, and the clients' own models while the store is open."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.personal: dict[Any, float] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self.values.append(pl_module.x.item())
        store = trainer.federated_fit.federation.store
        for client_id in trainer.round_history[-1].cohort if trainer.round_history else []:
            memory = store.get(client_id) or {}
            if "personal" in memory:
                self.personal[client_id] = memory["personal"]["x"].item()


def clients(examples: Sequence[Example], steps: Sequence[int]) -> dict[str, DataLoader[Any]]:
    """Return a loader for each client: its example, once for each of its steps."""
    return {
        name: DataLoader(TensorDataset(torch.tensor([example] * count, dtype=torch.float64)), batch_size=1)
        for name, example, count in zip("abc", examples, steps, strict=False)
    }


def trajectory(
    algorithm: Algorithm, data: Mapping[str, Any], rounds: int, module: Quadratic, loop: str = "auto"
) -> Recorder:
    """Train through ``FederatedTrainer`` and return what was seen after each round."""
    recorder = Recorder()
    trainer = FederatedTrainer(
        algorithm=algorithm, max_rounds=rounds, callbacks=[recorder], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_clients=False,
        local_loop=loop,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(module, data)
    return recorder


def scaffold_by_hand(option: str, rounds: int, x: float = 1.0, lr: float = 0.05, steps: int = 10) -> list[float]:
    """SCAFFOLD's algorithm 1 on its pair, number by number."""
    problems = [(1.0, -10.0), (0.0, 10.0)]
    control, own, values = 0.0, [0.0, 0.0], []
    for _ in range(rounds):
        ends, changes = [], []
        for k, (h, slope) in enumerate(problems):
            y = x
            for _ in range(steps):
                y -= lr * ((h * y - slope) - own[k] + control)
            new = h * x - slope if option == "I" else own[k] - control + (x - y) / (steps * lr)
            changes.append(new - own[k])
            own[k] = new
            ends.append(y)
        x = sum(ends) / 2
        control += sum(changes) / 2
        values.append(x)
    return values


def run(options: argparse.Namespace) -> list[Row]:
    loop = options.local_loop
    return [*_inconsistency(loop), *_drift(loop), *_others(loop), *_neutral(loop)]


def shares(update: Any) -> float:
    """Weigh the three clients by p, whatever the size of their data."""
    return dict(zip("abc", WEIGHTS, strict=True))[update.client_id]


def _inconsistency(loop: str) -> list[Row]:
    data = clients([(1.0, e) for e in OPTIMA], STEPS)
    moved = [1 - (1 - 0.01) ** steps for steps in STEPS]  # how far local training goes towards e_k
    avg = _mean([p * c for p, c in zip(WEIGHTS, moved, strict=True)])
    nova = _mean([p * c / t for p, c, t in zip(WEIGHTS, moved, STEPS, strict=True)])
    curvatures, mu = (1.0, 2.0, 0.5), 0.5
    prox = _mean([p * h / (h + mu) for p, h in zip(WEIGHTS, curvatures, strict=True)])
    # 300 steps are an exact local solve
    solved = clients([(h, h * e) for h, e in zip(curvatures, OPTIMA, strict=True)], (300, 300, 300))
    return [
        _row("FedAvg, unequal steps", trajectory(FedAvg(weights=shares), data, 400, Quadratic(), loop), avg),
        _row("FedNova, unequal steps", trajectory(FedNova(weights=shares), data, 400, Quadratic(), loop), nova),
        _row(
            "FedProx mu=.5, exact local solves",
            trajectory(FedProx(mu, weights=shares), solved, 40, Quadratic(lr=0.2), loop),
            prox,
        ),
    ]


def _drift(loop: str) -> list[Row]:
    data = clients([(1.0, -10.0), (0.0, 10.0)], (10, 10))
    kept = (1 - 0.05) ** 10
    # one client goes from x to kept x - 10 (1 - kept), the other to x + 5
    stuck = (5 - 10 * (1 - kept)) / (1 - kept)
    rows = [_row("FedAvg on SCAFFOLD's pair", _pair(FedAvg(weights="uniform"), data, 200, loop), stuck)]
    for option in ("I", "II"):
        recorder, expected = _pair(Scaffold(option), data, 200, loop), scaffold_by_hand(option, 200)  # type: ignore[arg-type]
        rows += [
            _compared(f"SCAFFOLD option {option}, x{n}", recorder.values[n - 1], expected[n - 1]) for n in (1, 2, 5)
        ]
        rows.append(_row(f"SCAFFOLD option {option}, the end", recorder, 0.0))
    return rows


def _pair(algorithm: Algorithm, data: Mapping[str, Any], rounds: int, loop: str) -> Recorder:
    return trajectory(algorithm, data, rounds, Quadratic(1.0, 0.05), loop)


def _others(loop: str) -> list[Row]:
    examples = [(1.0, e) for e in OPTIMA]
    rows = [
        _row(
            f"FedDyn, uniform weights, steps {steps}",
            trajectory(FedDyn(alpha), clients(examples, steps), 60, Quadratic(lr=lr), loop),
            11 / 3,
        )
        for steps, alpha, lr in ((STEPS, 1.0, 0.4), ((4, 4, 4), 0.5, 0.3))
    ]
    rows += [
        _row(
            f"AFL, steps {steps}",
            trajectory(AFL(step_size=0.005), clients(examples, steps), 100, Positive(lr=0.8), loop),
            5.0,
        )
        for steps in (STEPS, (1, 1, 1))
    ]
    return rows


def _neutral(loop: str) -> list[Row]:
    """The same bits, so the difference must be zero and not small."""
    data = clients([(1.0, e) for e in OPTIMA], STEPS)
    avg = trajectory(FedAvg(), data, 20, Positive(2.0, 0.1), loop).values
    fair = trajectory(QFedAvg(q=0.0), data, 20, Positive(2.0, 0.1), loop).values
    ditto = trajectory(Ditto(lam=0.0), data, 20, Quadratic(2.0, 0.1), loop).personal
    local = _local_training(OPTIMA[1], 20 * STEPS[1])
    return [
        _exact("q-FFL at q=0 is FedAvg, 20 rounds", max(abs(a - b) for a, b in zip(avg, fair, strict=True))),
        _exact("Ditto at lambda=0 is local training, 20 rounds", abs(ditto["b"] - local)),
    ]


def _local_training(optimum: float, steps: int) -> float:
    """Plain torch, one client on its own."""
    x = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([x], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (1.0 / 2 * x**2 - optimum * x).mean().backward()
        optimizer.step()
    return x.item()


def _mean(pulls: Sequence[float]) -> float:
    return sum(w * e for w, e in zip(pulls, OPTIMA, strict=True)) / sum(pulls)


def _row(what: str, recorder: Recorder, closed: float) -> Row:
    return _compared(f"{what}", recorder.values[-1], closed)


def _compared(what: str, ours: float, closed: float) -> Row:
    return Row(what, f"{ours:.10f}", f"{closed:.10f}", "± 1e-8", abs(ours - closed) <= TOLERANCE)


def _exact(what: str, difference: float) -> Row:
    return Row(what, f"difference {difference:g}", "difference 0", "the same bits", difference == 0.0)
