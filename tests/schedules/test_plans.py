"""Schedules, fleets and the virtual clock in a federation: what a plan says is what happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer
from fl_lightning.errors import NotEnoughClientsError
from fl_lightning.schedules import Dispatch, Occasion, Plan, Schedule, assign_lanes, assign_waves

BATCHES = {"a": 1, "b": 2, "c": 4}


def loaders() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    data = {name: TensorDataset(torch.randn(4 * batches, 32, generator=draw)) for name, batches in BATCHES.items()}
    return {name: DataLoader(own, batch_size=4, collate_fn=first) for name, own in data.items()}


def first(samples: list[Any]) -> torch.Tensor:
    return torch.stack([sample[0] for sample in samples])


def trained(fit_arguments: Mapping[str, Any] | None = None, **arguments: Any) -> tuple[FederatedTrainer, torch.Tensor]:
    torch.manual_seed(0)
    model = BoringModel()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_rounds": 2, "accelerator": "cpu", "enable_model_summary": False, **quiet}
    trainer = FederatedTrainer(**{**defaults, **arguments})
    trainer.fit(model, loaders(), **(fit_arguments or {}))
    return trainer, model.layer.weight.detach().clone()


class Fleet:
    """A second a step for everyone, and two more for "b" to come and go; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def seconds(self, client_id: Any, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        self.asked.append((client_id, num_steps, num_bytes_down, num_bytes_up, at))
        return num_steps + (2.0 if client_id == "b" else 0.0)


class LateAreDropped(Schedule):
    """Everyone is sent work, and who is not back after three seconds is dropped; counts its rounds."""

    def __init__(self) -> None:
        self.rounds, self.learned = 0, 0.0

    def plan(self, occasion: Occasion) -> Plan:
        self.rounds += 1
        cohort = occasion.choose(occasion.size)
        sent = [occasion.dispatch(c, occasion.next_dispatch_id + i, occasion.clock) for i, c in enumerate(cohort)]
        late = {d.client_id: f"came after {d.done_at - d.sent_at:g} s" for d in sent if d.done_at - d.sent_at > 3}
        on_time = tuple(dispatch for dispatch in sent if dispatch.client_id not in late)
        return Plan(on_time, occasion.clock + 3, late, tuple(cohort), metrics={"rounds": self.rounds})

    def learn(self, plan: Plan, deliveries: Any) -> Mapping[str, float]:
        self.learned += sum(delivery.num_steps for delivery in deliveries)
        return {"learned": self.learned}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "learned": self.learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds, self.learned = state["rounds"], state["learned"]


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    fleet = Fleet()
    trainer, weights = trained(fleet=fleet, local_epochs=3)
    # "c" takes 4 batches in 3 epochs, "b" 2 batches in 3 epochs and 2 seconds on top
    assert [report.metrics["simulated_seconds"] for report in trainer.round_history] == [12.0, 24.0]
    assert [(c, steps, at) for c, steps, *_, at in fleet.asked[3:]] == [("a", 3, 12.0), ("b", 6, 12.0), ("c", 12, 12.0)]
    report = trainer.round_history[0]
    assert {asked[2:4] for asked in fleet.asked[3:]} == {(report.num_bytes_down // 3, round(report.num_bytes_up / 3))}
    plain, same = trained(local_epochs=3)
    assert torch.equal(weights, same), "time passes, and nothing else changes"
    assert "simulated_seconds" not in plain.round_history[0].metrics


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"limit_train_batches": 3}, [1, 2, 3]),
        ({"limit_train_batches": 0.5}, [0, 1, 2]),
        ({"accumulate_grad_batches": 3}, [1, 1, 2]),
        ({"local_steps": 5}, [5, 5, 5]),
        ({"client_overrides": {"b": {"epochs": 4}}}, [1, 8, 4]),
    ],
)
def test_time_is_told_by_the_steps_that_clients_take(arguments: dict[str, Any], steps: list[int]) -> None:
    fleet = Fleet()
    if arguments.get("limit_train_batches") == 0.5:
        arguments["on_bad_update"] = "skip"  # a half of one batch is none
        with pytest.warns(UserWarning, match="skipped"):
            trainer, _ = trained(fleet=fleet, max_rounds=1, **arguments)
    else:
        trainer, _ = trained(fleet=fleet, max_rounds=1, **arguments)
    assert [asked[1] for asked in fleet.asked] == steps
    assert trainer.round_history[0].num_steps == sum(steps)


