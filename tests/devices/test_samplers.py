"""Whom samplers propose after what came back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from devices_zoo import Clients, occasion

from fl_lightning.devices import (
    DeviceFleet,
    DeviceRounds,
    Eligibility,
    FairSampler,
    OortSampler,
)
from fl_lightning.schedules import Dispatch, Plan, Sampler, UniformSampler
from fl_lightning.types import Work


def test_a_sampler_that_ranks_decides_among_the_few_that_are_eligible() -> None:
    fleet = DeviceFleet(battery_level=lambda c: 1.0 if c % 20 == 0 else 0.1)
    sampler = FairSampler()
    taught(sampler, dict.fromkeys((0, 20, 60), 1.0), lambda c: 1.0)
    for round in range(10):
        plan = DeviceRounds().plan(occasion(fleet, range(100), 2, round=round, sampler=sampler))
        assert [d.client_id for d in plan.dispatches] == [40, 80]


# ---- samplers that learn ---------------------------------------------------------------------------------------------


class Delivered:
    def __init__(self, client_id: Any, dispatch_id: int, norm: float = 1.0, failure: Any = None) -> None:
        self.client_id, self.dispatch_id, self.update_norm, self.failure = client_id, dispatch_id, norm, failure
        self.num_examples, self.num_steps, self.num_bytes_up = 10, 5, 0


def taught(sampler: Sampler, norms: dict[Any, float], seconds: Callable[[Any], float], round: int = 0) -> None:
    plan = Plan(tuple(Dispatch(c, i, round, Work(), 0.0, seconds(c)) for i, c in enumerate(norms)))
    sampler.learn(plan, [Delivered(c, i, norm) for i, (c, norm) in enumerate(norms.items())])


def test_oort_prefers_large_updates_and_fast_devices() -> None:
    clients = Clients(range(100))
    sampler = OortSampler(exploration=0.0, least_exploration=0.0, cutoff=1.0, preferred_seconds=10.0)
    taught(sampler, {k: float(k) for k in range(20)}, lambda c: 10.0)
    assert sorted(sampler.cohort(clients, 5, seed=0, round=1)) == [15, 16, 17, 18, 19]
    taught(sampler, {19: 19.0, 18: 18.0}, lambda c: 40.0)  # (10 / 40) ** 2 of their utility
    assert sorted(sampler.cohort(clients, 5, seed=0, round=1)) == [13, 14, 15, 16, 17]
    assert len(sampler.cohort(clients, 30, seed=0, round=1)) == 30, "the others are explored"


def test_oort_explores_less_and_less() -> None:
    clients = Clients(range(10_000))
    sampler = OortSampler(exploration=0.9, decay=0.9, least_exploration=0.2)
    taught(sampler, dict.fromkeys(range(200), 1.0), lambda c: 10.0)
    for round in (0, 5, 50):
        share = max(0.2, 0.9 * 0.9**round)
        new = [sum(c >= 200 for c in sampler.cohort(clients, 100, seed=s, round=round)) for s in range(10)]
        assert sum(new) / 1000 == pytest.approx(share, abs=0.02)


def test_oort_comes_back_to_clients_that_were_not_seen_for_long() -> None:
    clients = Clients(range(4))
    sampler = OortSampler(exploration=0.0, least_exploration=0.0, cutoff=1.0)
    taught(sampler, {0: 1.0, 1: 1.0}, lambda c: 1.0, round=0)
    taught(sampler, {2: 1.0, 3: 1.0}, lambda c: 1.0, round=90)
    assert sorted(sampler.cohort(clients, 2, seed=0, round=100)) == [0, 1]


def test_fair_sampling_evens_out_what_uniform_sampling_does_not() -> None:
    clients = Clients(range(200))
    counts = {}
    for name, sampler in (("fair", FairSampler(4.0)), ("uniform", UniformSampler())):
        seen: Counter[Any] = Counter()
        for round in range(100):
            cohort = sampler.cohort(clients, 10, seed=1, round=round)
            assert len(set(cohort)) == 10
            taught(sampler, dict.fromkeys(cohort, 1.0), lambda c: 1.0, round)
            seen.update(cohort)
        counts[name] = np.var([seen[client_id] for client_id in range(200)])
    # uniform counts are binomial with variance 100 * 0.05 * 0.95
    assert counts["uniform"] == pytest.approx(4.75, rel=0.3)
    assert counts["fair"] < 0.5


@pytest.mark.parametrize("make", [OortSampler, FairSampler])
def test_what_a_sampler_learned_is_its_state(make: Callable[[], Sampler]) -> None:
    clients, sampler, other = Clients(range(100)), make(), make()
    cohort = sampler.cohort(clients, 20, seed=3, round=0)
    taught(sampler, {c: 1.0 + c for c in cohort}, lambda c: 1.0 + c)
    other.load_state_dict(sampler.state_dict())
    assert other.cohort(clients, 20, 3, 7) == sampler.cohort(clients, 20, 3, 7) != make().cohort(clients, 20, 3, 7)


def test_eligibility_holds_whoever_draws() -> None:
    fleet = DeviceFleet(battery_level=lambda c: 1.0 if c % 2 else 0.1)
    for sampler in (OortSampler(), FairSampler(), UniformSampler()):
        for round in range(5):
            moment = replace(occasion(fleet, range(60), 25, round=round, sampler=sampler))
            plan = DeviceRounds(eligibility=Eligibility(battery=0.5)).plan(moment)
            assert len(plan.dispatches) == 25
            assert all(d.client_id % 2 for d in plan.dispatches)
