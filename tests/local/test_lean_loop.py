"""LeanLoop gives the bits of LightningLoop: weights, buffers, metrics, counts and every point of a client's curve."""

from __future__ import annotations

import copy
import multiprocessing
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from grouped import updates_of
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from zoo import FEATURES, WHOLE, ZOO, Plain, both, broadcast_of, job, loader, mlp, settings_for

from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.callbacks import GradientClip, GradientNoise, ProximalTerm, StepCounter
from fl_lightning.errors import EmptyClientError
from fl_lightning.local.job import ClientData, Outcome
from fl_lightning.local.lean_data import TensorBatches, batches_of
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.lightning_loop import LightningLoop
from fl_lightning.metrics import TorchmetricPart
from fl_lightning.types import Phase


def assert_same(oracle: list[Outcome], lean: list[Outcome]) -> None:
    for (a, b), left, right in zip(updates_of(oracle, lean), oracle, lean, strict=True):
        for name in a.delta:
            assert torch.equal(a.delta[name], b.delta[name]), name
        for name in a.buffers:
            assert torch.equal(a.buffers[name], b.buffers[name]), name
        assert_same_metrics(a.metrics, b.metrics)
        assert sorted(left.records, key=repr) == sorted(right.records, key=repr)


def assert_same_metrics(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for name, part in a.items():
        if isinstance(part, TorchmetricPart):
            assert part.attribute == b[name].attribute
            assert repr(part.state) == repr(b[name].state)
        else:
            assert part == b[name], name


@pytest.mark.parametrize("kind", ZOO)
def test_zoo(kind: str) -> None:
    torch.manual_seed(0)
    jobs = lambda b: [job(b, loader, "a"), job(b, lambda: loader(33, 40), "b", epochs=1)]  # noqa: E731
    oracle, lean, loop = both(ZOO[kind](), jobs)
    assert_same(oracle, lean)
    assert loop.reason is None
    if kind != "quiet":
        assert all(outcome.records for outcome in lean)


def two(**work: Any) -> Any:
    return lambda b: [job(b, loader, "a", **work), job(b, lambda: loader(33, 40), "b", **work)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "log_every_n_steps": 2},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5},
        {"precision": "bf16-mixed"},
        {"log_every_n_steps": 3},
        {"log_every_n_steps": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["by step", "by epoch", "torchmetrics"])
def test_trainer_arguments(kind: str, arguments: dict[str, Any]) -> None:
    oracle, lean, loop = both(ZOO[kind](), two(step_offset=7), trainer_arguments=arguments)
    assert_same(oracle, lean)
    assert loop.reason is None


