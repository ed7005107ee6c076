"""Devices: what they are, how they are at a time, and how long they take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fl_lightning.devices import (
    Choice,
    DeviceClasses,
    DeviceFleet,
    LogNormal,
    LogUniform,
    Normal,
    Participants,
    Uniform,
)
from fl_lightning.devices.battery import level_after
from fl_lightning.devices.draws import client_keys, uniforms
from fl_lightning.devices.fields import FIELDS

IDS = [0, 7, "7", "site-a", -3, 2**70]


def test_a_draw_is_the_same_alone_and_in_a_crowd() -> None:
    many = uniforms(client_keys(range(100_000)), 3, "speed")
    for index in (0, 1, 7, 99_999):
        assert many[index] == uniforms(client_keys([index]), 3, "speed")[0]
    fleet = DeviceFleet(profile="smartphones")
    for name in FIELDS:
        together = fleet.values(name, range(5000))
        assert together[4321] == fleet.values(name, [4321])[0] == fleet.values(name, ["x", 4321])[1], name


def test_ids_seeds_purposes_and_slots_are_different_addresses() -> None:
    keys = client_keys(IDS)
    assert len(set(keys.tolist())) == len(IDS)
    draws = [
        uniforms(keys, 0, "a"), uniforms(keys, 1, "a"), uniforms(keys, 0, "b"), uniforms(keys, 0, "a", 1),
        uniforms(keys, 0, "a", 2),
    ]  # fmt: skip
    assert len({value for draw in draws for value in draw.tolist()}) == 5 * len(IDS)


def test_draws_are_uniform_and_independent() -> None:
    draws = uniforms(client_keys(range(200_000)), 5, "quality")
    assert 0 < draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    # the expected distance of an empirical distribution of n draws is of the order of n ** -0.5 (Kolmogorov)
    assert np.abs(np.sort(draws) - (np.arange(200_000) + 0.5) / 200_000).max() < 2 / math.sqrt(200_000)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(draws, uniforms(client_keys(range(200_000)), 5, "quality", 1))[0, 1]) < 0.01


@pytest.mark.parametrize(
    ("distribution", "quantile"),
    [
        (Uniform(2, 6), lambda u: 2 + 4 * u),
        (LogUniform(1, 100), lambda u: 100**u),
        (Normal(3, 2), lambda u: statistics.NormalDist(3, 2).inv_cdf(u)),
        (LogNormal(20, 0.7), lambda u: 20 * math.exp(statistics.NormalDist(0, 0.7).inv_cdf(u))),
        (Choice([5, 1, 3, 3]), lambda u: [5, 1, 3, 3][int(4 * u)]),
    ],
    ids=lambda value: None if callable(value) else repr(value),  # an address would differ between workers
)
def test_quantiles_are_those_of_the_distribution(distribution: Any, quantile: Callable[[float], float]) -> None:
    levels = [0.001, 0.3, 0.5, 0.7, 0.999]
    assert distribution.quantile(np.array(levels)) == pytest.approx([quantile(u) for u in levels], rel=1e-9)
    text = repr(distribution).replace("[", "").replace("]", "").lower()
    again = DeviceFleet(speed=text).values("speed", range(50))
    assert again == pytest.approx(np.maximum(DeviceFleet(speed=distribution).values("speed", range(50)), 1e-9))


def test_a_property_may_be_a_number_a_callable_or_a_profile() -> None:
    fleet = DeviceFleet(
        speed=lambda client_id: {"a": 2.0, "b": 3.0}[client_id], metered=True, upload_mbps="smartphones"
    )
    assert fleet.values("speed", ["b", "a"]).tolist() == [3.0, 2.0]
    assert fleet.device("a").metered == 1.0
    phones = DeviceFleet(profile="smartphones").values("upload_mbps", range(99))
    assert fleet.values("upload_mbps", range(99)).tolist() == phones.tolist()
    assert np.median(phones) == pytest.approx(6.0, rel=0.3)
    assert fleet.values("download_mbps", ["a"]).tolist() == [math.inf]


def test_time_is_latency_and_bytes_over_bandwidth_and_steps_over_speed() -> None:
    fleet = DeviceFleet(speed=4.0, download_mbps=8.0, upload_mbps=2.0, latency_seconds=0.25)
    # 2 MB down at 1 MB/s, 10 steps at 4 a second, 1 MB up at 0.25 MB/s, two latencies
    assert fleet.seconds("a", 10, 2_000_000, 1_000_000) == pytest.approx(2 + 2.5 + 4 + 0.5)
    examples = DeviceFleet(speed=100.0, speed_unit="examples", batch_size=20)
    assert examples.seconds("a", 10) == pytest.approx(2.0)


def simulated(
    level: float, hour: float, elapsed: float, start: float, hours: float, gain: float, drain: float
) -> float:
    """The slow way: minute by minute."""
    minutes = round(elapsed * 60)
    for minute in range(minutes):
        charging = (hour + (minute + 0.5) / 60 - start) % 24 < hours
        level = min(1.0, level + gain / 60) if charging else max(0.0, level - drain / 60)
    return level


@pytest.mark.parametrize("seed", range(40))
def test_the_closed_form_of_a_battery_is_what_minutes_add_up_to(seed: int) -> None:
    draw = np.random.default_rng(seed)
    minutes = lambda low, high: draw.integers(low * 60, high * 60) / 60  # noqa: E731 (one line, used below only)
    level, gain, drain = draw.uniform(0, 1), draw.uniform(0, 0.5), draw.uniform(0, 0.2)
    arguments = (minutes(0, 24), minutes(0, 200), minutes(0, 24), minutes(0, 24), gain, drain)
    found = level_after(np.array([level]), *(np.array([value]) for value in arguments)).item()
    assert found == pytest.approx(simulated(level, *arguments), abs=1e-9)


def test_work_drains_and_the_night_charges() -> None:
    fleet = DeviceFleet(
        battery_wh=10.0, battery_level=0.9, charge_from_hour=22.0, charge_hours=8.0, charge_watts=10.0, idle_watts=0.5,
        timezone_hours=-2.0, start_hour=10.0,
    )  # fmt: skip
    # 10 UTC is 8 o'clock there; an hour of use takes a twentieth
    assert fleet.battery(["a"], 3600.0).tolist() == pytest.approx([0.85])
    known = Participants()
    known.worked("a", level=0.3, at=3600.0, delivered=True)
    assert fleet.battery(["a", "b"], 7200.0, known).tolist() == pytest.approx([0.25, 0.80])
    assert fleet.battery(["a"], 22 * 3600.0, known).tolist() == pytest.approx([1.0]), "6 o'clock in the morning"
    now = fleet.conditions(["a"], 13 * 3600.0)
    assert now.local_hour.tolist() == pytest.approx([21.0])
    assert not now.charging[0]
    assert fleet.conditions(["a"], 15 * 3600.0).charging[0]


def test_hours_online_and_idle_are_local_and_wrap_around_midnight() -> None:
    fleet = DeviceFleet(
        timezone_hours=lambda client_id: client_id, online_from_hour=20.0, online_hours=6.0, idle_from_hour=23.0,
        idle_hours=2.0,
    )  # fmt: skip
    for utc in range(24):
        now = fleet.conditions(list(range(-12, 13)), utc * 3600.0)
        local = [(utc + zone) % 24 for zone in range(-12, 13)]
        assert now.online.tolist() == [hour >= 20 or hour < 2 for hour in local]
        assert now.idle.tolist() == [hour in (23, 0) for hour in local]


def test_who_goes_offline_is_who_is_offline_later() -> None:
    """Against conditions(), hour by hour: the first look at which a device is away is at or after the time it left."""
    fleet = DeviceFleet(
        online_from_hour="uniform(0, 24)", online_hours="uniform(4, 24)", online_probability=0.9, timezone_hours=3.0
    )
    ids = list(range(300))
    online = np.flatnonzero(fleet.conditions(ids, 1234.0).online)
    begin, end = np.full(len(online), 1234.0), np.full(len(online), 1234.0 + 9 * 3600)
    left = fleet.offline_from([ids[i] for i in online], begin, end)
    looks = np.arange(1234.0, end[0], 60.0)
    away = np.stack([~fleet.conditions([ids[i] for i in online], at).online for at in looks])
    first = np.where(away.any(0), looks[away.argmax(0)], math.inf)
    assert (np.isinf(first) == np.isinf(left)).all()
    stays = np.isinf(left)
    assert 20 < stays.sum() < 280
    assert ((first[~stays] >= left[~stays]) & (first[~stays] - left[~stays] < 60.0)).all()


def test_quality_moves_from_hour_to_hour_around_its_mean() -> None:
    fleet = DeviceFleet(quality=0.5, quality_spread=0.2)
    quality = np.stack([fleet.conditions(range(500), hour * 3600.0).quality for hour in range(40)])
    assert 0.3 <= quality.min() < 0.31
    assert 0.69 < quality.max() <= 0.7
    assert quality.mean() == pytest.approx(0.5, abs=0.01)
    assert fleet.conditions(range(500), 10.0).quality.tolist() == fleet.conditions(range(500), 3000.0).quality.tolist()


def test_a_million_devices_are_looked_at_at_once() -> None:
    import tracemalloc

    fleet = DeviceFleet(profile="smartphones")
    tracemalloc.start()
    now = fleet.conditions([999_999], at=0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, "nothing is kept for those that nobody asks about"
    everyone = fleet.conditions(range(10**6), at=0.0)
    assert everyone.battery[999_999] == now.battery[0]
    assert everyone.online.mean() == pytest.approx(0.85, abs=0.01)


def test_classes_are_the_thirds_of_a_population() -> None:
    fleet = DeviceFleet(speed="lognormal(8, 0.7)")
    classes = DeviceClasses(fleet, range(100_000))
    found = classes.of(range(100_000))
    for name in ("slow", "medium", "fast"):
        assert found.count(name) == pytest.approx(100_000 / 3, rel=0.1)
    speeds = fleet.values("speed", range(100_000))
    assert max(s for s, c in zip(speeds, found, strict=True) if c == "slow") <= min(
        s for s, c in zip(speeds, found, strict=True) if c == "medium"
    )
    by_class = DeviceClasses(DeviceFleet(speed=lambda c: 1.0 + c), range(6)).means(
        "acc", {0: 0.2, 1: 0.4, 2: 0.5, 5: 1.0}
    )
    assert by_class == pytest.approx({"acc/slow": 0.3, "acc/medium": 0.5, "acc/fast": 1.0})
    assert DeviceClasses(DeviceFleet(), range(6)).means("acc", {0: 0.2, 5: 1.0}) == {}
