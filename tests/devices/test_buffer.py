"""Devices under FedBuff and FedAsync: who may work, who is lost on the way, and what the clock and batteries show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spine_zoo import QUIET, Classifier, assert_same_bits, sites, weights
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import DeviceFleet, FedAsync, FedAvg, FedBuff, FederatedTrainer
from fl_lightning.devices import AdaptiveEpochs, DeviceBuffer, DeviceRounds, Eligibility
from fl_lightning.errors import MisconfigurationException, NotEnoughClientsError
from fl_lightning.schedules import BufferedSchedule
from fl_lightning.schedules.plan import Occasion
from fl_lightning.types import Work

SPEEDS = {"s0": 1.0, "s1": 0.399, "s2": 0.143, "s3": 0.496, "s4": 1.33}


class Stopwatch:
    """A clock and no more: the same times as the fleet's, and no conditions."""

    def seconds(self, client_id: str, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        return num_steps / SPEEDS[client_id]


def fit(
    rounds: int = 8, algorithm: Any = None, module: Any = None, data: Any = None, **arguments: Any
) -> tuple[Any, Any]:
    pl.seed_everything(4, verbose=False)
    torch.manual_seed(0)
    module = Classifier(hidden=6) if module is None else module
    trainer = FederatedTrainer(
        algorithm=algorithm or FedBuff(2, concurrency=4), max_rounds=rounds, **{**QUIET, "num_threads": 1, **arguments}
    )
    trainer.fit(module, data or sites(5))
    return trainer, weights(module)


class Keep(pl.Callback):
    """Keeps a fit's schedule at hand."""

    schedule: Any = None

    def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self.schedule = trainer.federated_fit.federation.dispatcher.schedule


def fleet(**more: Any) -> DeviceFleet:
    return DeviceFleet(speed=lambda client_id: SPEEDS[client_id], **more)


@pytest.mark.parametrize("algorithm", [FedBuff(2, concurrency=4), FedAsync(0.6)], ids=["fedbuff", "fedasync"])
def test_devices_that_are_never_in_the_way_change_nothing(algorithm: Any) -> None:
    first, plain = fit(algorithm=algorithm, fleet=Stopwatch())
    second, own = fit(algorithm=algorithm, fleet=fleet())
    assert_same_bits(plain, own)
    assert [r.cohort for r in first.round_history] == [r.cohort for r in second.round_history]
    clocks = [[r.metrics["simulated_seconds"] for r in t.round_history] for t in (first, second)]
    assert clocks[0] == clocks[1]


def test_who_is_not_eligible_is_not_sent_work_and_is_counted() -> None:
    levels = dict.fromkeys(SPEEDS, 1.0) | {"s0": 0.1, "s4": 0.19}
    trainer, _ = fit(fleet=fleet(battery_level=lambda c: levels[c]), algorithm=FedBuff(2, concurrency=3))
    for report in trainer.round_history:
        assert set(report.cohort) <= {"s1", "s2", "s3"}
    assert sum(r.metrics["devices/dropped/low_battery"] for r in trainer.round_history) > 0
    rule = DeviceBuffer(eligibility=Eligibility(battery=0.0))
    trainer, _ = fit(fleet=fleet(battery_level=lambda c: levels[c]), schedule=rule)
    assert {"s0", "s4"} & {c for r in trainer.round_history for c in r.cohort}


def test_who_gives_up_frees_its_place_and_brings_nothing() -> None:
    trainer, _ = fit(12, fleet=fleet(dropout=lambda c: 1.0 if c == "s3" else 0.0))
    assert not any("s3" in report.cohort for report in trainer.round_history)
    lost = [report.dropped for report in trainer.round_history if report.dropped]
    assert {reason for dropped in lost for reason in dropped.values()} == {"gave up"}
    assert sum(report.metrics["devices/dropped/gave_up"] for report in trainer.round_history) >= len(lost) > 0
    often, _ = fit(60, fleet=fleet(dropout=0.3), algorithm=FedBuff(1, concurrency=1))
    gone = sum(report.metrics["devices/dropped/gave_up"] for report in often.round_history)
    assert 60 * 0.3 / 0.7 * 0.5 < gone < 60 * 0.3 / 0.7 * 1.7


def test_work_drains_a_battery_until_it_is_refused() -> None:
    own = fleet(battery_wh=lambda c: 0.02 if c == "s1" else 100.0, train_watts=6.0, charge_hours=0.0, idle_watts=0.0)
    trainer, _ = fit(40, fleet=own)
    ideal, _ = fit(1, fleet=fleet())
    assert "devices/energy_wh_estimate" not in ideal.round_history[0].metrics, "without watts nothing is known"
    cohorts = [report.cohort for report in trainer.round_history]
    took_part = [number for number, cohort in enumerate(cohorts) if "s1" in cohort]
    assert took_part
    assert max(took_part) < 30
    assert sum(report.metrics["devices/dropped/low_battery"] for report in trainer.round_history[30:]) > 0
    assert all(report.metrics["devices/energy_wh_estimate"] > 0 for report in trainer.round_history)


def test_two_works_of_a_device_at_a_time_both_drain_its_battery() -> None:
    own = fleet(battery_wh=1.0, train_watts=6.0, charge_hours=0.0, idle_watts=0.0, battery_level=1.0)
    keep = Keep()
    algorithm = FedBuff(1, concurrency=10, client_concurrency=2)
    trainer, _ = fit(20, fleet=own, algorithm=algorithm, callbacks=[keep])
    levels, _ = keep.schedule.participants.levels(list(SPEEDS))
    spent = sum(report.metrics["devices/energy_wh_estimate"] for report in trainer.round_history)
    assert spent > 0
    assert float(sum(1.0 - level for level in levels if level == level)) == pytest.approx(spent, rel=1e-6)


def test_only_updates_that_are_summed_are_reports() -> None:
    def reported(**arguments: Any) -> Any:
        keep = Keep()
        trainer, _ = fit(20, fleet=fleet(), callbacks=[keep], **arguments)
        reports = sum(report.metrics["devices/reports"] for report in trainer.round_history)
        cohorts = sum(len(report.cohort) for report in trainer.round_history)
        assert cohorts == reports == int(keep.schedule.tallies.by_class.sum())
        return trainer

    late = reported(algorithm=FedBuff(1, concurrency=5, max_staleness=2))
    assert any("max_staleness" in reason for report in late.round_history for reason in report.dropped.values())
    data = sites(5)
    unusable = TensorDataset(torch.full((8, 8), math.nan), torch.zeros(8, dtype=torch.long))
    data["s1"] = DataLoader(unusable, batch_size=4)
    with pytest.warns(UserWarning, match="'s1' is skipped"):
        bad = reported(on_bad_update="skip", data=data)
    assert sum(len(report.cohort) for report in bad.round_history) < 40


def test_few_eligible_among_many_are_found_without_asking_for_each_place() -> None:
    """Fifteen of 20,000: everyone is listed once for all free places, and nobody is drawn twice."""
    asked = []

    class Rare(BufferedSchedule):
        def admitted(self, occasion: Any, client_ids: Any, at: float) -> list[bool]:
            asked.append(len(client_ids))
            return [client_id % 1400 == 0 for client_id in client_ids]

    class Everyone:
        def client_ids(self) -> range:
            return range(20_000)

    plan = Rare(2, concurrency=15).plan(
        Occasion(0, 0.0, 0, Everyone(), 2, 0, 0, 0, None, lambda size: [], lambda c: Work(), lambda c, w: 1)
    )
    assert len(set(plan.downloads)) == 15
    assert sum(asked) < 20_000 + 15 * 2080
    assert len(asked) <= 3 * 15 + 1


def test_the_clock_waits_for_someone_eligible_and_not_for_ever() -> None:
    night = fleet(idle_from_hour=2.0, idle_hours=4.0)
    rule = DeviceBuffer(eligibility=Eligibility(idle=True), wait_seconds=600.0)
    trainer, _ = fit(2, fleet=night, schedule=rule)
    assert 7200 <= trainer.round_history[0].metrics["simulated_seconds"] < 7200 + 600 + 100
    with pytest.raises(
        NotEnoughClientsError,
        match=r"nobody was eligible in 1 hours .*counted at every look.*: \d+ in use.*Relax the eligibility",
    ):
        fit(2, fleet=night, schedule=DeviceBuffer(eligibility=Eligibility(idle=True), max_wait_hours=1.0))
    with pytest.raises(NotEnoughClientsError, match=r"1000 devices in a row were lost .*gave up.*Lower the fleet's"):
        fit(2, fleet=fleet(dropout=1.0))


def test_a_device_rests_after_its_work() -> None:
    rule = DeviceBuffer(rest_seconds=1e6, max_wait_hours=1.0)
    with pytest.raises(NotEnoughClientsError, match="worked recently"):
        fit(4, fleet=fleet(), schedule=rule)  # five devices make two rounds of two
    trainer, _ = fit(2, fleet=fleet(), schedule=rule)
    everyone = [client for report in trainer.round_history for client in report.cohort]
    assert len(set(everyone)) == len(everyone) == 4


def test_policies_change_the_work() -> None:
    low = {"battery_level": 0.4, "battery_wh": 1e6, "charge_hours": 0.0}
    full, _ = fit(4, fleet=fleet(**low), local_epochs=4)
    half, _ = fit(4, fleet=fleet(**low), local_epochs=4, schedule=DeviceBuffer(policies=[AdaptiveEpochs()]))
    steps = [sum(report.num_steps / len(report.cohort) for report in t.round_history) for t in (full, half)]
    assert steps[1] < 0.75 * steps[0]


def test_a_resume_goes_on_with_devices_under_way(tmp_path: Path) -> None:
    start, ends, histories = weights(Classifier(hidden=6)), [], []
    for stop in (None, 4):
        folder = tmp_path / str(stop)
        for rounds in (9,) if stop is None else (stop, 9):
            module = Classifier(hidden=6)
            module.load_state_dict(start)
            pl.seed_everything(3, verbose=False)
            trainer = FederatedTrainer(
                algorithm=FedBuff(2, concurrency=4), max_rounds=rounds,
                fleet=fleet(dropout=0.3, battery_wh=0.05, battery_level=0.6, charge_hours=0.0),
                callbacks=[ModelCheckpoint(folder, save_last=True)],
                **{**QUIET, "default_root_dir": str(folder), "enable_checkpointing": True, "num_threads": 1},
            )  # fmt: skip
            trainer.fit(module, sites(5), ckpt_path=str(folder / "last.ckpt") if rounds == 9 and stop else None)
        ends.append(weights(module))
        histories.append([(r.cohort, dict(r.dropped), r.metrics["simulated_seconds"]) for r in trainer.round_history])
    assert_same_bits(*ends)
    assert histories[0] == histories[1]
    assert any(dropped for _, dropped, _ in histories[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": DeviceBuffer()}, r"DeviceBuffer needs devices, got fleet=None"),
        ({"schedule": DeviceBuffer(), "fleet": Stopwatch()}, r"DeviceBuffer needs devices, got fleet=<"),
        (
            {"schedule": DeviceBuffer(), "fleet": fleet(), "algorithm": FedAvg()},
            r"DeviceBuffer is for FedBuff and FedAsync, and FedAvg works in rounds\. Write schedule=DeviceRounds",
        ),
        ({"schedule": DeviceRounds(), "fleet": fleet()}, r"would not use schedule=DeviceRounds"),
    ],
)
def test_where_it_has_no_place_it_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(1, **arguments)


@pytest.mark.parametrize("bad", [{"rest_seconds": -1.0}, {"wait_seconds": 0.0}, {"max_wait_hours": float("inf")}])
def test_numbers_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(MisconfigurationException, match="DeviceBuffer expected rest_seconds >= 0, wait_seconds > 0"):
        DeviceBuffer(**bad)


def test_what_is_no_rule_and_no_policy_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match=r"DeviceBuffer.*eligibility"):
        DeviceBuffer(eligibility=lambda conditions: True)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"DeviceBuffer.*policies"):
        DeviceBuffer(policies=AdaptiveEpochs())  # type: ignore[arg-type]