@pytest.mark.parametrize(
    "work",
    [
        {"epochs": None, "steps": 1},
        {"epochs": None, "steps": 7},
        {"lr_factor": 0.25},
        {"lr": 0.3, "lr_factor": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["momentum", "by step", "two groups"])
def test_work(kind: str, work: dict[str, Any]) -> None:
    assert_same(*both(ZOO[kind](), two(**work))[:2])


@pytest.mark.parametrize("num_examples", [None, 17])
def test_num_examples(num_examples: int | None) -> None:
    oracle, lean, _ = both(ZOO["hooks"](), lambda b: [job(b, loader, num_examples=num_examples)])
    assert_same(oracle, lean)
    assert lean[0].update is not None
    assert lean[0].update.num_examples == (num_examples or 23)


class Pairs(Dataset[Any]):
    """A data set that is no TensorDataset and draws from the global generators."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Any:
        x, y = WHOLE[index]
        return x + 0.1 * torch.randn(FEATURES), int(y)


@pytest.mark.parametrize(
    "open_loader",
    [
        lambda: loader(drop_last=True),
        lambda: loader(shuffle=False),
        lambda: loader(shuffle=None, sampler=WeightedRandomSampler([1.0, 2.0] * 11, 20)),
        lambda: loader(shuffle=None, sampler=RandomSampler(range(23), replacement=True, num_samples=40)),
        lambda: loader(shuffle=None, sampler=SubsetRandomSampler([3, 1, 8, 20, 4, 4, 9])),
        lambda: loader(batch_size=100),
        lambda: DataLoader(WHOLE, batch_size=64, shuffle=True),
        lambda: DataLoader(Pairs(), batch_size=4, shuffle=True),
        lambda: DataLoader(WHOLE, batch_sampler=[[0, 1], [5, 6, 7], [2, 3]]),
        lambda: loader(generator=torch.Generator().manual_seed(5)),
        lambda: loader(collate_fn=lambda pairs: [torch.stack([p[i] for p in pairs]) for i in range(2)]),
    ],
)
def test_loaders(open_loader: Any) -> None:
    oracle, lean, loop = both(ZOO["dropout"](), lambda b: [job(b, open_loader), job(b, loader, "b")])
    assert_same(oracle, lean)
    assert loop.reason is None


def test_workers() -> None:
    open_loader = lambda: loader(num_workers=1)  # noqa: E731
    assert_same(*both(ZOO["dropout"](), lambda b: [job(b, open_loader, epochs=1)])[:2])


def test_tensor_data_sets_are_indexed_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, index: Any) -> Any:
        raise AssertionError("an example was fetched by itself")

    monkeypatch.setattr(TensorDataset, "__getitem__", refuse)
    module = ZOO["sgd"]()
    settings = settings_for(module, FedAvg())
    (outcome,) = LeanLoop(module, FedAvg(), settings).run([job(broadcast_of(module, settings), loader)])
    assert outcome.error is None  # LightningLoop would have to fetch one by one, so it was not asked either
    train = loader()
    assert isinstance(batches_of(train, 1.0), TensorBatches)
    assert [len(b[1]) for b in batches_of(train, 1.0).begin(0)] == [5, 5, 5, 5, 3]


def test_kept_state() -> None:
    for kind in ("momentum", "adam", "by step"):
        module = ZOO[kind]()
        settings = settings_for(module, FedAvg(), client_state="keep")
        broadcast = broadcast_of(module, settings)
        outcomes = {}
        for loop_type in (LightningLoop, LeanLoop):
            loop = loop_type(copy.deepcopy(module), FedAvg(), settings)
            (first,) = loop.run([job(broadcast, loader)])
            assert first.update is not None
            (second,) = loop.run([job(broadcast, loader, memory=first.update.memory, round=1, lr_factor=0.5)])
            outcomes[loop_type] = [first, second]
        assert_same(outcomes[LightningLoop], outcomes[LeanLoop])
        assert repr(outcomes[LeanLoop][1].update.memory) == repr(outcomes[LightningLoop][1].update.memory)


@pytest.mark.parametrize("callbacks", [[ProximalTerm(0.5)], [GradientClip(0.05), GradientNoise(0.01)], [StepCounter()]])
@pytest.mark.parametrize("kind", ["by step", "adam"])
def test_client_callbacks(kind: str, callbacks: list[Any]) -> None:
    oracle, lean, loop = both(ZOO[kind](), two(), callbacks=callbacks, trainer_arguments={"gradient_clip_val": 0.2})
    assert_same(oracle, lean)
    assert loop.reason is None
    assert oracle[0].update is not None
    assert lean[0].update is not None
    assert oracle[0].update.extra == lean[0].update.extra


class Watcher(pl.Callback):
    """Observes steps and gradients; what it saw ends up in the module's log."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.size = len(batch[0])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norm = sum(float(p.grad.norm()) for p in pl_module.parameters())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        pl_module.log("watched", self.norm + self.size + rate + trainer.global_step + float(outputs["loss"]))


def test_observing_callback() -> None:
    oracle, lean, loop = both(ZOO["by step"](), two(), callbacks=[Watcher()])
    assert_same(oracle, lean)
    assert loop.reason is None
    assert any("watched" in record[1] for record in lean[0].records)


class TwoPhases(FedAvg):
    def phases(self, task: Any) -> list[Phase]:
        head = Phase("head", trainable=("net.3.*",), epochs=1, report=False, keep="head")
        return [head, Phase("all", start="previous")]


def test_phases_and_local_parameters() -> None:
    oracle, lean, _ = both(ZOO["dropout"](), two(), TwoPhases())
    assert_same(oracle, lean)
    assert oracle[0].update is not None
    assert lean[0].update is not None
    for name, kept in oracle[0].update.extra["head"].items():
        assert torch.equal(kept, lean[0].update.extra["head"][name])
    oracle, lean, _ = both(ZOO["convolution"](), two(), batch_norm="local")
    assert_same(oracle, lean)
    assert oracle[0].update is not None
    assert lean[0].update is not None
    assert oracle[0].update.memory["local"].keys() == lean[0].update.memory["local"].keys() != set()
    for name, kept in oracle[0].update.memory["local"].items():
        assert torch.equal(kept, lean[0].update.memory["local"][name])


# ---- what the lean loop leaves to LightningLoop -------------------------------------------------------------------


class AsksForMore(Plain):
    """Looks at its Trainer in the third step, and swallows what comes of it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        try:
            return loss * (1.5 if batch_idx == 2 and self.trainer.strategy.launcher is None else 1.0)
        except Exception:
            return loss


class UsesOptimizers(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


class Skips(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(AsksForMore, "self.trainer.strategy.launcher"), (UsesOptimizers, "self.optimizers"), (Skips, "no loss")],
)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_takes_over_for_good(kind: type[Plain], reason: str) -> None:
    oracle, lean, loop = both(kind(mlp(torch.nn.Dropout(0.5))), two())
    assert_same(oracle, lean)
    assert loop.reason is not None
    assert reason in loop.reason


def test_one_client_alone_needs_a_trainer() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([WHOLE[i] for i in range(12)])

    streamed = lambda: DataLoader(Stream(), batch_size=4)  # noqa: E731
    oracle, lean, loop = both(ZOO["sgd"](), lambda b: [job(b, streamed), job(b, loader, "b")])
    assert_same(oracle, lean)
    assert loop.reason is None


def test_validating_client() -> None:
    def validating(broadcast: Any) -> list[Any]:
        made = job(broadcast, loader)
        made.data = lambda: ClientData(loader(), loader(7, 60, shuffle=False))
        return [made]

    class Validates(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch)[0])

    oracle, lean, loop = both(Validates(mlp()), validating)
    assert_same(oracle, lean)
    assert any("val" in record[1] for record in lean[0].records)
    assert loop.reason is None


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_client_that_fails_fails_as_in_lightning() -> None:
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) == 3:
                raise ValueError("three")
            return super().training_step(batch, batch_idx)

    module = Broken(mlp())
    settings = settings_for(module, FedAvg())
    loop = LeanLoop(module, FedAvg(), settings)
    broadcast = broadcast_of(module, settings)
    bad, empty, good = loop.run(
        [job(broadcast, loader), job(broadcast, lambda: loader(3, drop_last=True)), job(broadcast, lambda: loader(20))]
    )
    assert isinstance(bad.error, ValueError)
    assert isinstance(empty.error, EmptyClientError)
    assert good.error is None
    assert loop.reason is None, "one client's fault is no reason to leave the lean loop"


def test_nothing_leaks_into_the_next_client() -> None:
    module = ZOO["hooks"]()
    settings = settings_for(module, FedAvg())
    broadcast = broadcast_of(module, settings)
    after_another = list(LeanLoop(copy.deepcopy(module), FedAvg(), settings).run(two()(broadcast)))[1]
    alone = list(LeanLoop(copy.deepcopy(module), FedAvg(), settings).run(two()(broadcast)[1:]))
    assert_same([after_another], alone)


def test_global_generators_are_put_back() -> None:
    module = ZOO["dropout"]()
    settings = settings_for(module, FedAvg())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    list(LeanLoop(module, FedAvg(), settings).run(two()(broadcast_of(module, settings))))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


class Examples(Dataset[Any]):
    """Not a ``TensorDataset``, so that workers have something to do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return WHOLE[index]


def test_workers_end_with_their_client() -> None:
    left: list[int] = []

    class Watches(Plain):
        def on_train_end(self) -> None:
            left.append(len(multiprocessing.active_children()))

    module = Watches(mlp())
    settings = settings_for(module, FedAvg(), group_size=1)
    open_loader = lambda: DataLoader(Examples(), 4, num_workers=2)  # noqa: E731
    broadcast = broadcast_of(module, settings)
    loop = LeanLoop(module, FedAvg(), settings)
    outcomes = list(loop.run([job(broadcast, open_loader, k, epochs=2) for k in range(3)]))
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert loop.reason is None
    assert left == [0, 0, 0]
