"""A group is formed by itself only where its clients get what they get alone; what is found out holds for one lane."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from grouped import assert_alike, ragged, together
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from zoo import CLASSES, FEATURES, Plain, adam, both, broadcast_of, job, linear, loader, mlp, settings_for

from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.local import lean_together
from fl_lightning.local.choice import choose_loop
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.worker import copied_module


class Padded(Plain):
    """Looks up embeddings of which the first is padding, and always zero."""

    def __init__(self) -> None:
        super().__init__(linear())
        self.table = nn.Embedding(3, FEATURES, padding_idx=0)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        logits = self.net(batch[0] + self.table((batch[0][:, 0] > 0).long()))
        return F.cross_entropy(logits, batch[1]), logits


class FunctionalDropout(Plain):
    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        logits = self.net(F.dropout(batch[0], 0.3))
        return F.cross_entropy(logits, batch[1]), logits


class Noisy(Plain):
    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        logits = self.net(batch[0] + 0.1 * torch.randn_like(batch[0]))
        return F.cross_entropy(logits, batch[1]), logits


class Mixed(Plain):
    """Draws a factor from NumPy or Python."""

    def __init__(self, net: nn.Module, draw: Any) -> None:
        super().__init__(net)
        self.draw = draw

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        logits = self.net(batch[0] * float(self.draw()))
        return F.cross_entropy(logits, batch[1]), logits


class OwnGenerator(Plain):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.generator = torch.Generator().manual_seed(3)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        logits = self.net(batch[0] * torch.rand(FEATURES, generator=self.generator))
        return F.cross_entropy(logits, batch[1]), logits


class Counter:
    calls = 0


class CountsElsewhere(Plain):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.counter = Counter()

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.counter.calls += 1
        loss, logits = super().loss(batch)
        return loss * self.counter.calls, logits


class Reassigned(Plain):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("count", torch.zeros(()))

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.count = self.count + 1
        loss, logits = super().loss(batch)
        return loss * self.count, logits


def by_own_epoch(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rate = lambda step: 1 / (1 + 5 * module.current_epoch + step)  # noqa: E731
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, rate), "interval": "step"}]


def hooked() -> Any:
    module = Plain(mlp())
    module.net[2].weight.register_hook(lambda grad: grad * 0.5)
    return module


INEXACT: dict[str, tuple[Any, str]] = {
    "padding": (Padded, "does not know padding_idx"),
    "functional dropout": (lambda: FunctionalDropout(mlp()), "draws random numbers"),
    "noise": (lambda: Noisy(mlp()), "draws random numbers"),
    "numpy": (lambda: Mixed(mlp(), lambda: np.random.rand()), "draws from"),
    "normal numpy": (lambda: Mixed(mlp(), lambda: np.random.standard_normal()), "draws from"),
    "random": (lambda: Mixed(mlp(), random.random), "draws from"),
    "generator": (lambda: OwnGenerator(mlp()), "something else than its clients give alone"),
    "counter": (lambda: CountsElsewhere(mlp()), "something else than its clients give alone"),
    "buffer": (lambda: Reassigned(mlp()), "writes to its buffers"),
    "epochs": (lambda: Plain(mlp(), by_own_epoch), "differs from client to client"),
    "gradient hook": (hooked, "a hook on a parameter"),
}


@pytest.mark.parametrize("kind", INEXACT)
def test_what_a_group_would_do_otherwise_trains_alone(kind: str) -> None:
    make, reason = INEXACT[kind]
    torch.manual_seed(0)
    alone, group, loop = together(make(), ragged(epochs=2), size="auto")
    why = loop.together.reason or loop.together.trouble
    assert why is not None
    assert re.search(reason, why), why
    for left, right in zip(alone, group, strict=True):
        assert left.update is not None
        assert right.update is not None
        assert all(torch.equal(delta, right.update.delta[name]) for name, delta in left.update.delta.items())


@pytest.mark.parametrize("draw", [lambda: np.random.rand(), random.random])
def test_numbers_that_vmap_does_not_split_are_refused_whatever_the_size_of_groups(draw: Any) -> None:
    torch.manual_seed(0)
    _, _, loop = together(Mixed(mlp(), draw), ragged(), size=9)
    assert "one number for all of a group" in str(loop.together.reason)


def test_a_given_size_groups_modules_that_draw() -> None:
    torch.manual_seed(0)
    _, _, loop = together(FunctionalDropout(mlp()), ragged(), size=9)
    assert loop.together.reason is None


# ---- lanes ---------------------------------------------------------------------------------------------------------


class SmallBatches(Plain):
    """Sees a weight a second time where a batch is small."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(batch)
        if len(batch[0]) < 4:
            loss = loss + 0.1 * self.net[0].weight.square().sum()
        return loss, logits


class LogsCounts(Plain):
    """Logs an integer tensor where a batch is small, which no group takes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) < 4:
            self.log("small", torch.tensor(1), on_epoch=True)
        return self.loss(batch)[0]


class LooksAround(Plain):
    """Asks for a real Trainer where a batch is small."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) < 4:
            self.trainer.callback_metrics  # noqa: B018
        return self.loss(batch)[0]


