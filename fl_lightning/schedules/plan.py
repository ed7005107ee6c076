"""Who works when, on a virtual clock: what a schedule is asked, and what it answers.

A schedule decides before anyone trains: which updates the round sums, which clients were sent work and did not make
it, and what the clock shows when the round is complete. Its answer depends on ``(seed, round)`` and on a state of its
own that checkpoints hold, never on a real clock, so every process comes to the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from fl_lightning.types import ClientId, Population, Work

__all__ = ["Delivery", "Dispatch", "Occasion", "Plan", "Schedule", "Timing"]


@runtime_checkable
class Timing(Protocol):
    """How long clients take, pure in ``(client_id, at)`` and its own seed; a fleet of devices is one."""

    def seconds(self, client_id: ClientId, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        """Return the seconds from the moment when a client is sent work to the moment when its update has arrived.

        Args:
            client_id: the client.
            num_steps: optimizer steps that it takes.
            num_bytes_down: bytes that it downloads first.
            num_bytes_up: bytes that it uploads in the end.
            at: seconds on the virtual clock when it is sent the work.
        """


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One order of work on its way through virtual time.

    Args:
        client_id: who works.
        dispatch_id: unique in the federation.
        version: the round whose broadcast the client trains from; ``round - version`` is the update's staleness.
        work: how much to do.
        sent_at: seconds on the virtual clock when the client was sent the work.
        done_at: seconds on the virtual clock when its update has arrived.
        repeat: how often this client was sent this version before; it then draws other random numbers.
    """

    client_id: ClientId
    dispatch_id: int
    version: int
    work: Work
    sent_at: float = 0.0
    done_at: float = 0.0
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One round, decided.

    Args:
        dispatches: whose updates the round sums; a client may stand in it twice, the earlier ``dispatch_id`` first.
        finished_at: seconds on the virtual clock when the round is complete.
        dropped: clients that were sent work and do not deliver, with the reason.
        downloads: who downloads this round's model, in order, a client as often as it does; ``None`` stands for the
            clients of ``dispatches``.
        in_flight: dispatches that later rounds sum; the versions that they train from are kept.
        metrics: values of the round, for the report and the server's curves.
        in_vain: whose reports arrived and are not summed. They do not train; for their upload counts the mean of the
            updates that came back.
        min_reports: fewest updates that make the round once those that cannot be used are left out.
    """

    dispatches: tuple[Dispatch, ...]
    finished_at: float = 0.0
    dropped: Mapping[ClientId, str] = field(default_factory=dict)
    downloads: tuple[ClientId, ...] | None = None
    in_flight: tuple[Dispatch, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    in_vain: tuple[ClientId, ...] = ()
    min_reports: int = 0


def _cannot_draw(size: int, wave: int) -> list[ClientId]:
    raise NotImplementedError("This occasion has no sampler that draws in waves.")


@dataclass(frozen=True, slots=True)
class Occasion:
    """A round about to begin, as a schedule sees it.

    Args:
        round: 0-based round.
        clock: seconds on the virtual clock.
        seed: the federation's seed.
        population: the clients that exist now.
        size: clients per round, as the user's argument says it.
        next_dispatch_id: the first one that is free; give the next ones to further dispatches.
        num_bytes_down: bytes that a client downloads, as they were in the round before.
        num_bytes_up: bytes that a client uploads, as they were on average in the round before; in the first one the
            bytes of the model, encoded by the transforms if there are any.
        at_most: most clients that train (``fast_dev_run``), or ``None``.
        choose: the sampler's cohort of a given size, checked, in an order that does not depend on the population's.
        work: what the user's arguments ask of a client.
        num_steps: optimizer steps that a client will take for its work, by the length of its loader.
        timing: how long clients take; ``None`` gives every step of every client one second.
        draw: the sampler's cohort of a given size, in its own order and without a check of its size; the second
            argument is the wave: 0 is the cohort that ``choose`` returns, further waves draw others.
    """

    round: int
    clock: float
    seed: int
    population: Population
    size: int
    next_dispatch_id: int
    num_bytes_down: int
    num_bytes_up: int
    at_most: int | None
    choose: Callable[[int], list[ClientId]]
    work: Callable[[ClientId], Work]
    num_steps: Callable[[ClientId, Work], int]
    timing: Timing | None = None
    draw: Callable[[int, int], list[ClientId]] = _cannot_draw

    def seconds(self, client_id: ClientId, work: Work, at: float) -> float:
        """Return how long a client takes for some work that it is sent at a time."""
        num_steps = self.num_steps(client_id, work)
        if self.timing is None:
            return float(num_steps)
        return self.timing.seconds(client_id, num_steps, self.num_bytes_down, self.num_bytes_up, at)

    def dispatch(
        self, client_id: ClientId, dispatch_id: int, at: float, work: Work | None = None, repeat: int = 0
    ) -> Dispatch:
        """Return the order of work that is sent to a client at a time, for this round's model."""
        work = work if work is not None else self.work(client_id)
        done_at = at + self.seconds(client_id, work, at)
        return Dispatch(client_id, dispatch_id, self.round, work, at, done_at, repeat)


class Delivery(Protocol):
    """What a schedule may learn about a dispatch once its client has trained."""

    client_id: ClientId
    dispatch_id: int
    num_examples: int
    num_steps: int
    num_bytes_up: int
    update_norm: float
    failure: Any  # None, or why there is no update


class Schedule:
    """Decides who works when. Subclasses are pure in ``(seed, round)`` and what :meth:`state_dict` returns."""

    def plan(self, occasion: Occasion) -> Plan:
        """Return the plan of a round, and advance the schedule's own state to its end."""
        raise NotImplementedError(f"{type(self).__name__} must define plan(occasion).")

    def learn(self, plan: Plan, deliveries: Sequence[Delivery]) -> Mapping[str, float]:
        """Look at what came of a plan, the same in every process, and return more values for the round's report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors and primitives that later plans do not change."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state_dict` returned."""
