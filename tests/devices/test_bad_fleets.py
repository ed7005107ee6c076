"""What cannot be a device, a trace, a rule or a schedule is refused, with what to write instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from spine_zoo import Classifier, fit_federated, sites

from fl_lightning import FederatedTrainer
from fl_lightning.devices import (
    AdaptiveEpochs,
    AdaptiveWidth,
    AllOf,
    BatteryAtLeast,
    Choice,
    Circumstances,
    DeadlineSteps,
    DeviceFleet,
    DeviceRounds,
    Eligibility,
    EnergyModel,
    FairSampler,
    LocalHours,
    LogNormal,
    LogUniform,
    MemoryAtLeast,
    Normal,
    OortSampler,
    Rule,
    Satisfies,
    Uniform,
    WorkPolicy,
)
from fl_lightning.devices.policies import adapted
from fl_lightning.types import Work


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeviceFleet(speed=0), r"speed in \[1e-09, inf\] steps/s"),
        (lambda: DeviceFleet(speed=float("nan")), "speed in"),
        (lambda: DeviceFleet(battery_level=1.5), r"battery_level in \[0, 1\]"),
        (lambda: DeviceFleet(timezone_hours=20), r"timezone_hours in \[-12, 14\] h"),
        (lambda: DeviceFleet(speed="fast"), "Expected a distribution such as"),
        (lambda: DeviceFleet(speed="lognormal(2)"), "Expected a distribution such as"),
        (lambda: DeviceFleet(speed="lognormal(a, b)"), "Expected a distribution such as"),
        (lambda: DeviceFleet(speed="lognormal(-2, 1)"), "LogNormal expected median to be finite and > 0, got -2.0"),
        (lambda: DeviceFleet(speed=[1.0, 2.0]), "speed in"),
        (lambda: DeviceFleet(profile="toasters"), r"profile to be one of \['ideal', 'smartphones'\]"),
        (lambda: DeviceFleet(speed_unit="epochs"), "speed_unit to be 'steps' or 'examples'"),
        (lambda: DeviceFleet(speed_unit="examples"), "batch_size exactly with speed_unit='examples'"),
        (lambda: DeviceFleet(batch_size=10), "batch_size exactly with speed_unit='examples'"),
        (lambda: DeviceFleet(speed_unit="examples", batch_size=0), "batch_size to be an integer >= 1"),
        (lambda: DeviceFleet(start_hour=24.0), r"start_hour to be an hour in \[0, 24\)"),
        (lambda: Uniform(3, 2), "Uniform expected low <= high"),
        (lambda: LogUniform(0, 2), "LogUniform expected low to be finite and > 0"),
        (lambda: Normal(1, -1), "Normal expected deviation to be finite and >= 0"),
        (lambda: LogNormal(1, -1), "LogNormal expected sigma to be finite and >= 0"),
        (lambda: Choice([]), "Choice expected at least one value"),
        (lambda: Eligibility(battery=20), r"BatteryAtLeast expected level to be a number in \[0, 1\], got 20"),
        (lambda: Eligibility(quality=-0.1), "QualityAtLeast expected quality"),
        (lambda: MemoryAtLeast(-1), "MemoryAtLeast expected gb"),
        (lambda: LocalHours(3, 3), "LocalHours expected two different hours"),
        (lambda: AllOf([lambda now: True]), "Expected eligibility rules such as"),
        (lambda: AdaptiveEpochs(factor=0), r"factor in \(0, 1\]"),
        (lambda: DeadlineSteps(margin=1), r"margin in \[0, 1\)"),
        (lambda: EnergyModel(charger_efficiency=0), r"charger_efficiency in \(0, 1\]"),
        (lambda: DeviceRounds(over_selection=0.9), "over_selection to be finite and >= 1"),
        (lambda: DeviceRounds(deadline=0), "deadline in seconds > 0"),
        (lambda: DeviceRounds(min_reports=1.5), "min_reports as a count >= 1 or a fraction"),
        (lambda: DeviceRounds(min_reports=0), "min_reports as a count >= 1 or a fraction"),
        (lambda: DeviceRounds(stragglers="wait"), "stragglers to be 'drop' or 'partial'"),
        (lambda: DeviceRounds(stragglers="partial"), "stragglers='partial' takes the steps that fit before a deadline"),
        (lambda: DeviceRounds(pace_seconds=-1), "pace_seconds to be finite and >= 0"),
        (lambda: DeviceRounds(retries=-1), "DeviceRounds expected retries to be an integer >= 0, got -1"),
        (lambda: DeviceRounds(wait_seconds=0), "wait_seconds > 0"),
        (lambda: DeviceRounds(retries=1.5), "DeviceRounds expected retries to be an integer >= 0, got 1.5"),
        (lambda: DeviceRounds(over_selection="2"), "over_selection to be finite and >= 1, got '2'"),
        (lambda: DeviceRounds(deadline="5"), "deadline in seconds > 0, or None for none, got '5'"),
        (lambda: DeviceRounds(min_reports="3"), "min_reports as a count >= 1 or a fraction .* got '3'"),
        (lambda: DeviceRounds(pace_seconds="9"), "pace_seconds to be finite and >= 0, got '9'"),
        (lambda: DeviceRounds(max_wait_hours=None), "max_wait_hours to be finite and >= 0, got None"),
        (lambda: DeviceRounds(wait_seconds="9"), "wait_seconds > 0 and finite, got '9'"),
        (lambda: DeviceRounds(policies=AdaptiveEpochs()), r"policies to be a list .* \[AdaptiveEpochs\(\)\], got <"),
        (lambda: DeviceRounds(policies=[3]), r"DeviceRounds expected policies to be a list of policies .* got \[3\]"),
        (lambda: DeviceRounds(policies=[AdaptiveEpochs]), "policies to be a list of policies"),
        (lambda: DeviceRounds(eligibility=lambda now: True), "DeviceRounds expected eligibility .* with Satisfies"),
        (lambda: AdaptiveEpochs("5"), "AdaptiveEpochs expected threshold .* got threshold='5'"),
        (lambda: AdaptiveEpochs(factor="5"), "AdaptiveEpochs expected .* factor='5'"),
        (lambda: AdaptiveWidth(memory_gb="5"), "AdaptiveWidth expected memory_gb > 0 .* memory_gb='5'"),
        (lambda: DeadlineSteps(margin="0"), "margin in .* got '0'"),
        (lambda: Eligibility(idle="yes"), "Eligibility expected idle to be True or False, got 'yes'"),
        (lambda: Eligibility(unmetered=1), "Eligibility expected unmetered to be True or False, got 1"),
        (lambda: DeviceFleet(start_hour="x"), r"DeviceFleet expected start_hour to be an hour in .* got 'x'"),
        (lambda: DeviceFleet(seed="a"), "DeviceFleet expected seed to be an integer, got 'a'"),
        (lambda: DeviceFleet(seed=0.5), "DeviceFleet expected seed to be an integer, got 0.5"),
        (lambda: DeviceFleet(speed_unit="examples", batch_size="8"), "batch_size to be an integer >= 1, got '8'"),
        (lambda: OortSampler(cutoff=0), "cutoff in"),
        (lambda: OortSampler(penalty=-1), "penalty >= 0"),
        (lambda: OortSampler(preferred_seconds=0), "preferred_seconds > 0"),
        (lambda: FairSampler(candidates=0.5), "candidates to be finite and >= 1"),
        (lambda: FederatedTrainer(schedule=DeviceRounds()), "DeviceRounds needs devices, got fleet=None"),
    ],
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_a_callable_that_returns_nonsense_names_the_client() -> None:
    fleet = DeviceFleet(speed=lambda client_id: -1.0 if client_id == "b" else 1.0)
    with pytest.raises(MisconfigurationException, match="speed of client 'b' in"):
        fleet.values("speed", ["a", "b"])


def test_a_condition_that_returns_no_booleans() -> None:
    rule = Satisfies(lambda now: now.battery, "odd")
    with pytest.raises(MisconfigurationException, match="condition of 'odd' to return 2 booleans, got float64"):
        rule.refusals(DeviceFleet().conditions(["a", "b"], 0.0))


def test_what_is_unfinished_says_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="must define holds"):
        Rule().holds(DeviceFleet().conditions(["a"], 0.0))
    with pytest.raises(NotImplementedError, match="must define adapt"):
        WorkPolicy().adapt(None, None)  # type: ignore[arg-type]


class Policy(WorkPolicy):
    def __init__(self, adapt: Any) -> None:
        self.given = adapt

    def adapt(self, work: Work, now: Circumstances) -> Work:
        given: Work = self.given(work, now)
        return given


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (lambda work, now: None, "Policy.adapt expected to return a Work for client 'a', got None. Return the work"),
        (lambda work, now: 1 / 0, r"Policy.adapt raised ZeroDivisionError\(.*\) for client 'a'"),
        (lambda work, now: replace(work, epochs=0), "integer >= 1 and a width .* client 'a', got epochs=0, steps=None"),
        (lambda work, now: replace(work, steps=0), "client 'a', got epochs=1, steps=0"),
        (lambda work, now: replace(work, epochs=0.5), "client 'a', got epochs=0.5"),
        (lambda work, now: replace(work, width=0.0), "client 'a', got .* width=0.0"),
    ],
)
def test_a_policy_without_work_names_itself_and_the_client(adapt: Any, message: str) -> None:
    now = Circumstances("a", 1.0, False, num_steps=5, step_seconds=1.0, travel_seconds=0.0, seconds_left=9.0)
    with pytest.raises(MisconfigurationException, match=message):
        adapted(Work(), now, [Policy(adapt)], lambda work: 5)


def test_a_policy_s_error_ends_a_fit_with_its_name() -> None:
    rounds = DeviceRounds(policies=[Policy(lambda work, now: None)])
    with pytest.raises(MisconfigurationException, match=r"Policy\.adapt expected to return a Work for client 's"):
        fit_federated(Classifier(), sites(3), max_rounds=1, fleet=DeviceFleet(), schedule=rounds)


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["client_id,speed,colour", "a,1,2"], "line 1: expected columns among .* got 'colour'"),
        (["speed", "1"], "line 1: expected a column client_id, got speed"),
        (["client_id,speed,speed", "a,1,1"], "line 1: expected every column once, got 'speed' twice"),
        ([""], "line 1: expected a column client_id, got nothing"),
        (["client_id,speed"], "has no device: line 2 is missing"),
        (["client_id,speed", "a,1", "b,"], "line 3: expected a value of speed, got a gap"),
        (["client_id,speed", "a,1", ",2"], "line 3: expected a client_id, got a gap"),
        (["client_id,speed", "a,1", "b"], "line 3: expected 2 values, got 1"),
        (["client_id,speed", "a,quick"], r"line 2: expected speed to be a number in \[1e-09, inf\], got 'quick'"),
        (["client_id,speed", "a,nan"], "line 2: expected speed to be a number"),
        (["client_id,battery_level", "a,1.5"], r"line 2: expected battery_level to be a number in \[0, 1\]"),
        (["client_id,seconds,online", "a,0,1", "a,-5,1"], "line 3: expected seconds to be a finite number >= 0"),
        (["client_id,seconds,online", "a,inf,1"], "line 2: expected seconds to be a finite number >= 0, got 'inf'"),
        (["client_id,online", "a,1", "b,0.5"], "line 3: expected online to be 0 or 1, got '0.5'"),
        (["client_id,charging", "a,nan"], "line 2: expected charging to be 0 or 1, got 'nan'"),
        (["client_id,seconds,online", "a,60,1", "a,30,0"], "line 3: expected the times of client 'a' to go up, got 30"),
        (["client_id,seconds,online", "a,60,1", "a,60,0"], "line 3: expected the times of client 'a' to go up"),
        (["client_id,seconds,online", "a,0,1", "a,90000,0"], "line 3: .* got a gap of 90000 seconds"),
        (["client_id,seconds,online", "a,0,1", "b,9999999,1"], "line 3: expected the first row of client 'b' within"),
        (["client_id,seconds,online", "a,0,1", "b,0,1", "a,9,1"], "line 4: expected the rows of client 'a' to stand"),
        (["client_id,speed", "a,1", "a,2"], "line 3: expected one row of client 'a', as there is no column seconds"),
    ],
)
def test_a_damaged_trace_names_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        DeviceFleet.from_trace(written(tmp_path, *lines))


def test_a_time_without_end_is_refused_however_long_gaps_may_be(tmp_path: Path) -> None:
    path = written(tmp_path, "client_id,seconds,online", "a,inf,1")
    with pytest.raises(MisconfigurationException, match="line 2: expected seconds to be a finite number"):
        DeviceFleet.from_trace(path, max_gap_seconds=float("inf"))


def test_a_trace_in_another_encoding_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes("client_id,speed\nb,1\né,1\n".encode("latin-1"))
    with pytest.raises(MisconfigurationException, match=r"csv, line 3: expected text in UTF-8, got the byte 0xe9"):
        DeviceFleet.from_trace(path)


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes("client_id,speed\r\né,3\r\n".encode("utf-8-sig"))
    assert DeviceFleet.from_trace(path).values("speed", ["é"]).tolist() == [3.0]


@pytest.mark.parametrize("gap", [float("nan"), 0.0, -1.0, "a day", True])
def test_a_longest_gap_that_is_no_time_is_refused(tmp_path: Path, gap: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"expected max_gap_seconds > 0.*got .*86400\.0"):
        DeviceFleet.from_trace(written(tmp_path, "client_id,seconds,online", "a,0,1"), max_gap_seconds=gap)


def test_a_trace_that_is_not_there_and_a_client_that_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="found none at"):
        DeviceFleet.from_trace(tmp_path / "nothing.csv")
    path = written(tmp_path, "client_id,speed", "a,1")
    with pytest.raises(MisconfigurationException, match="no device for client 'b'; it has 1 devices, the first is 'a'"):
        DeviceFleet.from_trace(path).values("speed", ["a", "b"])
    with pytest.raises(MisconfigurationException, match="assign to be 'id' or 'draw'"):
        DeviceFleet.from_trace(path, assign="hash")  # type: ignore[arg-type]


def test_a_trace_says_how_devices_are(tmp_path: Path) -> None:
    path = written(
        tmp_path, "client_id,seconds,online,battery_level,speed,charging", "7,0,1,0.9,2,0", "7,600,1,0.8,2,0",
        "7,1200,0,0.7,4,0", "b,300,1,0.5,1,0", "b,900,1,0.4,1,0", "b,1500,1,0.6,1,1",
    )  # fmt: skip
    fleet = DeviceFleet.from_trace(path, latency_seconds=0.5)
    now = fleet.conditions([7, "b"], at=700.0)
    assert now.battery.tolist() == [0.8, 0.5]
    assert now.online.tolist() == [True, True]
    assert fleet.conditions(["7"], at=1200.0).online.tolist() == [False]
    assert fleet.conditions(["b"], at=0.0).battery.tolist() == [0.5], "the first row holds before its time"
    assert fleet.conditions(["b"], at=1e9).charging.tolist() == [True], "and the last one for what it still says"
    assert [fleet.seconds(7, 4, at=at) for at in (0.0, 1300.0)] == [3.0, 2.0]
    left = fleet.offline_from([7, "b"], np.array([650.0, 650.0]), np.array([5000.0, 5000.0]))
    assert left.tolist() == [1200.0, float("inf")]
    assert fleet.offline_from([7], np.array([0.0]), np.array([1000.0])).tolist() == [float("inf")]


@pytest.mark.parametrize("column", ["online", "speed"])
def test_a_device_is_offline_when_its_trace_ended_a_gap_ago(tmp_path: Path, column: str) -> None:
    path = written(tmp_path, f"client_id,seconds,{column}", "a,0,1", "a,600,1", "b,900,1")
    fleet = DeviceFleet.from_trace(path, max_gap_seconds=1000.0)
    ends = {1600.0: [True, True], 1601.0: [False, True], 1901.0: [False, False]}
    assert {at: fleet.conditions(["a", "b"], at=at).online.tolist() for at in ends} == ends
    left = fleet.offline_from(["a", "b"], np.array([1500.0, 1500.0]), np.array([1700.0, 1700.0]))
    assert left.tolist() == [1600.0, float("inf")]
    endless = DeviceFleet.from_trace(path, max_gap_seconds=float("inf"))
    assert endless.conditions(["a"], at=1e9).online.tolist() == [True]
    static = DeviceFleet.from_trace(written(tmp_path, f"client_id,{column}", "a,1"))
    assert static.conditions(["a"], at=1e9).online.tolist() == [True], "without times it is no record of a time"


def test_work_is_missing_in_a_measured_battery_until_it_is_charged(tmp_path: Path) -> None:
    from fl_lightning.devices import Participants

    path = written(
        tmp_path, "client_id,seconds,battery_level", "a,0,0.9", "a,600,0.8", "a,1200,1.0", "a,1800,0.9",
    )  # fmt: skip
    fleet, known = DeviceFleet.from_trace(path), Participants()
    known.worked("a", level=0.6, at=100.0, delivered=True)
    levels = [fleet.battery(["a"], at, known).item() for at in (100.0, 700.0, 1300.0, 1900.0)]
    assert levels == pytest.approx([0.6, 0.5, 1.0, 0.9])


def test_a_hundred_measured_devices_serve_a_million_clients(tmp_path: Path) -> None:
    path = written(tmp_path, "client_id,speed", *(f"{index},{index + 1}" for index in range(100)))
    speeds = DeviceFleet.from_trace(path, assign="draw").values("speed", range(10**6))
    counts = np.bincount(speeds.astype(int), minlength=101)[1:]
    assert counts.min() > 9500
    assert counts.max() < 10_500


def test_rules_compose_and_the_first_gives_the_reason() -> None:
    fleet = DeviceFleet(
        battery_level=lambda c: 0.1 if c in ("low", "both") else 1.0, charge_hours=0.0, battery_wh=15,
        quality=lambda c: 0.3 if c in ("bad", "both") else 1,
        memory_gb=lambda c: 2.0 if c == "small" else 8.0, metered=lambda c: c == "paid",
        idle_hours=lambda c: 0.0 if c == "used" else 24.0, online_hours=lambda c: 0.0 if c == "away" else 24.0,
    )  # fmt: skip
    ids = ["fine", "low", "bad", "both", "small", "paid", "used", "away"]
    now = fleet.conditions(ids, 0.0)
    assert dict(zip(ids, Eligibility().refusals(now), strict=True)) == {
        "fine": "", "low": "low battery", "bad": "poor network", "both": "low battery", "small": "", "paid": "",
        "used": "", "away": "offline",
    }  # fmt: skip
    strict = Eligibility(idle=True, unmetered=True, memory_gb=4.0)
    assert [reason for reason in strict.refusals(now) if reason] == [
        "low battery", "poor network", "low battery", "too little memory", "metered network", "in use", "offline",
    ]  # fmt: skip
    assert set(Eligibility(charging=True).refusals(now)) == {"not charging", "low battery", "poor network", "offline"}
    both = BatteryAtLeast(0.5) & (BatteryAtLeast(0.9) & Satisfies(lambda c: c.quality > 0.5, "odd"))
    assert len(both.rules) == 3
    assert (both.holds(now) == [reason == "" for reason in both.refusals(now)]).all()
    assert BatteryAtLeast(0.5, or_charging=True).holds(DeviceFleet(battery_level=0.0).conditions(["a"], 0.0)).all()
    night = LocalHours(22, 6)
    at = [night.holds(DeviceFleet(start_hour=float(h)).conditions(["a"], 0.0)).item() for h in range(24)]
    assert [hour for hour, inside in enumerate(at) if inside] == [0, 1, 2, 3, 4, 5, 22, 23]
