"""Fleets in a federation: nothing in the way is FedAvg, a resume is no interruption, two ranks are one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from devices_ddp import SAMPLERS, arguments
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from spine_zoo import QUIET, Classifier, ServedSites, assert_same_bits, sites, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fl_lightning import DeviceFleet, FedAvg, FederatedTrainer
from fl_lightning.devices import DeviceRounds
from fl_lightning.errors import MisconfigurationException, NotEnoughClientsError
from fl_lightning.schedules.reasons import round_summary
from fl_lightning.transforms import Quantize, TopK
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory


def fitted(ckpt: Any = None, clients: int = 8, **more: Any) -> tuple[dict[str, torch.Tensor], FederatedTrainer]:
    pl.seed_everything(7, verbose=False)
    module = Classifier(hidden=6)
    trainer = FederatedTrainer(**{**QUIET, "max_rounds": 4, "clients_per_round": 3, **more})
    trainer.fit(module, ServedSites(sites(clients)), ckpt_path=ckpt)
    return weights(module), trainer


@pytest.mark.parametrize("more", [{}, {"clients_per_round": None}, {"local_loop": "lean", "group_size": 2}], ids=str)
def test_devices_that_are_never_in_the_way_change_nothing(more: dict[str, Any]) -> None:
    plain, without = fitted(**more)
    ideal, with_fleet = fitted(fleet=DeviceFleet(), **more)
    assert_same_bits(plain, ideal)
    assert [r.cohort for r in without.round_history] == [r.cohort for r in with_fleet.round_history]
    assert [r.num_bytes_down for r in without.round_history] == [r.num_bytes_down for r in with_fleet.round_history]
    assert not any(r.dropped for r in with_fleet.round_history)
    # speed alone moves the clock and nothing else
    slow, slower = fitted(fleet=DeviceFleet(speed=lambda client_id: 0.25), **more)
    assert_same_bits(plain, slow)
    times = [[r.metrics["simulated_seconds"] for r in t.round_history] for t in (with_fleet, slower)]
    assert times[1] == pytest.approx([4 * seconds for seconds in times[0]])
    assert times[0] == sorted(times[0])


def test_the_bytes_of_every_attempt_count() -> None:
    """A model down for each device that is sent work, and an update up for each report, abandoned attempts included."""
    names = list(sites(12))
    fleet = DeviceFleet(speed=lambda client_id: 0.001 if client_id in names[:6] else 100.0)
    rounds = DeviceRounds(deadline=5.0, min_reports=3, retries=9)
    _, trainer = fitted(clients=12, max_rounds=6, fleet=fleet, schedule=rounds)
    _, plain = fitted(clients=12, max_rounds=1)
    model_bytes, update_bytes = (
        plain.round_history[0].num_bytes_down // 3, plain.round_history[0].num_bytes_up // 3,
    )  # fmt: skip
    assert any(r.metrics["devices/sent"] > 3 for r in trainer.round_history)
    in_vain = 0
    for report in trainer.round_history:
        assert report.num_bytes_down == model_bytes * report.metrics["devices/sent"]
        reports = 3 + report.metrics["devices/dropped/round_abandoned"]
        assert report.num_bytes_up == pytest.approx(update_bytes * reports, abs=3 * reports)
        in_vain += int(reports) - 3
    assert in_vain, "some attempts had reports and too few of them"


def test_the_fewest_reports_are_kept_when_an_update_is_refused() -> None:
    data = sites(4)
    data["s1"].dataset.tensors[0].fill_(float("nan"))  # type: ignore[attr-defined]

    def fit(min_reports: int) -> FederatedTrainer:
        rounds = DeviceRounds(min_reports=min_reports)
        trainer = FederatedTrainer(
            **{**QUIET, "max_rounds": 1}, fleet=DeviceFleet(), schedule=rounds, on_bad_update="skip"
        )
        trainer.fit(Classifier(), ServedSites(data))
        return trainer

    with pytest.warns(UserWarning, match="Client 's1' is skipped"):
        assert fit(3).round_history[0].cohort == ["s0", "s2", "s3"]
    message = "Round 0 needs min_reports=4, but only 3 clients delivered. Skipped: 's1': .* or lower min_reports"
    with pytest.warns(UserWarning, match="Client 's1' is skipped"), pytest.raises(NotEnoughClientsError, match=message):
        fit(4)


@pytest.mark.parametrize("transforms", [[TopK(0.05)], [Quantize(4)], [TopK(0.1), Quantize(8)]], ids=repr)
def test_the_first_round_s_clock_is_that_of_the_encoded_upload(transforms: list[Any]) -> None:
    """Training and download take no time here: what is left is the upload, to the bytes of a client's name."""
    trainer = FederatedTrainer(
        **{**QUIET, "max_rounds": 2}, transforms=transforms, fleet=DeviceFleet(speed=1e9, upload_mbps=0.008)
    )
    trainer.fit(Classifier(hidden=200), ServedSites(sites(3)))  # 9,612 bytes as they are
    first, second = trainer.round_history
    charged = [1000 * report.metrics["devices/round_seconds"] for report in (first, second)]
    assert charged[0] < 3000
    assert charged == pytest.approx([first.num_bytes_up / 3] * 2, abs=24)