def test_dropped_clients_are_in_the_report_and_not_in_the_sum() -> None:
    trainer, weights = trained(schedule=LateAreDropped(), fleet=Fleet())
    report = trainer.round_history[1]
    assert report.cohort == ["a"]
    assert report.dropped == {"b": "came after 4 s", "c": "came after 4 s"}
    assert (report.metrics["rounds"], report.metrics["learned"]) == (2, 2)
    whole, _ = trained()
    assert report.num_bytes_down == whole.round_history[1].num_bytes_down, "the late ones have downloaded the model"
    assert report.num_bytes_up < whole.round_history[1].num_bytes_up

    class OnlyA:
        def cohort(self, population: Any, size: int, seed: int, round: int) -> list[Any]:
            return ["a"]

    _, only_a = trained(sampler=OnlyA())
    assert torch.equal(weights, only_a)


def test_the_trainer_s_schedule_starts_anew_in_every_fit() -> None:
    schedule = LateAreDropped()
    first, _ = trained(schedule=schedule, fleet=Fleet())
    again, _ = trained(schedule=schedule, fleet=Fleet())
    assert [r.metrics for r in first.round_history] == [r.metrics for r in again.round_history]
    assert schedule.rounds == 0


def test_clock_and_schedule_go_on_after_a_resume(tmp_path: Any) -> None:
    def saving(**arguments: Any) -> dict[str, Any]:
        keep = ModelCheckpoint(save_top_k=-1, dirpath=tmp_path, filename="{epoch}", enable_version_counter=False)
        return {"fleet": Fleet(), "enable_checkpointing": True, "callbacks": keep, "max_rounds": 4, **arguments}

    whole, weights = trained(schedule=LateAreDropped(), **saving())
    resumed, same = trained({"ckpt_path": tmp_path / "epoch=1.ckpt"}, schedule=LateAreDropped(), **saving())
    assert torch.equal(weights, same)
    assert [r.metrics["rounds"] for r in resumed.round_history] == [1, 2, 3, 4]
    assert [r.metrics for r in resumed.round_history] == [r.metrics for r in whole.round_history]
    assert [r.dropped for r in resumed.round_history] == [r.dropped for r in whole.round_history]
    with pytest.raises(MisconfigurationException, match="schedule=LateAreDropped"):
        trained({"ckpt_path": tmp_path / "epoch=1.ckpt"}, **saving())


def test_everyone_late_is_an_error_with_reasons() -> None:
    class AllLate(LateAreDropped):
        def plan(self, occasion: Occasion) -> Plan:
            return Plan((), 9.0, dict.fromkeys(occasion.choose(occasion.size), "low battery"))

    with pytest.raises(NotEnoughClientsError, match=r"only 0 clients delivered\. Skipped: 'a': low battery"):
        trained(schedule=AllLate())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fleet": object()}, "Expected fleet to say how long clients take"),
        ({"schedule": "asynchronous"}, "Expected schedule to be a Schedule"),
    ],
)
def test_what_is_no_fleet_or_schedule_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        FederatedTrainer(**arguments)


def test_an_unfinished_schedule_says_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="must define plan"):
        Schedule().plan(None)  # type: ignore[arg-type]


def test_a_client_that_is_sent_twice_goes_on_where_it_was() -> None:
    """The second dispatch of a client sees the memory that the first one left, in every lane."""

    class Twice(Schedule):
        def plan(self, occasion: Occasion) -> Plan:
            cohort = ["a", "b", "a", "c", "a"]
            first, round = occasion.next_dispatch_id, occasion.round
            works = [occasion.work(client_id) for client_id in cohort]
            return Plan(tuple(Dispatch(cohort[i], first + i, round, works[i]) for i in range(len(cohort))))

    seen: list[tuple[Any, int]] = []

    class Counting(BoringModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            momentum = [state.get("momentum_buffer") for state in self.optimizers().state.values()]  # type: ignore[union-attr]
            seen.append((self.trainer.num_training_batches, sum(m is not None for m in momentum)))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    trainer = FederatedTrainer(
        schedule=Twice(), client_state="keep", max_rounds=1, accelerator="cpu", logger=False, local_loop="lightning",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Counting(), loaders())
    assert trainer.round_history[0].cohort == ["a", "b", "a", "c", "a"]
    assert [warm for batches, warm in seen if batches == 1] == [0, 2, 2]  # one batch is client "a"


def test_waves_hold_no_client_twice_and_equal_lanes_without_doubles() -> None:
    ids, sizes = [f"c{i % 7}" for i in range(20)], [float(i % 7 + 1) for i in range(20)]
    lanes = assign_waves(ids, sizes, 4)
    assert sorted(p for lane in lanes for wave in lane for p in wave) == list(range(20))
    for lane in lanes:
        own = [p for wave in lane for p in wave]
        for wave in lane:
            assert len({ids[p] for p in wave}) == len(wave)
        for client_id in {ids[p] for p in own}:
            assert [p for p in own if ids[p] == client_id] == [i for i, c in enumerate(ids) if c == client_id]
    flat = [[p for wave in lane for p in wave] for lane in assign_waves(ids[:7], sizes[:7], 4)]
    assert flat == assign_lanes(ids[:7], sizes[:7], 4)
