"""Clients of unequal sizes, alone in LightningLoop and together in LeanLoop, and what must be alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from zoo import broadcast_of, job, loader, settings_for

from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.local.job import Job, Outcome
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.lightning_loop import LightningLoop
from fl_lightning.local.worker import copied_module
from fl_lightning.metrics import Mean
from fl_lightning.types import ClientUpdate

__all__ = ["Jobs", "assert_alike", "ragged", "together", "updates_of"]

Jobs = Callable[[dict[str, Any]], list[Job]]


def ragged(**work: Any) -> Jobs:
    """Nine clients of 3 to 27 examples with batches of 5: unequal steps, unequal last batches, one below a batch."""
    sizes = [23, 10, 27, 3, 15, 12, 21, 5, 23]
    return lambda b: [job(b, lambda n=n, k=k: loader(n, 30 * k), f"c{k}", **work) for k, n in enumerate(sizes)]


def together(
    module: Any, jobs: Jobs, algorithm: Any = None, size: int = 9, trees: Any = None, **changes: Any
) -> tuple[list[Outcome], list[Outcome], LeanLoop]:
    algorithm = algorithm or FedAvg()
    settings = settings_for(module, algorithm, group_size=size, **changes)
    broadcast = broadcast_of(module, settings)
    broadcast.update(algorithm.broadcast(algorithm.init_state(broadcast["model"])))
    broadcast.update(trees or {})
    alone = LightningLoop(copied_module(module), algorithm, settings)
    loop = LeanLoop(copied_module(module), algorithm, settings)
    return list(alone.run(jobs(broadcast))), list(loop.run(jobs(broadcast))), loop


def updates_of(oracle: list[Outcome], other: list[Outcome]) -> Iterator[tuple[ClientUpdate, ClientUpdate]]:
    """Yield both updates of each client, after what no loop and no group may change: counts and names."""
    assert [o.job.task.client_id for o in oracle] == [o.job.task.client_id for o in other] != []
    for left, right in zip(oracle, other, strict=True):
        for outcome in (left, right):
            if outcome.error is not None:
                raise outcome.error
        a, b = left.update, right.update
        assert a is not None
        assert b is not None
        assert any(bool(delta.abs().max() > 1e-4) for delta in a.delta.values()), "the oracle did not move"
        assert (a.num_examples, a.num_steps, a.status, a.a_norm) == (b.num_examples, b.num_steps, b.status, b.a_norm)
        assert a.delta.keys() == b.delta.keys()
        assert a.buffers.keys() == b.buffers.keys()
        yield a, b


def assert_alike(alone: list[Outcome], group: list[Outcome], tolerance: float = 1e-5) -> None:
    for (a, b), left, right in zip(updates_of(alone, group), alone, group, strict=True):
        for name, delta in a.delta.items():
            assert delta.norm() > 1e-4, "the oracle did not move"
            assert not delta.requires_grad
            assert not b.delta[name].requires_grad, "a group carries the graph of its steps along"
            assert (delta - b.delta[name]).norm() <= tolerance * delta.norm() + 1e-7, name
        assert a.metrics.keys() == b.metrics.keys()
        for name, part in a.metrics.items():
            assert isinstance(b.metrics[name], Mean)
            ours = b.metrics[name]
            assert (ours.total, ours.weight) == pytest.approx((part.total, part.weight), rel=1e-4, abs=1e-4)
        by_key = lambda record: (record[1][2], record[1][0])  # noqa: E731
        records, expected = sorted(right.records, key=by_key), sorted(left.records, key=by_key)
        assert [by_key(record) for record in records] == [by_key(record) for record in expected]
        for record, its in zip(records, expected, strict=True):
            assert record[1][1] == pytest.approx(its[1][1], rel=1e-4, abs=1e-4)
