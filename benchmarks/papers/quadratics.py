"""What algorithms converge to on quadratics, against closed forms: no randomness, float64, to 1e-8.

Client k has F_k(x) = h/2 (x - e_k)^2 with weights p = (.5, .3, .2), optima e = (0, 1, 10) and local steps (1, 5, 20).
SCAFFOLD's pair is x^2/2 + 10 x and -10 x. The closed forms stand beside the rows that use them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.papers.rows import Row
from benchmarks.papers.training import draw, federate
from fl_lightning.algorithms import AFL, Algorithm, Ditto, FedAvg, FedDyn, FedNova, FedProx, QFedAvg, Scaffold
from fl_lightning.types import ClientUpdate

__all__ = ["Laboratory", "Quadratic", "clients", "compared", "run", "scaffold_by_hand"]

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

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(pl_module.x.item())
        pl_module.log("x", self.values[-1])
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


class Laboratory:
    """Runs algorithms on quadratics and keeps what they do.

    Args:
        folder: where their curves go.
        loop: ``local_loop``.
    """

    def __init__(self, folder: Path, loop: Literal["auto", "lightning", "lean"] = "auto") -> None:
        self.folder, self.loop = folder, loop
        self.curves: dict[str, list[float]] = {}

    def run(self, what: str, algorithm: Algorithm, data: Mapping[str, Any], rounds: int, module: Quadratic) -> Recorder:
        """Train through ``FederatedTrainer`` and return what was seen after each round."""
        recorder = Recorder()
        federate(
            module, data, algorithm, self.folder, what, 0, max_rounds=rounds, callbacks=[recorder], local_loop=self.loop
        )
        self.curves[what] = recorder.values
        return recorder

    def row(
        self, what: str, algorithm: Algorithm, data: Mapping[str, Any], rounds: int, module: Quadratic, closed: float
    ) -> Row:
        """Compare where an algorithm ends with a closed form."""
        return compared(what, self.run(what, algorithm, data, rounds, module).values[-1], closed)


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
    laboratory = Laboratory(options.output / "quadratics", options.local_loop)
    rows = [row for part in (_inconsistency, _drift, _others, _neutral) for row in part(laboratory)]
    for name, labels in {
        "inconsistency": ("FedAvg, unequal steps", "FedNova, unequal steps"),
        "drift": ("FedAvg on SCAFFOLD's pair", "SCAFFOLD option I", "SCAFFOLD option II"),
    }.items():
        curves = {label: laboratory.curves[label] for label in labels}
        draw(laboratory.folder / f"{name}.png", curves, "x", f"quadratics: {name}")
    return rows


def shares(update: ClientUpdate) -> float:
    """Weigh the three clients by p, whatever the size of their data."""
    return dict(zip("abc", WEIGHTS, strict=True))[str(update.client_id)]


def _inconsistency(laboratory: Laboratory) -> list[Row]:
    data = clients([(1.0, e) for e in OPTIMA], STEPS)
    moved = [1 - (1 - 0.01) ** steps for steps in STEPS]  # how far local training goes towards e_k
    avg = _mean([p * c for p, c in zip(WEIGHTS, moved, strict=True)])
    nova = _mean([p * c / t for p, c, t in zip(WEIGHTS, moved, STEPS, strict=True)])
    curvatures, mu = (1.0, 2.0, 0.5), 0.5
    prox = _mean([p * h / (h + mu) for p, h in zip(WEIGHTS, curvatures, strict=True)])
    # 300 steps are an exact local solve
    solved = clients([(h, h * e) for h, e in zip(curvatures, OPTIMA, strict=True)], (300, 300, 300))
    proximal = FedProx(mu, weights=shares)
    return [
        laboratory.row("FedAvg, unequal steps", FedAvg(weights=shares), data, 400, Quadratic(), avg),
        laboratory.row("FedNova, unequal steps", FedNova(weights=shares), data, 400, Quadratic(), nova),
        laboratory.row("FedProx mu=.5, exact local solves", proximal, solved, 40, Quadratic(lr=0.2), prox),
    ]


def _drift(laboratory: Laboratory) -> list[Row]:
    data = clients([(1.0, -10.0), (0.0, 10.0)], (10, 10))
    kept = (1 - 0.05) ** 10
    # one client goes from x to kept x - 10 (1 - kept), the other to x + 5
    stuck = (5 - 10 * (1 - kept)) / (1 - kept)
    average = FedAvg(weights="uniform")
    rows = [laboratory.row("FedAvg on SCAFFOLD's pair", average, data, 200, Quadratic(1.0, 0.05), stuck)]
    options: tuple[Literal["I", "II"], ...] = ("I", "II")
    for option in options:
        what = f"SCAFFOLD option {option}"
        values = laboratory.run(what, Scaffold(option), data, 200, Quadratic(1.0, 0.05)).values
        expected = scaffold_by_hand(option, 200)
        rows += [compared(f"{what}, x{n}", values[n - 1], expected[n - 1]) for n in (1, 2, 5)]
        rows.append(compared(f"{what}, the end", values[-1], 0.0))
    return rows


def _others(laboratory: Laboratory) -> list[Row]:
    examples = [(1.0, e) for e in OPTIMA]
    rows = []
    for steps, alpha, lr in ((STEPS, 1.0, 0.4), ((4, 4, 4), 0.5, 0.3)):
        what = f"FedDyn, uniform weights, steps {steps}"
        rows.append(laboratory.row(what, FedDyn(alpha), clients(examples, steps), 60, Quadratic(lr=lr), 11 / 3))
    for steps in (STEPS, (1, 1, 1)):
        data = clients(examples, steps)
        rows.append(laboratory.row(f"AFL, steps {steps}", AFL(step_size=0.005), data, 100, Positive(lr=0.8), 5.0))
    return rows


def _neutral(laboratory: Laboratory) -> list[Row]:
    """The same bits, so the difference must be zero and not small."""
    data = clients([(1.0, e) for e in OPTIMA], STEPS)
    avg = laboratory.run("FedAvg", FedAvg(), data, 20, Positive(2.0, 0.1)).values
    fair = laboratory.run("q-FFL at q=0", QFedAvg(q=0.0), data, 20, Positive(2.0, 0.1)).values
    ditto = laboratory.run("Ditto at lambda=0", Ditto(lam=0.0), data, 20, Quadratic(2.0, 0.1)).personal
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
        (1.0 / 2 * x**2 - optimum * x).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return x.item()


def _mean(pulls: Sequence[float]) -> float:
    return sum(w * e for w, e in zip(pulls, OPTIMA, strict=True)) / sum(pulls)


def compared(what: str, ours: float, closed: float) -> Row:
    """Return a row that is met when both agree to 1e-8."""
    return Row(what, f"{ours:.10f}", f"{closed:.10f}", "± 1e-8", abs(ours - closed) <= TOLERANCE)


def _exact(what: str, difference: float) -> Row:
    return Row(what, f"difference {difference:g}", "difference 0", "the same bits", difference == 0.0)