def test_what_is_dropped_is_not_in_the_sum() -> None:
    """A round without the two slow sites is a round of a federation in which they are not chosen."""
    names = list(sites(8))
    slow = set(names[:2])
    fleet = DeviceFleet(speed=lambda client_id: 0.001 if client_id in slow else 10.0)
    found, trainer = fitted(clients_per_round=None, max_rounds=2, fleet=fleet, schedule=DeviceRounds(deadline=60.0))
    assert trainer.round_history[1].dropped == dict.fromkeys(names[:2], "missed the deadline")
    assert trainer.round_history[1].cohort == sorted(set(names) - slow)

    class Others:
        def cohort(self, population: Any, size: int, seed: int, round: int) -> list[Any]:
            return names[2:]

    expected, other = fitted(max_rounds=2, sampler=Others())
    assert_same_bits(found, expected)
    model_bytes = other.round_history[1].num_bytes_down // len(names[2:])
    assert trainer.round_history[1].num_bytes_down == len(names) * model_bytes, "the late ones had downloaded the model"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_resume_goes_on_with_batteries_clock_and_what_the_sampler_learned(name: str, tmp_path: Path) -> None:
    def saving() -> dict[str, Any]:
        keep = ModelCheckpoint(save_top_k=-1, dirpath=tmp_path, filename="{epoch}", enable_version_counter=False)
        return {"enable_checkpointing": True, "callbacks": keep, **arguments(SAMPLERS[name]())}

    whole, uninterrupted = fitted(**saving())
    same, resumed = fitted(tmp_path / "epoch=1.ckpt", **saving())
    assert_same_bits(whole, same)
    for left, right in zip(uninterrupted.round_history, resumed.round_history, strict=True):
        assert (left.cohort, left.dropped, left.metrics) == (right.cohort, right.dropped, right.metrics)
    checkpoint = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["fl_lightning"]
    known = checkpoint["schedule"]["DeviceRounds"]["participants"]
    assert 3 <= len(known["ids"]) <= 8
    assert known["levels"].min() < 0.95, "work has drained batteries"
    if name == "oort":
        with pytest.raises(MisconfigurationException, match="written with sampler=OortSampler"):
            fitted(tmp_path / "epoch=1.ckpt", **{**saving(), "sampler": SAMPLERS["fair"]()})


def test_partial_work_is_marked_and_its_steps_are_counted() -> None:
    seen: dict[Any, tuple[str, int]] = {}

    class Watched(FedAvg):
        def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Any]:
            seen[update.client_id] = update.status, update.num_steps
            return super().contribute(update, task, memory)

    names = list(sites(8))
    for more in ({"local_loop": "lightning"}, {"local_loop": "lean"}, {"local_loop": "lean", "group_size": 4}):
        seen.clear()
        fleet = DeviceFleet(speed=lambda client_id: 1.0 if client_id in names[:2] else 100.0)
        _, trainer = fitted(
            clients_per_round=None, max_rounds=1, local_epochs=9, fleet=fleet, algorithm=Watched(),
            schedule=DeviceRounds(deadline=5.0, stragglers="partial"), **more,
        )  # fmt: skip
        assert {client_id: found for client_id, found in seen.items() if found[0] == "partial"} == dict.fromkeys(
            names[:2], ("partial", 5)
        )
        assert trainer.round_history[0].num_steps == sum(steps for _, steps in seen.values())


