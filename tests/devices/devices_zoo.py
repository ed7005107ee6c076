"""Occasions for rounds of devices, without a federation around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl_lightning.devices import (
    DeviceFleet,
)
from fl_lightning.schedules import Occasion, Sampler, UniformSampler
from fl_lightning.seeding import seed_for
from fl_lightning.types import Work


class Clients:
    def __init__(self, ids: Sequence[Any]) -> None:
        self.ids = ids

    def client_ids(self) -> Sequence[Any]:
        return self.ids

    def client_dataloader(self, client_id: Any) -> list[Any]:
        raise AssertionError("a schedule opens no data")


def occasion(
    fleet: Any, ids: Sequence[Any], size: int, round: int = 0, clock: float = 0.0, steps: int = 10,
    sampler: Sampler | None = None, work: Work | None = None, num_bytes: int = 0,
) -> Occasion:  # fmt: skip
    population, source = Clients(ids), sampler or UniformSampler()

    def draw(size: int, wave: int) -> list[Any]:
        return source.cohort(population, size, seed_for(9, round, None, f"wave {wave}") if wave else 9, round)

    def num_steps(client_id: Any, work: Work) -> int:
        return work.steps if work.steps is not None else steps * (work.epochs or 1)

    return Occasion(
        round, clock, 9, population, size, 100 * round, num_bytes, num_bytes, None, lambda size: draw(size, 0),
        lambda client_id: work or Work(), num_steps, fleet, draw,
    )  # fmt: skip


def named(speed: dict[str, float], **more: Any) -> DeviceFleet:
    return DeviceFleet(speed=lambda client_id: speed[client_id], **more)


SPEEDS = {"a": 10.0, "b": 5.0, "c": 2.0, "d": 1.0}  # ten steps take 1, 2, 5 and 10 seconds
