"""Rounds in step: a cohort is drawn, everyone in it reports, and the slowest decides how long that takes."""

from __future__ import annotations

from fl_lightning.schedules.plan import Dispatch, Occasion, Plan, Schedule

__all__ = ["SynchronousSchedule"]


class SynchronousSchedule(Schedule):
    """The sampler's cohort works on this round's model, and the round is complete when everyone has reported.

    With a fleet of devices ``metrics["simulated_seconds"]`` is the virtual time at the end of the round: every round
    lasts as long as its slowest client. Without one no time is simulated.

    Example:
        >>> from fl_lightning.types import Work
        >>> class Fleet:
        ...     def seconds(self, client_id, num_steps, num_bytes_down, num_bytes_up, at):
        ...         return {"fast": 1.0, "slow": 4.0}[client_id] * num_steps
        >>> occasion = Occasion(round=0, clock=10.0, seed=0, population=None, size=2, next_dispatch_id=0,
        ...                     num_bytes_down=0, num_bytes_up=0, at_most=None, choose=lambda n: ["fast", "slow"],
        ...                     work=lambda c: Work(), num_steps=lambda c, w: 5, timing=Fleet())
        >>> plan = SynchronousSchedule().plan(occasion)
        >>> [dispatch.done_at for dispatch in plan.dispatches], plan.finished_at
        ([15.0, 30.0], 30.0)
    """

    def plan(self, occasion: Occasion) -> Plan:
        cohort = occasion.choose(occasion.size)
        first, at = occasion.next_dispatch_id, occasion.clock
        if occasion.timing is None:  # nobody asks for the time, so nobody's loader is opened to estimate it
            plain = (occasion.work(client_id) for client_id in cohort)
            return Plan(
                tuple(
                    Dispatch(client_id, first + position, occasion.round, work, at, at)
                    for position, (client_id, work) in enumerate(zip(cohort, plain, strict=True))
                ),
                finished_at=at,
            )
        dispatches = tuple(
            occasion.dispatch(client_id, first + position, at) for position, client_id in enumerate(cohort)
        )
        finished_at = max((dispatch.done_at for dispatch in dispatches), default=at)
        return Plan(dispatches, finished_at, metrics={"simulated_seconds": finished_at})
