"""Who is slow in which round, and how much of the work a slow device gets done."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fl_lightning.algorithms import FedProx
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, ClientTask, Phase

__all__ = ["PartialWork", "Plan"]


@dataclass(frozen=True)
class Plan:
    """The cohorts of all rounds and the epochs of their slow devices.

    Args:
        cohorts: by round, the devices that are asked.
        epochs: by round, the epochs that each slow device gets done.
    """

    cohorts: list[list[ClientId]]
    epochs: list[dict[ClientId, int]]

    @classmethod
    def draw(cls, ids: Sequence[ClientId], rounds: int, per_round: int, slow: float, epochs: int, seed: int) -> Plan:
        """Draw a plan.

        Args:
            ids: all devices.
            rounds: how many rounds.
            per_round: devices of a cohort.
            slow: part of a cohort that is slow, in ``[0, 1)``.
            epochs: what everyone is asked for; slow devices do 1 to ``epochs - 1``, uniformly.
            seed: root of the plan.
        """
        cohorts, partial = [], []
        for round in range(rounds):
            draw = random.Random(seed_for(seed, round, None, "stragglers"))
            cohort = draw.sample(list(ids), per_round)
            cohorts.append(cohort)
            partial.append({device: draw.randint(1, epochs - 1) for device in cohort[: _count(per_round, slow)]})
        return cls(cohorts, partial)

    def fast(self) -> list[list[ClientId]]:
        """Return the cohorts without their slow devices."""
        return [[d for d in cohort if d not in slow] for cohort, slow in zip(self.cohorts, self.epochs, strict=True)]


def _count(per_round: int, slow: float) -> int:
    return per_round - round(per_round * (1 - slow))


class PartialWork(FedProx):
    """FedProx whose slow devices stop early and report what they have.

    Args:
        mu: strength of the proximal term.
        epochs: by round, the epochs of the slow devices.
    """

    def __init__(self, mu: float, epochs: Sequence[dict[ClientId, int]]) -> None:
        super().__init__(mu)
        self.epochs = epochs

    def phases(self, task: ClientTask) -> list[Phase]:
        return [Phase(epochs=self.epochs[task.round].get(task.client_id))]
