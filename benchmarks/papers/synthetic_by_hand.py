"""The same federations, cohorts and stragglers without a Trainer: softmax regression by hand in NumPy.

Written from FedProx's algorithm, as a second opinion on what :mod:`benchmarks.papers.synthetic` measures. Batches are
shuffled by other numbers, so accuracies agree within a hundredth and not to the bit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.rows import Row
from benchmarks.papers.stragglers import Plan
from benchmarks.papers.synthetic import DATA
from fl_lightning.data.synthetic import SyntheticDataModule
from fl_lightning.types import ClientId

__all__ = ["Device", "accuracy", "devices", "run", "simulate", "train"]

Array = NDArray[np.float64]
_RATE, _EPOCHS, _LAST = 0.01, 20, 20


@dataclass(frozen=True)
class Device:
    """Examples of one device, with a feature that is always 1 for the bias.

    Args:
        inputs: ``(examples, 61)`` to train on.
        labels: ``(examples, 10)``, one-hot.
        test_inputs: ``(test examples, 61)``.
        test_labels: ``(test examples,)``.
    """

    inputs: Array
    labels: Array
    test_inputs: Array
    test_labels: NDArray[np.int64]


def devices(data: SyntheticDataModule) -> dict[ClientId, Device]:
    """Return the examples of all devices."""
    found = {}
    for client_id in data.client_ids():
        tensors = [*data.client_dataloader(client_id).dataset.tensors]  # type: ignore[attr-defined]
        test = data.client_test_dataloader(client_id)
        assert test is not None  # the recipe keeps a tenth of every device
        inputs, test_inputs = (
            np.pad(t.double().numpy(), ((0, 0), (0, 1)), constant_values=1.0)
            for t in (tensors[0], test.dataset.tensors[0])  # type: ignore[attr-defined]
        )
        test_labels = test.dataset.tensors[1].numpy()  # type: ignore[attr-defined]
        found[client_id] = Device(inputs, np.eye(10)[tensors[1].numpy()], test_inputs, test_labels)
    return found


def train(start: Array, device: Device, epochs: int, mu: float, batch_size: int, draw: np.random.Generator) -> Array:
    """Return what a device makes of the model by SGD on its loss and the proximal term."""
    weights = start.copy()
    for _ in range(epochs):
        order = draw.permutation(len(device.labels))
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            scores = device.inputs[batch] @ weights
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            gradient = device.inputs[batch].T @ (shares - device.labels[batch]) / len(batch)
            weights -= _RATE * (gradient + mu * (weights - start))
    return weights


def accuracy(weights: Array, all_devices: Mapping[ClientId, Device]) -> float:
    """Return the accuracy on all devices' test examples."""
    right = [(d.test_inputs @ weights).argmax(axis=1) == d.test_labels for d in all_devices.values()]
    return float(np.concatenate(right).mean())


def simulate(
    all_devices: Mapping[ClientId, Device], plan: Plan, mu: float, drop: bool, start: Array, batch_size: int = 10
) -> list[Array]:
    """Return the global model after every round.

    Args:
        all_devices: by id.
        plan: who is asked, and who is slow.
        mu: strength of the proximal term.
        drop: whether slow devices are left out, as FedAvg does.
        start: ``(61, 10)``.
        batch_size: examples in a batch.
    """
    models, weights = [], start
    for round, cohort in enumerate(plan.fast() if drop else plan.cohorts):
        summed, examples = np.zeros_like(start), 0
        for client_id in cohort:
            device, draw = all_devices[client_id], np.random.default_rng([round, int(client_id)])
            epochs = plan.epochs[round].get(client_id, _EPOCHS)
            summed += len(device.labels) * train(weights, device, epochs, mu, batch_size, draw)
            examples += len(device.labels)
        weights = summed / examples
        models.append(weights)
    return models


def run(options: argparse.Namespace) -> list[Row]:
    rows = []
    for name in options.data:
        for slow in options.stragglers:
            ends: dict[str, list[float]] = {}
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                for label, value in _ends(options, name, slow, seed).items():
                    ends.setdefault(label, []).append(value)
                print(
                    f"({name}) {slow:.0%} seed {seed}: { ({k: round(v[-1], 3) for k, v in ends.items()}) }", flush=True
                )
            rows += [_row(f"synthetic({name}), {slow:.0%} stragglers: {label}", ends[label]) for label in ends]
    return rows


def _ends(options: argparse.Namespace, name: str, slow: float, seed: int) -> dict[str, float]:
    data = SyntheticDataModule(**DATA[name], seed=seed)
    everyone, plan = devices(data), Plan.draw(data.client_ids(), options.rounds, 10, slow, _EPOCHS, seed)
    contenders = {"FedAvg": (0.0, True), **{f"FedProx mu={mu:g}": (mu, False) for mu in options.mu if mu or slow}}
    found = {}
    for label, (mu, drop) in contenders.items():
        models = simulate(everyone, plan, mu, drop, np.zeros((61, 10)))
        found[label] = statistics.mean(accuracy(weights, everyone) for weights in models[-_LAST:])
    return found


def _row(what: str, values: Sequence[float]) -> Row:
    each = ", ".join(f"{value:.3f}" for value in values)
    return Row(what, f"acc {statistics.mean(values):.3f} ({each})", "by hand, for comparison")
