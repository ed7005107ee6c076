"""A resumed run is the uninterrupted one, to the bit, whatever has a state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from spine_zoo import (
    QUIET,
    Classifier,
    ServedSites,
    assert_same_bits,
    sites,
    weights,
)

from fl_lightning.algorithms import FedAvg
from fl_lightning.reporting.event_files import read_events
from fl_lightning.trainer import FederatedTrainer


def adam() -> FedAvg:
    return FedAvg(
        server_optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        server_lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    )


def long_run(folder: Path, rounds: int, ckpt: Any = None, **more: Any) -> tuple[Any, FederatedTrainer]:
    """Train with everything that has a state: Adam and a schedule on the server, momentum kept on the clients."""
    torch.manual_seed(1)
    module = Momentum(hidden=4)
    pl.seed_everything(7, verbose=False)
    own = {
        "max_rounds": rounds, "clients_per_round": 3, "local_epochs": 2, "algorithm": adam(), "client_state": "keep",
        "enable_checkpointing": True, "logger": TensorBoardLogger(folder, name="run"),
        "callbacks": [ModelCheckpoint(save_last=True, save_top_k=-1)],
    }  # fmt: skip
    trainer = FederatedTrainer(**{**QUIET, **own, **more})
    trainer.fit(module, ServedSites(sites(5)), ckpt_path=ckpt)
    return module, trainer


class Momentum(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def comparable(trainer: FederatedTrainer) -> list[Any]:
    reports = copy.deepcopy(trainer.round_history)
    for report in reports:
        report.seconds = 0.0
    return reports


# ModelCheckpoint says so in plain Lightning, too, when a run goes on in another folder
OTHER_FOLDER = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@OTHER_FOLDER
@pytest.mark.parametrize("way", ["last", "path"])
def test_a_resumed_run_is_the_uninterrupted_one(way: str, tmp_path: Path) -> None:
    whole, uninterrupted = long_run(tmp_path / "whole", 5)
    _, first = long_run(tmp_path / "parts", 3)
    path = str(first.checkpoint_callback.last_model_path)
    resumed, second = long_run(tmp_path / "parts", 5, ckpt="last" if way == "last" else path)
    assert_same_bits(weights(resumed), weights(whole))
    assert comparable(second) == comparable(uninterrupted)
    assert [report.round for report in second.round_history] == [0, 1, 2, 3, 4]
    folders = sorted(p.name for p in (tmp_path / "parts" / "run").iterdir())
    assert folders == (["version_0"] if way == "last" else ["version_0", "version_1"])


@OTHER_FOLDER
def test_a_resume_goes_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    whole, uninterrupted = long_run(tmp_path / "whole", 4)
    long_run(tmp_path / "parts", 4)
    (older,) = (tmp_path / "parts").rglob("epoch=1-*.ckpt")
    resumed, second = long_run(tmp_path / "parts", 4, ckpt=older)
    assert_same_bits(weights(resumed), weights(whole))
    assert comparable(second) == comparable(uninterrupted)


def test_a_fit_interrupted_in_a_round_resumes_as_if_nothing_had_been(tmp_path: Path) -> None:
    class Dies(Callback):
        """Kills the second client of the third round, once."""

        num_starts = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            Dies.num_starts += 1
            if Dies.num_starts == 3 + 3 + 2:
                raise KeyboardInterrupt

    whole, uninterrupted = long_run(tmp_path / "whole", 4)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        long_run(tmp_path / "parts", 4, client_callbacks=[Dies()])
    resumed, second = long_run(tmp_path / "parts", 4, ckpt="last")
    assert_same_bits(weights(resumed), weights(whole))
    assert comparable(second) == comparable(uninterrupted)


def test_no_point_of_the_server_stands_twice_after_a_resume(tmp_path: Path) -> None:
    """Lightning logs hyperparameters and ``hp_metric`` again when a fit goes on."""

    def points(folder: Path) -> list[tuple[str, int]]:
        (run,) = (folder / "run").iterdir()
        return sorted(
            (value.tag, event.step)
            for path in run.glob("*tfevents*")
            for _, _, event in read_events(path)
            for value in event.summary.value
        )

    long_run(tmp_path / "whole", 4)
    long_run(tmp_path / "parts", 2)
    long_run(tmp_path / "parts", 4, ckpt="last")
    assert ("hp_metric", 0) in points(tmp_path / "whole")
    assert points(tmp_path / "parts") == points(tmp_path / "whole")


def test_what_the_server_draws_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """A module may draw in its validation; what it drew before the stop must not matter."""

    class Draws(Momentum):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("drawn", torch.rand(()))

    def drawn(rounds: int, ckpt: Any = None) -> list[float]:
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        own = {"max_rounds": rounds, "enable_checkpointing": True, "callbacks": [keep], "default_root_dir": tmp_path}
        pl.seed_everything(7, verbose=False)
        trainer = FederatedTrainer(**{**QUIET, **own})
        trainer.fit(Draws(), ServedSites(sites(2)), ckpt_path=ckpt)
        return [report.metrics["drawn"] for report in trainer.round_history]

    whole = drawn(4)
    assert len(set(whole)) == 4
    assert drawn(4, tmp_path / "epoch=1.ckpt") == whole


def test_two_runs_are_the_same_bits(tmp_path: Path) -> None:
    (one, first), (two, second) = long_run(tmp_path / "a", 3), long_run(tmp_path / "b", 3)
    assert_same_bits(weights(one), weights(two))
    assert comparable(first) == comparable(second)


def test_best_and_last_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="finds no checkpoint of a run of this name"):
        module, trainer = long_run(
            tmp_path / "new", 1, ckpt="last"
        )  # nothing is there: as in plain Lightning it starts
    assert len(trainer.round_history) == 1
    fresh = FederatedTrainer(max_rounds=1, **QUIET)
    with pytest.raises(MisconfigurationException, match="best checkpoint of the last fit of this trainer"):
        fresh.fit(module, sites(2), ckpt_path="best")
    assert type(module) is Momentum


@OTHER_FOLDER
@pytest.mark.parametrize("logs", [True, False])
def test_a_checkpoint_that_is_saved_after_the_fit_goes_on(logs: bool, tmp_path: Path) -> None:
    """Kept optimizers, history and the server's optimizer are in it, even when nothing else stayed on disk."""
    quiet = {} if logs else {"logger": False, "enable_checkpointing": False, "callbacks": []}
    whole, uninterrupted = long_run(tmp_path / "whole", 4)
    module, trainer = long_run(tmp_path / "parts", 2, **quiet)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert type(module) is Momentum
    again = Momentum.load_from_checkpoint(tmp_path / "mine.ckpt")
    assert_same_bits(weights(again), weights(module))
    resumed, second = long_run(tmp_path / "parts", 4, ckpt=tmp_path / "mine.ckpt", **quiet)
    assert_same_bits(weights(resumed), weights(whole))
    assert comparable(second) == comparable(uninterrupted)


