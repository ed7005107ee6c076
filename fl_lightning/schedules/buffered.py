"""Asynchronous rounds: clients come and go on a virtual clock, and a round is one flush of a buffer of updates."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.errors import NotEnoughClientsError
from fl_lightning.schedules.lanes import sort_key
from fl_lightning.schedules.plan import Dispatch, Occasion, Plan, Schedule
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, Work

__all__ = ["BufferedSchedule"]

_TRIES = (1, 31, 2048)
"""Random draws that are asked together, before everyone is listed: cheap as long as some clients are free."""


class BufferedSchedule(Schedule):
    """Keeps a number of clients at work; a round is complete when a number of updates has arrived.

    Arrivals are taken in the order of ``(time, dispatch_id)``, and who arrives makes room for another client at once:
    drawn by the seed from those that are free, sent the model as it is at that moment. Whoever arrives at the very
    moment of a flush makes room after it, so that the next one starts from the new model. Who is in a flush follows
    from times alone, so it is known before anyone of it trains.

    Args:
        buffer_size: updates of one round.
        concurrency: clients at work at any time: a count, a fraction in (0, 1] of those that exist, or ``None`` for
            everyone.
        max_staleness: rounds after which an update is dropped; ``None`` takes every one.
        client_concurrency: dispatches that one client may have in flight.

    Example:
        >>> class Clients:
        ...     def client_ids(self): return ["fast", "slow"]
        >>> class Fleet:
        ...     def seconds(self, client_id, num_steps, num_bytes_down, num_bytes_up, at):
        ...         return {"fast": 2.0, "slow": 5.0}[client_id]
        >>> schedule, clock, first = BufferedSchedule(buffer_size=2, concurrency=2), 0.0, 0
        >>> for round in range(3):
        ...     plan = schedule.plan(Occasion(round, clock, 0, Clients(), 2, first, 0, 0, None, None, lambda c: Work(),
        ...                                   lambda c, w: 1, Fleet()))
        ...     clock, first = plan.finished_at, first + len(plan.downloads)
        ...     print([(d.client_id, round - d.version) for d in plan.dispatches], clock)
        [('fast', 0), ('fast', 0)] 4.0
        [('slow', 1), ('fast', 0)] 6.0
        [('fast', 0), ('slow', 1)] 10.0
    """

    def __init__(
        self,
        buffer_size: int,
        concurrency: int | float | None = None,
        max_staleness: int | None = None,
        client_concurrency: int = 1,
    ) -> None:
        self.buffer_size = buffer_size
        self.concurrency = concurrency
        self.max_staleness = max_staleness
        self.client_concurrency = client_concurrency
        self._queue: list[tuple[float, int, Dispatch]] = []
        self._num_drawn = 0

    def plan(self, occasion: Occasion) -> Plan:
        flush = _Flush(self, occasion)
        flush.run()
        self._queue, self._num_drawn = flush.queue, flush.num_drawn
        staleness = [occasion.round - dispatch.version for dispatch in flush.buffer]
        return Plan(
            tuple(flush.buffer),
            flush.clock,
            flush.dropped,
            tuple(flush.downloads),
            tuple(dispatch for _, _, dispatch in sorted(flush.queue, key=lambda entry: entry[:2])),
            {
                "simulated_seconds": flush.clock,
                "staleness/mean": sum(staleness) / len(staleness),
                "staleness/max": float(max(staleness)),
                **self.flushed(occasion, flush.buffer, flush.clock),
            },
        )

    def places(self, occasion: Occasion) -> int:
        """Return how many clients are at work at any time."""
        available = len(occasion.population.client_ids())
        places = available if self.concurrency is None else self.concurrency
        if isinstance(places, float):
            places = max(1, round(places * available))
        if places > available * self.client_concurrency:
            raise MisconfigurationException(
                f"concurrency={places} asks for more clients at work than exist ({available}"
                f"{'' if self.client_concurrency == 1 else f', each {self.client_concurrency} times'}). Use "
                f"concurrency<={available * self.client_concurrency}, a fraction such as concurrency=0.5, or None for "
                "everyone."
            )
        return places if occasion.at_most is None else min(places, occasion.at_most)

    # ---- what devices change ------------------------------------------------------------------------------------

    def admitted(self, occasion: Occasion, client_ids: Sequence[ClientId], at: float) -> Sequence[bool]:
        """Return who may be sent work at a time; everyone, unless devices have conditions."""
        return [True] * len(client_ids)

    def sent(self, occasion: Occasion, client_id: ClientId, dispatch_id: int, at: float, repeat: int) -> Dispatch:
        """Send a client work; ``done_at`` is when its place is free again."""
        return occasion.dispatch(client_id, dispatch_id, at, repeat=repeat)

    def lost(self, dispatch: Dispatch) -> str | None:
        """Return why a dispatch brings no update, and forget it; ``None`` when it brings one."""
        return None

    def waited(self, occasion: Occasion, at: float, since: float) -> float:
        """Return until when to wait for clients that may be sent work, when nobody is at work.

        Raises:
            NotEnoughClientsError: when it is no use to wait.
        """
        raise NotEnoughClientsError(
            f"Round {occasion.round} waits for more updates, and no client is at work. Bring clients into the "
            "population."
        )

    def flushed(self, occasion: Occasion, buffer: Sequence[Dispatch], clock: float) -> Mapping[str, float]:
        """Return more values for the report of a flush."""
        return {}

    # ---- what lasts ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        dispatches = [asdict(dispatch) for _, _, dispatch in sorted(self._queue, key=lambda entry: entry[:2])]
        return {"in_flight": dispatches, "num_drawn": self._num_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = [Dispatch(**{**fields, "work": Work(**fields["work"])}) for fields in state["in_flight"]]
        # sorted by time, which is a heap
        self._queue = [(dispatch.done_at, dispatch.dispatch_id, dispatch) for dispatch in found]
        self._num_drawn = state["num_drawn"]


class _Flush:
    """One round in the making: the queue of arrivals, and what has come so far."""

    def __init__(self, schedule: BufferedSchedule, occasion: Occasion) -> None:
        self.schedule = schedule
        self.occasion = occasion
        self.queue = list(schedule._queue)
        self.num_drawn = schedule._num_drawn
        self.places = schedule.places(occasion)
        self.clock = occasion.clock
        self.buffer: list[Dispatch] = []
        self.dropped: dict[ClientId, str] = {}
        self.downloads: list[ClientId] = []
        self._next_id = occasion.next_dispatch_id
        self._listed: list[ClientId] | None = None
        self._idle_since: float | None = None
        self._ids = occasion.population.client_ids()
        self._exists = self._ids if isinstance(self._ids, range) else frozenset(self._ids)
        self._busy = Counter(dispatch.client_id for _, _, dispatch in self.queue)
        self._sent: Counter[ClientId] = Counter()

    def run(self) -> None:
        at_most = self.occasion.at_most
        size = self.schedule.buffer_size if at_most is None else min(self.schedule.buffer_size, at_most)
        self._fill()  # the places of those that arrived when the last flush was made, now with the new model
        while len(self.buffer) < size:
            if not self.queue or (self.queue[0][0] > self.clock and len(self.queue) < self.places):
                self._fill()
            if not self.queue:
                self._idle_since = self.clock if self._idle_since is None else self._idle_since
                self.clock = self.schedule.waited(self.occasion, self.clock, self._idle_since)
                continue
            self._idle_since = None
            self.clock, _, dispatch = heapq.heappop(self.queue)
            self._busy[dispatch.client_id] -= 1
            reason = self.schedule.lost(dispatch) or self._refusal(dispatch)
            if reason is None:
                self.buffer.append(dispatch)
            else:
                self.dropped[dispatch.client_id] = reason

    def _refusal(self, dispatch: Dispatch) -> str | None:
        if dispatch.client_id not in self._exists:
            return "left the population"
        limit, staleness = self.schedule.max_staleness, self.occasion.round - dispatch.version
        if limit is not None and staleness > limit:
            return f"its update was {staleness} rounds old, and max_staleness={limit}"
        return None

    def _fill(self) -> None:
        """Send work to as many clients as there are free places."""
        chosen: list[ClientId] = []
        self._listed = None  # who may work changes with the clock
        while len(self.queue) + len(chosen) < self.places:
            client_id = self._draw()
            if client_id is None:
                break
            self._busy[client_id] += 1
            chosen.append(client_id)
        # in an order of their ids, as the cohort of a round in step: the same dispatches then have the same ids
        for client_id in sorted(chosen, key=sort_key):
            repeat = self._sent[client_id]
            dispatch = self.schedule.sent(self.occasion, client_id, self._next_id, self.clock, repeat)
            if not 0 <= dispatch.done_at - dispatch.sent_at < math.inf:
                raise MisconfigurationException(
                    f"The fleet says that client {client_id!r} takes {dispatch.done_at - dispatch.sent_at} seconds; "
                    "expected a finite number >= 0."
                )
            heapq.heappush(self.queue, (dispatch.done_at, dispatch.dispatch_id, dispatch))
            self.downloads.append(client_id)
            self._sent[client_id] += 1
            self._next_id += 1

    def _draw(self) -> ClientId | None:
        """Draw a client that is free, uniformly; ``None`` when there is none."""
        draw = random.Random(seed_for(self.occasion.seed, self.num_drawn, None, "next client"))
        self.num_drawn += 1
        for tries in _TRIES if self._listed is None else ():
            drawn = dict.fromkeys(self._ids[draw.randrange(len(self._ids))] for _ in range(tries))
            asked = [client_id for client_id in drawn if self._is_free(client_id)]
            for client_id, may in zip(asked, self.schedule.admitted(self.occasion, asked, self.clock), strict=True):
                if may:
                    return client_id
        if self._listed is None:
            free = [client_id for client_id in self._ids if self._is_free(client_id)]
            admitted = self.schedule.admitted(self.occasion, free, self.clock)
            self._listed = [client_id for client_id, may in zip(free, admitted, strict=True) if may]
        free = [client_id for client_id in self._listed if self._is_free(client_id)]
        return draw.choice(free) if free else None

    def _is_free(self, client_id: ClientId) -> bool:
        return self._busy[client_id] < self.schedule.client_concurrency