def test_nobody_eligible_ends_the_fit_with_the_reasons() -> None:
    with pytest.raises(NotEnoughClientsError, match=r"8 low battery"):
        fitted(fleet=DeviceFleet(battery_level=0.0))


def test_fast_dev_run_takes_two_clients() -> None:
    _, trainer = fitted(fleet=DeviceFleet(), schedule=DeviceRounds(over_selection=1.5), fast_dev_run=True)
    assert len(trainer.round_history[0].cohort) == 2


def test_accuracy_by_class_of_device() -> None:
    order = list(sites(9))
    fleet = DeviceFleet(speed=lambda client_id: 1.0 + order.index(client_id))
    pl.seed_everything(7, verbose=False)
    trainer = FederatedTrainer(**QUIET, max_rounds=1, evaluate_clients=True, fleet=fleet)
    data = ServedSites(sites(9), client_val=sites(9, shuffle=False))
    trainer.fit(Classifier(hidden=6), data)
    metrics = trainer.round_history[0].metrics
    own = {}
    for name, loader in sites(9, shuffle=False).items():  # every client evaluated by plain Lightning
        module = Classifier(hidden=6)
        module.load_state_dict(trainer.lightning_module.state_dict())
        (found,) = pl.Trainer(**QUIET).validate(module, loader, verbose=False)
        own[name] = found["val_acc"]
    for place, device_class in enumerate(("slow", "medium", "fast")):
        expected = sum(own[name] for name in order[3 * place : 3 * place + 3]) / 3
        assert metrics[f"clients/val_acc/{device_class}"] == pytest.approx(expected, abs=1e-6)


PROGRAM = """
import sys
sys.path[:0] = {paths}
import devices_ddp
if __name__ == "__main__":
    devices_ddp.main(int(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_two_ranks_give_the_same_bits_as_one(tmp_path: Path) -> None:
    here = Path(__file__).parent
    results = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        (folder / "script.py").write_text(PROGRAM.format(paths=[str(here), str(here.parent / "spine")]))
        environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")}
        command = [sys.executable, "script.py", str(devices), str(folder)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = torch.load(folder / "weights.pt", weights_only=True)
        results.append((found, json.loads((folder / "history.json").read_text())))
    for name, own in results[0][0].items():
        assert_same_bits(own, results[1][0][name])
    assert results[0][1] == results[1][1]
    assert any(report["dropped"] for report in results[0][1]["uniform"])


def test_tensorboard_shows_the_fleet(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    more = arguments(None) | {"logger": logger, "max_rounds": 3}
    _, trainer = fitted(**more)
    assert trainer.log_dir is not None
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {"devices/share/slow", "devices/battery/median", "devices/dropped/gave_up"} <= set(tags["scalars"])
    report = trainer.round_history[-1]
    hours = events.Histograms("devices/hour_of_reports")[-1].histogram_value
    assert hours.num == sum(len(r.cohort) for r in trainer.round_history)
    reports = events.Histograms("devices/reports_of_a_participant")[-1].histogram_value
    assert (reports.num, reports.sum) == (report.metrics["devices/participants"], hours.num)
    everyone = events.Histograms("devices/battery_of_everyone")[-1].histogram_value
    assert everyone.num == 8
    assert 0 <= everyone.min <= everyone.max <= 1
    lost = {
        event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("round/dropped/text_summary")
    }
    assert lost == {r.round: round_summary(r) for r in trainer.round_history if r.dropped}
    assert lost
    layout = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    assert b"Sent work, and lost" in layout


def test_the_bar_says_who_was_lost(capsys: pytest.CaptureFixture[str]) -> None:
    names = list(sites(8))
    fleet = DeviceFleet(battery_level=lambda client_id: 0.1 if client_id in names[:3] else 1.0)
    fitted(clients_per_round=None, max_rounds=1, fleet=fleet, enable_progress_bar=True)
    assert "dropped: 3 low battery" in capsys.readouterr().out