def test_a_second_fit_goes_on_as_lightning_counts(tmp_path: Path) -> None:
    module, trainer = long_run(tmp_path, 2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, ServedSites(sites(5)))
    assert [report.round for report in trainer.round_history] == [0, 1, 2, 3]
    assert len((Path(trainer.log_dir) / "rounds.jsonl").read_text().splitlines()) == 4


def test_a_second_fit_of_another_module_starts_its_history_anew(tmp_path: Path) -> None:
    _, trainer = long_run(tmp_path, 2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Momentum(hidden=3), ServedSites(sites(5)))
    assert len(trainer.round_history) == 1


@OTHER_FOLDER
def test_a_resume_with_another_server_optimizer(tmp_path: Path) -> None:
    _, first = long_run(tmp_path, 1)
    path = first.checkpoint_callback.last_model_path
    with pytest.raises(MisconfigurationException, match="of the server optimizer Adam, and this trainer has SGD"):
        long_run(tmp_path, 2, ckpt=path, algorithm=FedAvg())


def test_a_checkpoint_that_is_cut_off(tmp_path: Path) -> None:
    _, first = long_run(tmp_path, 2)
    path = Path(first.checkpoint_callback.last_model_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MisconfigurationException, match=r"is no whole checkpoint: .* Go on from .*epoch=1"):
        long_run(tmp_path, 3, ckpt=path)
    _, second = long_run(tmp_path, 3, ckpt="last")  # it finds the one before
    assert len(second.round_history) == 3


@OTHER_FOLDER
def test_best_in_a_new_process_is_the_best_of_the_newest_run(tmp_path: Path) -> None:
    def trainer() -> FederatedTrainer:
        best = ModelCheckpoint(monitor="val_loss", mode="max", save_top_k=-1)
        logger = TensorBoardLogger(tmp_path, name="run")
        own = {"enable_checkpointing": True, "logger": logger, "callbacks": [best], "max_rounds": 3}
        return FederatedTrainer(**{**QUIET, **own})

    data = ServedSites(sites(3))
    first = trainer()
    first.fit(Momentum(), data)
    best = Momentum.load_from_checkpoint(first.checkpoint_callback.best_model_path)
    (value,) = trainer().test(Momentum(), dataloaders=data, ckpt_path="best", verbose=False)
    (expected,) = trainer().test(best, dataloaders=data, verbose=False)
    (last,) = trainer().test(Momentum(), dataloaders=data, ckpt_path="last", verbose=False)
    assert value == expected
    assert value != last  # mode="max" makes the first round the best


def test_best_of_a_run_without_one(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    with pytest.raises(MisconfigurationException, match="'best' finds no checkpoint of a run of this name"):
        FederatedTrainer(**{**QUIET, "logger": logger}).test(Momentum(), ServedSites(sites(2)), ckpt_path="best")
