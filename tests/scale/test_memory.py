"""What a round holds at its peak does not depend on how many clients take part."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scale_federation import FEATURES, Clients, Linear, fit
from torch import Tensor

from fl_lightning import FedAvg
from fl_lightning.aggregation import PartialSum
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory

WIDTH = 1237  # no other tensor of the process has so many rows


class Watching(Linear):
    """Counts the tensors of a weight's shape that are alive in each step, its own gradient to come not among them."""

    most = 0

    def __init__(self) -> None:
        super().__init__(outputs=WIDTH)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        Watching.most = max(Watching.most, live_weights())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WatchingAverage(FedAvg):
    """Counts them when a client has made its contribution of its update."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        made = super().contribute(update, task, memory)
        self.most = max(self.most, live_weights())
        return made


class AtTheEndOfClients(pl.Callback):
    def __init__(self) -> None:
        self.most_partial_sums = self.most_weights = 0

    def on_client_end(self, trainer: Any, client_id: Any, done: int, total: int, num_examples: int) -> None:
        partial_sums = [o for o in gc.get_objects() if type(o) is PartialSum and o.num_clients]
        self.most_partial_sums = max(self.most_partial_sums, len(partial_sums))
        self.most_weights = max(self.most_weights, live_weights())


def live_weights() -> int:
    """Return how many storages of a weight's size are alive."""
    shape = (WIDTH, FEATURES)
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.shape == shape and not o.is_meta]
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


@pytest.fixture
def young_objects() -> Iterator[None]:
    """Let ``gc.get_objects`` walk over what the test makes, and not over all that other tests imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("young_objects")
@pytest.mark.parametrize("loop", ["lean", "lightning"])
@pytest.mark.parametrize("cohort", [8, 40])
def test_at_most_four_partial_sums_and_one_client(loop: str, cohort: int) -> None:
    Watching.most, watcher, algorithm = 0, AtTheEndOfClients(), WatchingAverage()
    arguments: dict[str, Any] = {"local_loop": loop, "group_size": 1, "max_rounds": 2, "callbacks": [watcher]}
    fit(Clients(range(cohort)), Watching(), algorithm=algorithm, **arguments)
    assert 1 < watcher.most_partial_sums <= 4
    # the global model; the client's own and the gradient of its last step, as in plain training; four partial sums
    assert Watching.most <= 1 + 2 + 4
    # the client's update has taken the place of its gradient; beside it what goes to the server
    assert algorithm.most <= 1 + 2 + 4 + 1
    assert watcher.most_weights <= 1 + 1 + 4 + 1


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_rounds_leave_nothing_but_their_report(state: str, tmp_path: Path) -> None:
    class Counts(pl.Callback):
        def __init__(self) -> None:
            self.tensors: list[int] = []
            self.objects: list[int] = []

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gc.collect()
            objects = gc.get_objects()
            self.objects.append(len(objects))
            self.tensors.append(sum(issubclass(type(o), Tensor) for o in objects))

    counts = Counts()
    fit(
        Clients(range(4)),
        max_rounds=40,
        client_state=state,
        callbacks=[counts],
        logger=True,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    assert counts.tensors[-1] == counts.tensors[10]
    per_round = (counts.objects[-1] - counts.objects[10]) / 29
    assert per_round < 20, f"{per_round} objects stay behind in each round"


def test_files_of_memory_and_checkpoints_do_not_grow_with_rounds(tmp_path: Path) -> None:
    def run(rounds: int) -> tuple[int, int]:
        trainer = fit(
            Clients(range(4)),
            max_rounds=rounds,
            client_state="keep",
            logger=True,
            enable_checkpointing=True,
            default_root_dir=tmp_path / str(rounds),
        )
        assert trainer.log_dir is not None
        folder = Path(trainer.log_dir)
        (checkpoint,) = folder.rglob("*.ckpt")
        return len(list(folder.rglob("*.memory"))), checkpoint.stat().st_size

    (files, size), (many_files, large) = run(3), run(30)
    # of the clients' memory the newest version stays, and the one that an older checkpoint may still ask for
    assert files <= 8
    assert many_files <= 8
    assert large <= size + 256