@pytest.mark.parametrize("kind", [SmallBatches, LogsCounts, LooksAround])
def test_what_one_lane_finds_out_changes_no_bit_of_another(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(mlp())
    settings = settings_for(module, FedAvg())
    broadcast = broadcast_of(module, settings)

    def lane(sizes: list[int], first: int) -> Any:
        return [job(broadcast, lambda n=n, k=k: loader(n, 30 * k), first + k) for k, n in enumerate(sizes)]

    odd, even = lane([23, 10, 12, 15], 0), lane([20, 10, 15, 5], 100)
    one = LeanLoop(copy.deepcopy(module), FedAvg(), settings)
    list(one.run(odd))
    later = list(one.run(even))
    alone = list(LeanLoop(copy.deepcopy(module), FedAvg(), settings).run(even))
    for left, right in zip(alone, later, strict=True):
        assert left.update is not None
        assert right.update is not None
        assert all(torch.equal(delta, right.update.delta[name]) for name, delta in left.update.delta.items())


# ---- memory --------------------------------------------------------------------------------------------------------


def test_a_group_is_bounded_by_what_its_steps_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    chunks = lean_together.chunks

    def spy(kinds: Any, num_bytes: list[int]) -> Any:
        sizes.extend(num_bytes)
        return chunks(kinds, num_bytes)

    monkeypatch.setattr(lean_together, "chunks", spy)
    torch.manual_seed(0)
    alone, group, _ = together(Plain(linear()), ragged(), size="auto")
    assert_alike(alone, group, 5e-5)
    examples = [size * (FEATURES * 4 + 8) for size in [23, 10, 27, 3, 15, 12, 21, 5, 23]]
    (kept,) = {size - own for size, own in zip(sizes, examples, strict=True)}
    # a step of logistic regression needs the batch, its labels and the logarithms of its softmax again
    assert kept == pytest.approx(5 * (FEATURES * 4 + 8 + CLASSES * 4), abs=16)


# ---- the lean loop itself ------------------------------------------------------------------------------------------


class Unfreezes(Plain):
    """Gives its optimizer a second group when the second epoch begins."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters()), "lr": 0.05})


def test_a_parameter_group_that_joins_is_trained_as_by_the_trainer() -> None:
    torch.manual_seed(0)
    oracle, lean, loop = both(Unfreezes(mlp()), lambda b: [job(b, loader, epochs=3), job(b, loader, "b", epochs=3)])
    assert loop.reason is None
    for left, right in zip(oracle, lean, strict=True):
        assert left.update is not None
        assert right.update is not None
        assert left.update.delta["net.0.weight"].any()
        assert all(torch.equal(delta, right.update.delta[name]) for name, delta in left.update.delta.items())


def test_hooks_of_parameters_are_the_copys_too() -> None:
    module = nn.Linear(2, 1)
    model = Plain(module)
    seen: list[str] = []
    module.weight.register_hook(lambda grad: grad * 0)
    module.bias.register_post_accumulate_grad_hook(lambda parameter: seen.append("bias"))
    copied = copied_module(model)
    copied.net(torch.ones(1, 2)).sum().backward()
    assert not copied.net.weight.grad.any()
    assert seen == ["bias"]


@pytest.mark.parametrize(
    ("module", "changes", "reason"),
    [
        (lambda: Plain(mlp()), {"client_state": "keep"}, "client_state='keep' carries optimizers over"),
        (lambda: Plain(mlp()), {"trainer_arguments": {"precision": "bf16-mixed"}}, "precision 'bf16-mixed' is for one"),
        (lambda: Plain(mlp()), {"trainer_arguments": {"accumulate_grad_batches": 2}}, "gradients accumulate"),
        (lambda: Plain(mlp(nn.BatchNorm1d(16)), adam), {}, "its running statistics update in place"),
        (lambda: Plain(mlp(), adam), {"group_size": 1}, "as group_size=1 asks"),
        (lambda: Plain(nn.Sequential(linear(), nn.MultiheadAttention(4, 2))), {}, "slower on a CPU"),
    ],
)
def test_the_reason_is_said_before_anyone_trains(
    module: Any, changes: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = module()
    with caplog.at_level("INFO"):
        loop = choose_loop(made, FedAvg(), settings_for(made, FedAvg(), **changes))
    assert isinstance(loop, LeanLoop)
    assert not loop.groups
    assert reason in caplog.text


def test_loaders_with_workers_draw_their_order_when_the_epoch_begins() -> None:
    """Workers are given their first batches at once, so the order precedes what the first step draws."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, FEATURES), torch.arange(12) % CLASSES)
    open_loader = lambda: DataLoader(data, 4, shuffle=True, num_workers=1)  # noqa: E731
    oracle, lean, loop = both(FunctionalDropout(mlp()), lambda b: [job(b, open_loader)])
    assert loop.reason is None
    left, right = oracle[0].update, lean[0].update
    assert left is not None
    assert right is not None
    assert all(torch.equal(delta, right.delta[name]) for name, delta in left.delta.items())
