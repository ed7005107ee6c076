"""Who takes part in a round: pure functions of (seed, round) and the ids that exist now."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.errors import NotEnoughClientsError
from fl_lightning.schedules.plan import Delivery, Plan
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, Population, RoundReport

__all__ = ["Patience", "Sampler", "UniformSampler", "cohort_size", "require_delivered", "require_enough"]


def cohort_size(clients_per_round: int | float | None, num_clients: int) -> int:
    """Return how many clients take part: a count, a fraction of those that exist (at least one), or everyone.

    Raises:
        MisconfigurationException: for a count below 1 or above ``num_clients``, or a fraction outside ``(0, 1]``.

    Example:
        >>> cohort_size(10, 100), cohort_size(0.25, 100), cohort_size(None, 100), cohort_size(0.001, 100)
        (10, 25, 100, 1)
    """
    if clients_per_round is None:
        return num_clients
    if isinstance(clients_per_round, float):
        return max(1, round(clients_per_round * num_clients))
    if clients_per_round > num_clients:
        raise MisconfigurationException(
            f"clients_per_round={clients_per_round} asks for more clients than exist ({num_clients}). "
            f"Use clients_per_round<={num_clients}, a fraction such as clients_per_round=0.1, or None for everyone."
        )
    return clients_per_round


class Sampler:
    """Chooses the cohort of a round. Subclasses are pure in ``(seed, round)`` and what :meth:`state_dict` returns."""

    ask: Callable[[Sequence[ClientId], int], Mapping[ClientId, float]] | None = None
    """While a federation runs: asks clients for the loss of the global model at the start of a round."""

    may_draw_nobody: bool = False
    """Whether an empty cohort is a round like any other, in which the model stays, and no mistake."""

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        """Return the ids of the clients that take part.

        Args:
            population: the clients that exist now.
            size: how many are wanted.
            seed: the federation's seed.
            round: 0-based round.
        """
        raise NotImplementedError(f"{type(self).__name__} must define cohort(population, size, seed, round).")

    def advice(self, num_clients: int) -> str:
        """Return what to do when the cohort is too small.

        Args:
            num_clients: how many clients exist.
        """
        return "Lower min_clients, choose more clients_per_round, or bring more clients into the population."

    def learn(self, plan: Plan, deliveries: Sequence[Delivery]) -> None:
        """Look at what came of a round, the same in every process; most samplers do not."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, for a checkpoint: tensors and primitives that later rounds do not change."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state_dict` returned."""


class UniformSampler(Sampler):
    """``size`` clients uniformly without replacement; the work does not grow with the population.

    Example:
        >>> class Million:
        ...     def client_ids(self): return range(10**6)
        ...     def client_dataloader(self, client_id): return []
        >>> UniformSampler().cohort(Million(), 3, seed=0, round=0) == UniformSampler().cohort(Million(), 3, 0, 0)
        True
    """

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        ids: Sequence[ClientId] = population.client_ids()
        if size >= len(ids):
            return list(ids)
        chosen = random.Random(seed_for(seed, round, None, "cohort")).sample(range(len(ids)), size)
        return [ids[index] for index in chosen]


def require_enough(available: int, min_clients: int, round: int, advice: str | None = None) -> None:
    """Raise when fewer than ``min_clients`` clients are there.

    Args:
        available: how many are there.
        min_clients: how many are needed.
        round: 0-based round.
        advice: what to do instead; ``None`` says what holds for most samplers.

    Raises:
        NotEnoughClientsError: names the round, what is there and what is needed.
    """
    if available < min_clients:
        raise NotEnoughClientsError(
            f"Round {round} needs min_clients={min_clients}, but only {available} "
            f"{'client is' if available == 1 else 'clients are'} available to it. "
            f"{Sampler().advice(available) if advice is None else advice}"
        )


class Patience:
    """Bears a few rounds in a row of which every update was refused, where others are at work and will report.

    With asynchronous algorithms a round may be a single update; that it cannot be used is no reason to end training.

    Example:
        >>> patience, refused = Patience(most=2), RoundReport(0, [], skipped={"a": "its payload is cut off"})
        >>> [patience.lasts(report) for report in (refused, refused, RoundReport(2, ["b"]), refused, refused, refused)]
        [True, True, False, True, True, False]
    """

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self._in_a_row = 0

    def lasts(self, report: RoundReport) -> bool:
        """Return whether the round is one of those, and not one too many."""
        self._in_a_row = self._in_a_row + 1 if report.skipped and not report.cohort else 0
        return 0 < self._in_a_row <= self.most


def require_delivered(report: RoundReport, min_clients: int, min_reports: int = 0) -> None:
    """Raise when too few of the cohort delivered, with the reasons of those that did not.

    Args:
        report: of the round.
        min_clients: fewest clients, of the trainer.
        min_reports: fewest reports, of the schedule.
    """
    fewest = max(min_clients, min_reports)
    if len(report.cohort) < fewest:
        name = "min_reports" if min_reports > min_clients else "min_clients"
        missing = [*report.skipped.items(), *report.dropped.items()]
        reasons = "; ".join(f"{client_id!r}: {reason}" for client_id, reason in missing[:5])
        raise NotEnoughClientsError(
            f"Round {report.round} needs {name}={fewest}, but only {len(report.cohort)} clients delivered. "
            f"Skipped: {reasons or 'none'}. Mend them, or lower {name}."
        )
