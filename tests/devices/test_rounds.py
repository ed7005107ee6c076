"""Rounds of devices, planned by hand: who is asked, who is lost and why, and what the clock shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from devices_zoo import SPEEDS, named, occasion
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.devices import (
    AdaptiveEpochs,
    AdaptiveWidth,
    DeadlineSteps,
    DeviceFleet,
    DeviceRounds,
    EnergyModel,
    Participants,
)
from fl_lightning.devices.rounds import ABANDONED
from fl_lightning.devices.trips import GAVE_UP, send
from fl_lightning.errors import NotEnoughClientsError
from fl_lightning.schedules import FixedSampler
from fl_lightning.schedules.reasons import round_summary, summary
from fl_lightning.types import RoundReport, Work


def test_a_round_ends_with_its_slowest_device() -> None:
    plan = DeviceRounds().plan(occasion(named(SPEEDS), list("dcba"), 4, clock=100.0))
    assert [(d.client_id, d.dispatch_id, d.sent_at, d.done_at) for d in plan.dispatches] == [
        ("a", 0, 100.0, 101.0), ("b", 1, 100.0, 102.0), ("c", 2, 100.0, 105.0), ("d", 3, 100.0, 110.0),
    ]  # fmt: skip
    assert plan.finished_at == plan.metrics["simulated_seconds"] == 110.0
    assert not plan.dropped


def test_of_too_many_devices_the_first_reports_are_taken() -> None:
    schedule = DeviceRounds(over_selection=2.0)
    plan = schedule.plan(occasion(named(SPEEDS), list("abcd"), 2))
    assert [d.client_id for d in plan.dispatches] == ["a", "b"]
    assert plan.finished_at == 2.0
    assert plan.dropped == {"c": "not needed", "d": "not needed"}
    assert plan.downloads == ("a", "b", "c", "d")
    assert schedule.participants.counts() == {"a": 1, "b": 1, "c": 0, "d": 0}


def test_a_deadline_drops_who_is_late() -> None:
    plan = DeviceRounds(deadline=5.0).plan(occasion(named(SPEEDS), list("abcd"), 4, clock=50.0))
    assert [d.client_id for d in plan.dispatches] == ["a", "b", "c"], "to the second is in time"
    assert plan.dropped == {"d": "missed the deadline"}
    assert plan.finished_at == 55.0
    assert {d.work.deadline for d in plan.dispatches} == {5.0}


def test_partial_work_is_the_steps_that_fit() -> None:
    fleet = named(SPEEDS, latency_seconds=0.25)
    plan = DeviceRounds(deadline=4.0, stragglers="partial").plan(occasion(fleet, list("abcd"), 4))
    work = {d.client_id: (d.work.epochs, d.work.steps, d.work.partial, d.done_at) for d in plan.dispatches}
    assert work == {
        "a": (1, None, False, 1.5), "b": (1, None, False, 2.5), "c": (None, 7, True, 4.0), "d": (None, 3, True, 3.5),
    }  # fmt: skip
    assert plan.metrics["devices/partial"] == 2
    slow = DeviceRounds(deadline=4.0, stragglers="partial").plan(occasion(named({"a": 1, "z": 0.2}), ["a", "z"], 2))
    assert slow.dropped == {"z": "missed the deadline"}, "not one step fits"
    margin = DeviceRounds(deadline=4.0, policies=[DeadlineSteps(margin=0.5)]).plan(occasion(fleet, ["d"], 1))
    assert margin.dispatches[0].work.steps == 1  # 2 seconds, half a second of them under way


def test_a_step_of_a_narrow_model_costs_the_square_of_its_width() -> None:
    """In time, in energy, and in what a policy behind the one that chose the width is told of a step."""
    memory = {"a": 6.0, "b": 6.0, "c": 3.0, "d": 1.5}
    fleet = named(SPEEDS, memory_gb=memory.__getitem__, train_watts=3.6, battery_wh=10.0, charge_hours=0.0)
    narrow = DeviceRounds(policies=[AdaptiveWidth(memory_gb=6.0)])
    plan = narrow.plan(occasion(fleet, list("abcd"), 4))
    done = {d.client_id: (d.work.width, d.done_at) for d in plan.dispatches}
    assert done == {"a": (1.0, 1.0), "b": (1.0, 2.0), "c": (0.5, 5.0 / 4), "d": (0.25, 10.0 / 16)}
    joules = 3.6 * (1.0 + 2.0 + 5.0 / 4 + 10.0 / 16)
    assert plan.metrics["devices/energy_wh_estimate"] == pytest.approx(joules / 3600)
    both = DeviceRounds(deadline=0.5, policies=[AdaptiveWidth(memory_gb=6.0), DeadlineSteps(margin=0.0)])
    (only,) = both.plan(occasion(fleet, ["d"], 1)).dispatches
    assert only.work.steps == 8, "a step takes a sixteenth of a second, and eight of them fit"
    given = DeviceRounds().plan(occasion(fleet, ["d"], 1, work=Work(width=0.5)))
    assert given.dispatches[0].done_at == 10.0 / 4, "a width that was there before any policy counts as well"


def test_low_batteries_get_less_work_and_full_ones_all_of_it_again() -> None:
    fleet = DeviceFleet(
        battery_wh=10.0,
        battery_level=lambda c: {"a": 0.9, "b": 0.4, "c": 0.4}[c],
        charge_from_hour=1.0,
        charge_hours=2.0,
    )
    schedule = DeviceRounds(policies=[AdaptiveEpochs()])
    work = Work(epochs=5)
    first = schedule.plan(occasion(fleet, list("abc"), 3, work=work))
    assert [d.work.epochs for d in first.dispatches] == [5, 2, 2]
    assert not any(d.work.partial for d in first.dispatches), "it is all that was asked"
    later = schedule.plan(occasion(fleet, list("abc"), 3, round=1, clock=4 * 3600.0, work=work))
    assert [d.work.epochs for d in later.dispatches] == [5, 5, 5]
    few = schedule.plan(occasion(fleet, ["b"], 1, work=Work(epochs=1), clock=0.0))
    assert few.dispatches[0].work.epochs == 1
    steps = DeviceRounds(policies=[AdaptiveEpochs()]).plan(occasion(fleet, ["b"], 1, work=Work(None, 7)))
    assert steps.dispatches[0].work.steps == 3


def test_the_reasons_of_the_issue_in_one_line() -> None:
    """3 low battery, 2 offline, 1 missed the deadline."""
    fleet = DeviceFleet(
        speed=lambda c: 0.1 if c == 9 else 10.0, battery_level=lambda c: 0.1 if c in (0, 1, 2) else 1.0,
        online_hours=lambda c: 0.0 if c in (3, 4) else 24.0,
    )  # fmt: skip
    plan = DeviceRounds(deadline=20.0).plan(occasion(fleet, range(10), 10))
    assert [d.client_id for d in plan.dispatches] == [5, 6, 7, 8]
    assert plan.dropped == {
        0: "low battery", 1: "low battery", 2: "low battery", 3: "offline", 4: "offline", 9: "missed the deadline",
    }  # fmt: skip
    report = RoundReport(0, [5, 6, 7, 8], metrics=dict(plan.metrics), dropped=dict(plan.dropped))
    assert round_summary(report) == summary(plan.dropped) == "3 low battery, 2 offline, 1 missed the deadline"
    assert round_summary(RoundReport(0, [])) == ""


def test_devices_are_lost_in_mid_training() -> None:
    fleet = DeviceFleet(
        battery_wh=1.0, battery_level=lambda c: 0.25 if c == "flat" else 1.0, train_watts=3600.0, charge_hours=0.0,
        speed=lambda c: 10.0 if c == "quick" else 1.0, online_hours=lambda c: 1 / 3600 if c == "away" else 24.0,
        dropout=lambda c: 1.0 if c == "bored" else 0.0,
    )  # fmt: skip
    # a Wh lasts a second of training, so "slow" with its ten seconds is lost after one
    plan = DeviceRounds().plan(occasion(fleet, ["quick", "slow", "flat", "away", "bored"], 5))
    assert [d.client_id for d in plan.dispatches] == ["quick"]
    assert plan.dropped["slow"] == plan.dropped["flat"] == "battery ran empty"
    assert plan.dropped["away"] in ("went offline", "battery ran empty")
    assert plan.dropped["bored"] in ("gave up", "battery ran empty")
    assert plan.finished_at == 1.0
    mains = DeviceFleet(
        online_hours=lambda c: 1 / 3600 if c == "away" else 24.0, dropout=lambda c: 1.0 if c == "bored" else 0.0
    )
    plan = DeviceRounds().plan(occasion(mains, ["fine", "away", "bored"], 3))
    assert plan.dropped == {"away": "went offline", "bored": "gave up"}


def test_drop_outs_are_as_frequent_as_the_fleet_says() -> None:
    fleet = DeviceFleet(dropout=0.08)
    schedule = DeviceRounds()
    lost = [len(schedule.plan(occasion(fleet, range(2000), 2000, round=r)).dropped) for r in range(5)]
    # a binomial of 10,000 has a standard deviation of 27
    assert sum(lost) == pytest.approx(800, abs=110)
    assert len(set(lost)) > 1


def test_a_round_with_too_few_reports_is_abandoned_and_tried_again() -> None:
    fleet = DeviceFleet(dropout=0.5)
    plans = [
        DeviceRounds(min_reports=4, retries=30).plan(occasion(fleet, range(100), 5, round=round)) for round in range(30)
    ]
    assert all(len(plan.dispatches) >= 4 for plan in plans)
    tried_again = [plan for plan in plans if ABANDONED in plan.dropped.values() or plan.metrics["devices/sent"] > 5]
    assert 15 < len(tried_again) < 30
    assert all(not set(plan.dropped) & {d.client_id for d in plan.dispatches} for plan in plans)
    assert max(plan.finished_at for plan in plans) > 40.0, "every attempt took its time"
    with pytest.raises(
        NotEnoughClientsError, match=r"needs 5 reports and had \d in the last of 2 attempts: \d+ gave up"
    ):
        DeviceRounds(min_reports=1.0, retries=1).plan(occasion(DeviceFleet(dropout=0.9), range(100), 5))


def test_a_round_is_tried_again_with_others_than_those_that_were_late() -> None:
    """Eight slow devices of twelve: every attempt leaves out those that were late, so the fast ones are soon found."""
    fleet = DeviceFleet(speed=lambda c: 0.01 if c < 8 else 100.0)
    for round in range(40):
        schedule = DeviceRounds(deadline=5.0, min_reports=3, retries=9)
        plan = schedule.plan(occasion(fleet, range(12), 3, round=round))
        assert {d.client_id for d in plan.dispatches} < {8, 9, 10, 11}
        assert plan.downloads is not None
        times = Counter(plan.downloads)
        assert all(times[c] <= 1 for c in range(8)), "nobody who was late is asked a second time"
        assert len(plan.downloads) == plan.metrics["devices/sent"], "who reports in vain downloads again"
        assert len(plan.in_vain) == sum(times[c] for c in range(8, 12)) - 3


def test_devices_that_were_lost_are_asked_again_when_there_is_nobody_else() -> None:
    fleet = DeviceFleet(dropout=0.5)
    plan = DeviceRounds(min_reports=4, retries=200).plan(occasion(fleet, range(4), 4))
    assert [d.client_id for d in plan.dispatches] == [0, 1, 2, 3]
    assert plan.metrics["devices/sent"] == 4 * (plan.metrics["devices/sent"] // 4) > 4
    fixed = FixedSampler([["a", "b", "c"]])
    plan = DeviceRounds(min_reports=3, retries=200).plan(occasion(fleet, list("abcdef"), 3, sampler=fixed))
    assert [d.client_id for d in plan.dispatches] == ["a", "b", "c"]


def test_each_attempt_has_drop_outs_of_its_own() -> None:
    """A device that gave up in the first attempt does not give up in every one: half of them is lost each time."""
    fleet, ids = DeviceFleet(dropout=0.5), range(400)
    lost = []
    for attempt in range(2):
        trips = send(occasion(fleet, ids, 400), fleet, Participants(), ids, 0.0, None, [], EnergyModel(), attempt)
        lost.append([reason == GAVE_UP for reason in trips.reasons])
    both = sum(first and second for first, second in zip(*lost, strict=True))
    # a quarter of 400 by chance, with a deviation of nine; all that the first attempt lost if the draw were the same
    assert both == pytest.approx(100, abs=40)
    assert sum(lost[0]) == pytest.approx(200, abs=40)


def test_the_clock_waits_for_eligible_devices() -> None:
    fleet = DeviceFleet(online_from_hour=2.0, online_hours=4.0)
    plan = DeviceRounds(wait_seconds=600.0).plan(occasion(fleet, range(50), 5, clock=60.0))
    assert plan.dispatches[0].sent_at == 2 * 3600.0 + 60.0
    assert plan.metrics["devices/wait_seconds"] == 7200.0
    assert len(plan.dispatches) == 5


def test_nobody_eligible_is_an_error_in_the_end() -> None:
    message = r"needs 1 eligible devices; 0 of 50 that were asked are eligible after 24 hours .* \(50 low battery\)"
    with pytest.raises(NotEnoughClientsError, match=message):
        DeviceRounds(max_wait_hours=24.0).plan(occasion(DeviceFleet(battery_level=0.1), range(50), 5))


def test_pace_and_rest() -> None:
    schedule = DeviceRounds(pace_seconds=300.0, rest_seconds=450.0)
    fleet = DeviceFleet(speed=1.0)
    cohorts, starts, clock = [], [], 0.0
    for round in range(3):
        plan = schedule.plan(occasion(fleet, range(12), 4, round=round, clock=clock))
        cohorts.append({d.client_id for d in plan.dispatches})
        starts.append(plan.dispatches[0].sent_at)
        clock = plan.finished_at
    assert starts == [0.0, 300.0, 600.0]
    assert not cohorts[0] & cohorts[1], "they rest for 450 seconds after second 10"
    assert len(cohorts[0] | cohorts[1] | cohorts[2]) < 12 or cohorts[2] != cohorts[0]
    everyone = DeviceRounds(rest_seconds=1000.0, wait_seconds=100.0)
    first = everyone.plan(occasion(fleet, range(4), 4))
    assert everyone.plan(occasion(fleet, range(4), 4, round=1, clock=first.finished_at)).dispatches[0].sent_at == 1010.0


def test_among_few_eligible_devices_chance_decides_and_not_the_population_s_order() -> None:
    fleet = DeviceFleet(battery_level=lambda c: 1.0 if c % 10 == 0 else 0.1)
    found: Counter[Any] = Counter()
    for round in range(400):
        plan = DeviceRounds().plan(occasion(fleet, range(100), 3, round=round))
        assert len(plan.dispatches) == 3
        found.update(d.client_id for d in plan.dispatches)
    assert set(found) == set(range(0, 100, 10))
    # 1200 draws over ten devices; the standard deviation of a count is below 9.2 without replacement
    assert max(abs(count - 120) for count in found.values()) < 40


def test_the_work_is_that_of_the_devices_that_are_asked() -> None:
    class Million(Sequence[int]):
        reads = 0

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                return [self[i] for i in range(*index.indices(len(self)))]
            Million.reads += 1
            return index

    plan = DeviceRounds(over_selection=1.3).plan(occasion(DeviceFleet(profile="smartphones"), Million(), 100))
    assert len(plan.dispatches) == 100
    assert Million.reads < 2000, "a thousand of them for the thirds by speed"


def test_a_report_names_a_bounded_number_and_counts_all() -> None:
    fleet = DeviceFleet(battery_level=lambda c: 1.0 if c < 50 else 0.1)
    plan = DeviceRounds().plan(occasion(fleet, range(20_000), 60))
    assert len(plan.dispatches) == 50
    assert len(plan.dropped) == 1000
    assert plan.metrics["devices/dropped/low_battery"] == 19_950


def test_energy_is_power_times_time_and_stops_with_the_work() -> None:
    fleet = named(SPEEDS, train_watts=3.6, radio_watts=1.8, latency_seconds=1.0, battery_wh=10.0, charge_hours=0.0)
    schedule = DeviceRounds(over_selection=2.0)
    plan = schedule.plan(occasion(fleet, list("abcd"), 2))
    # a: 1 s of training and 2 s of radio; b: 2 and 2; c (7 s) and d (12 s) are stopped after 4 s of the same mix
    whole = {"a": 3.6 + 3.6, "b": 7.2 + 3.6, "c": (18 + 3.6) * 4 / 7, "d": (36 + 3.6) * 4 / 12}
    assert plan.metrics["devices/energy_wh_estimate"] == pytest.approx(sum(whole.values()) / 3600)
    expected = sum(whole.values()) / 3600 / 0.85 * 480 / 1000
    assert plan.metrics["devices/co2_g_estimate"] == pytest.approx(expected)
    levels, at = schedule.participants.levels(list("abcd"))
    assert levels == pytest.approx([1 - joule / 3600 / 10 for joule in whole.values()])
    assert at.tolist() == [3.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize("watts", [{}, {"train_watts": 3.6}, {"radio_watts": lambda c: float(c == "a")}])
def test_without_watts_there_is_no_energy_in_place_of_none(watts: Any) -> None:
    plan = DeviceRounds().plan(occasion(DeviceFleet(speed=1.0, **watts), list("abcd"), 4))
    names = {"devices/energy_wh_estimate", "devices/co2_g_estimate"}
    assert names & plan.metrics.keys() == (names if watts else set())


def test_shares_show_the_bias_of_a_deadline() -> None:
    fleet = DeviceFleet(speed="lognormal(1, 0.7)")
    biased, fair = DeviceRounds(deadline=8.0), DeviceRounds(deadline=8.0, stragglers="partial")
    for schedule in (biased, fair):
        plan = schedule.plan(occasion(fleet, range(3000), 3000))
    shares = [plan.metrics[f"devices/share/{name}"] for name in ("slow", "medium", "fast")]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)  # the thirds are estimated from a thousand devices
    plan = biased.plan(occasion(fleet, range(3000), 3000, round=1))
    shares = [plan.metrics[f"devices/share/{name}"] for name in ("slow", "medium", "fast")]
    assert shares[0] == 0.0
    assert shares[2] > 0.7


@pytest.mark.parametrize("speed", [1.0, "choice(1, 2)", lambda c: 1.0 if c % 5 else 9.0], ids=["one", "two", "few"])
def test_thirds_are_thirds_among_equals_too(speed: Any) -> None:
    """Where everyone reports no third has more than a third, however many devices are equally fast."""
    plan = DeviceRounds().plan(occasion(DeviceFleet(speed=speed), range(900), 900))
    shares = [plan.metrics[f"devices/share/{name}"] for name in ("slow", "medium", "fast")]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.002)


def test_the_state_goes_on_where_it_was() -> None:
    fleet = DeviceFleet(profile="smartphones", online_probability=1.0)

    def make() -> DeviceRounds:
        return DeviceRounds(over_selection=1.3, deadline=60.0, rest_seconds=600.0, pace_seconds=60.0)

    whole, clock, plans = make(), 0.0, []
    saved: dict[str, Any] = {}
    for round in range(6):
        if round == 3:
            saved = {"state": whole.state_dict(), "clock": clock}
        plans.append(whole.plan(occasion(fleet, range(300), 40, round=round, clock=clock)))
        clock = plans[-1].finished_at
    resumed, clock = make(), saved["clock"]
    resumed.load_state_dict(saved["state"])
    for round in range(3, 6):
        plan = resumed.plan(occasion(fleet, range(300), 40, round=round, clock=clock))
        assert plan == plans[round]
        clock = plan.finished_at
    fresh = make().plan(occasion(fleet, range(300), 40, round=3, clock=saved["clock"]))
    assert fresh != plans[3], "the state matters"


def test_only_a_fleet_has_conditions() -> None:
    with pytest.raises(MisconfigurationException, match="DeviceRounds needs devices, got fleet=None"):
        DeviceRounds().plan(occasion(None, "ab", 2))


def test_a_fixed_cohort_has_nobody_else_to_ask() -> None:
    fleet = DeviceFleet(battery_level=lambda c: 0.1 if c == "b" else 1.0)
    plan = DeviceRounds().plan(occasion(fleet, list("abcdef"), 3, sampler=FixedSampler([["a", "b", "c"]])))
    assert [d.client_id for d in plan.dispatches] == ["a", "c"]
    assert plan.dropped == {"b": "low battery"}
