"""Clients that train together get what they get alone: weights to rounding, counts, metrics and curves."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from grouped import assert_alike, ragged, together
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import (
    WHOLE,
    ZOO,
    Plain,
    Quiet,
    WithMetrics,
    adam,
    adamw,
    broadcast_of,
    by_epoch,
    by_step,
    data,
    job,
    linear,
    loader,
    mlp,
    nesterov,
    settings_for,
    two_groups,
)

from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.algorithms.fednova import FedNova
from fl_lightning.algorithms.fedprox import FedProx
from fl_lightning.algorithms.scaffold import Scaffold
from fl_lightning.callbacks import GradientClip, GradientNoise
from fl_lightning.local import lean_grouping, lean_together
from fl_lightning.local.choice import choose_loop
from fl_lightning.local.job import Job
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.lightning_loop import LightningLoop


def undamped(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


class Sized(Plain):
    """Names the size of the batch, which many modules do whether Lightning looks at it or not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, logits = self.loss(batch)
        self.log("loss", loss, batch_size=len(batch[1]))
        self.log("accuracy", (logits.argmax(-1) == batch[1]).float().mean(), on_epoch=True, batch_size=len(batch[1]))
        return loss


class OnlySteps(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, _ = self.loss(batch)
        self.log("loss", loss, batch_size=len(batch[1]))
        return loss


GROUPED: dict[str, Callable[[], Any]] = {
    "logistic": lambda: Plain(linear()),
    "sgd": lambda: Plain(mlp()),
    "momentum": lambda: Plain(mlp(), undamped),
    "nesterov": lambda: Plain(mlp(), nesterov),
    "adam": lambda: Plain(mlp(), adam),
    "adamw": lambda: Plain(mlp(), adamw),
    "two groups": lambda: Plain(mlp(), two_groups),
    "by step": lambda: Plain(mlp(), by_step),
    "by epoch": lambda: Plain(mlp(), by_epoch),
    "quiet": lambda: Quiet(mlp(), adamw),
    "group norm": ZOO["group norm"],
    "sized": lambda: Sized(mlp()),
    "sized steps": lambda: OnlySteps(mlp()),
}


class Simple(Plain):
    """Does not look at the index of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, logits = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        accuracy = (logits.argmax(-1) == batch[1]).float().mean()
        self.log_dict({"accuracy": accuracy, "one": 1}, on_step=False, on_epoch=True)
        self.log("steps_only", loss * 2)
        return loss


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("work", [{}, {"epochs": None, "steps": 7}, {"epochs": 1, "step_offset": 11}], ids=str)
def test_a_group_is_what_its_clients_are_alone(kind: str, work: dict[str, Any]) -> None:
    torch.manual_seed(0)
    alone, group, loop = together(GROUPED[kind](), ragged(**work))
    assert loop.together.reason is None, loop.together.reason
    assert_alike(alone, group, 1e-5 if "adam" not in kind and kind not in ("quiet", "group norm") else 1e-4)


@pytest.mark.parametrize("size", [2, 4, 100])
def test_sizes_of_groups(size: int) -> None:
    alone, group, loop = together(Simple(mlp()), ragged(), size=size, trainer_arguments={"log_every_n_steps": 3})
    assert loop.together.reason is None
    assert_alike(alone, group)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"limit_train_batches": 3},
        {"log_every_n_steps": 1},
    ],
    ids=str,
)
def test_trainer_arguments(arguments: dict[str, Any]) -> None:
    alone, group, loop = together(Simple(mlp(), undamped), ragged(), trainer_arguments=arguments)
    assert loop.together.reason is None
    assert_alike(alone, group)


@pytest.mark.parametrize("kind", ["adamw", "by step", "two groups"])
def test_learning_rates_of_clients(kind: str) -> None:
    def jobs(b: Any) -> list[Job]:
        rates: list[dict[str, Any]] = [{}, {"lr_factor": 0.5}, {"lr": 0.3}, {"lr": 0.02, "lr_factor": 2.0}]
        return [job(b, lambda k=k: loader(23 - k, 30 * k), f"c{k}", **work) for k, work in enumerate(rates)]

    alone, group, loop = together(GROUPED[kind](), jobs)
    assert loop.together.reason is None
    assert_alike(alone, group, 1e-4 if kind == "adamw" else 1e-5)


def test_data_sets_of_their_own_and_other_batch_sizes() -> None:
    def jobs(b: Any) -> list[Job]:
        own = [DataLoader(data(11 + k, k), batch_size=4 + k % 2, shuffle=k != 2, drop_last=k == 3) for k in range(6)]
        return [job(b, lambda k=k: own[k], k) for k in range(6)]

    alone, group, loop = together(Simple(mlp()), jobs)
    assert loop.together.reason is None
    assert_alike(alone, group)


def test_groups_really_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step = Simple.training_step
    monkeypatch.setattr(Simple, "training_step", lambda self, b, i: calls.append(1) or step(self, b, i))
    module = Simple(mlp())
    settings = settings_for(module, FedAvg(), group_size=9)
    outcomes = list(LeanLoop(module, FedAvg(), settings).run(ragged(epochs=1)(broadcast_of(module, settings))))
    # five full batches, last batches of 3, 2 and 1 examples, and two looks: at what a step keeps, and for parameters
    # without a gradient
    assert len(calls) == 5 + 3 + 2
    assert sum(outcome.update.num_steps for outcome in outcomes if outcome.update) == 31


@pytest.mark.parametrize("algorithm", [FedProx(0.5), FedNova(), Scaffold(option="II")], ids=lambda a: type(a).__name__)
def test_algorithms(algorithm: Any) -> None:
    alone, group, loop = together(Simple(mlp(), by_step), ragged(), algorithm)
    assert loop.together.reason is None, loop.together.reason
    assert_alike(alone, group)
    for left, right in zip(alone, group, strict=True):
        assert left.update is not None
        assert right.update is not None
        assert left.update.extra.keys() == right.update.extra.keys()


def test_control_variates_are_each_clients_own() -> None:
    algorithm = Scaffold(option="II")
    module = Simple(mlp())
    settings = settings_for(module, algorithm, group_size=9)
    broadcast = broadcast_of(module, settings)
    broadcast.update(algorithm.broadcast(algorithm.init_state(broadcast["model"])))
    kinds = {LightningLoop: [], LeanLoop: []}
    memories: list[Any] = [None] * 9
    for outcome in LightningLoop(copy.deepcopy(module), algorithm, settings).run(ragged()(broadcast)):
        row = int(str(outcome.job.task.client_id)[1:])
        assert outcome.update is not None
        memories[row] = algorithm.contribute(outcome.update, outcome.job.task, {})[1]
    for kind in kinds:
        jobs = ragged()(broadcast)
        for row, made in enumerate(jobs):
            made.memory = lambda row=row: memories[row]
        loop = kind(copy.deepcopy(module), algorithm, settings)
        kinds[kind] = list(loop.run(jobs))
    assert all(memory for memory in memories)
    assert_alike(kinds[LightningLoop], kinds[LeanLoop])


def test_clipping_callback_and_noise_in_distribution() -> None:
    alone, group, loop = together(Simple(mlp()), ragged(), callbacks=[GradientClip(0.05)])
    assert loop.together.reason is None
    assert_alike(alone, group)
    _, noisy, loop = together(Simple(linear()), ragged(), callbacks=[GradientNoise(0.5)])
    assert loop.together.reason is None
    deltas = [outcome.update.delta["net.weight"] for outcome in noisy if outcome.update]
    assert not any(torch.equal(a, b) for k, a in enumerate(deltas) for b in deltas[:k]), "clients share their noise"


def test_dropout_masks_differ_between_clients_and_have_the_right_law() -> None:
    class Masks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("kept", (self.net[0](torch.ones(1000)) > 0).float().mean(), on_step=False, on_epoch=True)
            return self.net[1](self.net[0](batch[0])).square().mean()

    same = lambda b: [job(b, lambda: loader(20, 0, shuffle=False), k, epochs=1) for k in range(8)]  # noqa: E731
    _, group, loop = together(Masks(nn.Sequential(nn.Dropout(0.3), nn.Linear(12, 4))), same)
    assert loop.together.reason is None, loop.together.reason
    updates = [outcome.update for outcome in group if outcome.update]
    kept = [update.metrics["kept"].total / update.metrics["kept"].weight for update in updates]
    assert len(set(kept)) == 8
    assert sum(kept) / 8 == pytest.approx(0.7, abs=0.02)
    assert not torch.equal(updates[0].delta["net.1.weight"], updates[1].delta["net.1.weight"])


# ---- what trains one by one ----------------------------------------------------------------------------------------


class Counts(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return self.loss(batch)[0] * self.calls


class Items(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)[0]
        return loss * 2 if loss.item() > 1.3 else loss


class Unused(Plain):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, adamw)
        self.spare = nn.Linear(2, 2)


class Buffered(Plain):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        return self.loss(batch)[0] * self.count


class Steps(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)[0] * (1 + self.global_step)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ZOO["batch norm"], r"LeanLoop cannot group BatchNorm1d 'net.1': its running statistics update in place"),
        (lambda: WithMetrics(mlp()), "logs 'accuracy' as a MulticlassAccuracy|changes '_update_c"),
        (ZOO["hooks"], "overrides on_train_batch_end, on_train_batch_start"),
        (lambda: Counts(mlp()), "changes 'calls'"),
        (lambda: Items(mlp()), r"\.item\(\)"),
        (lambda: Unused(mlp()), "'spare.weight' gets no gradient"),
        (lambda: Buffered(mlp()), "in-place operation|writes to its buffers"),
        (lambda: Steps(mlp()), "differs from client to client"),
        (ZOO["momentum"], "dampening"),
        (ZOO["rmsprop"], "its optimizer is RMSprop"),
        (ZOO["one cycle"], "differs from client to client"),
    ],
)
def test_what_cannot_be_grouped_runs_alone_with_the_same_bits(make: Any, reason: str) -> None:
    torch.manual_seed(0)
    jobs = lambda b: [job(b, lambda k=k: loader(12 + 5 * k, 50 * k), k) for k in range(3)]  # noqa: E731
    alone, group, loop = together(make(), jobs)
    why = loop.together.reason or loop.together.trouble
    assert why is not None
    assert re.search(reason, why), why
    for left, right in zip(alone, group, strict=True):
        if left.error is not None:
            raise left.error
        assert left.update is not None
        assert right.update is not None
        assert all(torch.equal(delta, right.update.delta[name]) for name, delta in left.update.delta.items())


def test_a_client_at_fault_fails_alone() -> None:
    def jobs(b: Any) -> list[Job]:
        x, y = WHOLE.tensors
        wrong = DataLoader(TensorDataset(x[:12], y[:12] + 100), batch_size=5)
        return [job(b, loader, "a"), job(b, lambda: wrong, "wrong"), job(b, lambda: loader(15, 30), "b")]

    alone, group, loop = together(Simple(mlp()), jobs)
    assert [type(o.error) for o in group] == [type(o.error) for o in alone] == [type(None), IndexError, type(None)]
    assert loop.together.reason is None, "one client's fault is no reason against groups"
    assert_alike([alone[0], alone[2]], [group[0], group[2]])


def test_the_rule() -> None:
    sizes = {
        "logistic": (Plain(nn.Linear(60, 10)), 256),
        "mlp": (Plain(nn.Sequential(nn.Linear(784, 200), nn.Linear(200, 200), nn.Linear(200, 10))), 16),
        "large": (Plain(nn.Linear(1000, 1000)), 1),
        "convolution": (ZOO["group norm"](), 1),
        "dropout": (ZOO["dropout"](), 1),
    }
    for module, size in sizes.values():
        loop = choose_loop(module, FedAvg(), settings_for(module, FedAvg()))
        assert isinstance(loop, LeanLoop)
        assert loop.together.size == size


def test_the_examples_of_a_group_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    init = lean_together.Group.__init__

    def spy(self: Any, facts: Any, members: Any, *arguments: Any) -> None:
        sizes.append(len(members))
        init(self, facts, members, *arguments)

    example = sum(t[:1].numel() * t.element_size() for t in WHOLE.tensors)
    monkeypatch.setattr(lean_together.Group, "__init__", spy)
    monkeypatch.setattr(lean_together, "chunks", partial(lean_together.chunks, limit=40 * example))
    alone, group, loop = together(Simple(mlp()), ragged())  # 23, 10 | 27, 3 | 15, 12 | 21, 5 | 23 examples
    assert_alike(alone, group)
    assert sizes == [2, 2, 2, 2]
    assert loop.together.reason is None


def test_nobody_waits_for_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[Any]] = []
    init = lean_together.Group.__init__

    def spy(self: Any, facts: Any, members: Any, *arguments: Any, **more: Any) -> None:
        groups.append([member.job.task.client_id for member in members])
        init(self, facts, members, *arguments, **more)

    monkeypatch.setattr(lean_together.Group, "__init__", spy)
    sizes = [10, 10, 100, 10, 10, 8, 10]  # batches of 5

    def jobs(broadcast: dict[str, Any]) -> list[Job]:
        return [job(broadcast, lambda n=n, k=k: loader(n, 9 * k), f"c{k}") for k, n in enumerate(sizes)]

    alone, auto, loop = together(Plain(linear()), jobs, size="auto")
    assert_alike(alone, auto)
    assert groups[-1] == ["c0", "c1", "c3", "c4", "c5", "c6"]
    assert loop.together.reason is None
    assert auto[2].update is not None
    assert alone[2].update is not None
    for name, delta in alone[2].update.delta.items():
        assert torch.equal(delta, auto[2].update.delta[name]), "who trains alone has the bits of LightningLoop"
    groups.clear()
    together(Plain(linear()), jobs, size=7)
    assert groups[-1] == [f"c{k}" for k in range(7)], "who asks for a size gets it"


@pytest.mark.parametrize("seed", range(20))
def test_who_is_too_long_is_the_cheapest_choice(seed: int) -> None:
    steps = torch.randint(1, 200, (1 + seed % 9,), generator=torch.Generator().manual_seed(seed)).tolist()
    tick, opens = lean_grouping._TICK, lean_grouping._OPEN

    def cost(grouped: set[int]) -> int:
        alone = sum(s + opens for i, s in enumerate(steps) if i not in grouped)
        return alone + (tick * max(steps[i] for i in grouped) if grouped else 0)

    positions = range(len(steps))
    every = [{i for i in positions if mask >> i & 1} for mask in range(2 ** len(steps))]
    least = min(cost(grouped) for grouped in every if len(grouped) != 1)
    longest = sorted(positions, key=lambda i: -steps[i])
    assert cost(set(longest[lean_grouping.too_long(steps) :])) == least
