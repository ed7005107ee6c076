"""What travels, what stays and what is averaged: BatchNorm policies, integer buffers, frozen and tied parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from spine_modules import Norm
from spine_zoo import Classifier, assert_close, fit_federated, loader, sites, weights
from torch import Tensor, nn
from torch.nn import functional as F

from fl_lightning.algorithms import FedAvg
from fl_lightning.transforms import Codec
from fl_lightning.tree import num_bytes
from fl_lightning.types import ClientTask, Contribution
from fl_lightning.wire import pack


def trained_alone(start: nn.Module, forward: Any, data: Any, lr: float = 0.1) -> nn.Module:
    """One pass of SGD in plain torch."""
    net = copy.deepcopy(start).train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(forward(net, x), y).backward()
        optimizer.step()
    return net


def norm_forward(net: nn.Module, x: Tensor) -> Tensor:
    return net.net(net.norm(x))  # type: ignore[operator]


def test_average_is_the_weighted_mean_of_running_statistics() -> None:
    module, clients = Norm(), sites(3, shuffle=False, drop_last=True)
    parts = torch.nn.ModuleDict({"norm": module.norm, "net": module.net})
    ends = [trained_alone(parts, lambda n, x: n["net"](n["norm"](x)), data) for data in clients.values()]
    sizes = [len(data.dataset) for data in clients.values()]  # type: ignore[arg-type]
    fit_federated(module, clients, batch_norm="average")
    for name in ("running_mean", "running_var"):
        expected = sum(n * getattr(end["norm"], name).double() for n, end in zip(sizes, ends, strict=True)) / sum(sizes)
        torch.testing.assert_close(getattr(module.norm, name).double(), expected, atol=1e-6, rtol=1e-6)
    counted = [int(end["norm"].num_batches_tracked) for end in ends]
    mean = round(sum(n * c for n, c in zip(sizes, counted, strict=True)) / sum(sizes))
    assert module.norm.num_batches_tracked.dtype == torch.long
    assert int(module.norm.num_batches_tracked) == mean


def test_adam_on_the_server_leaves_running_statistics_alone() -> None:
    algorithm = FedAvg(server_optimizer=lambda params: torch.optim.Adam(params, lr=0.5))
    module = Norm()
    fit_federated(module, sites(3, batch_size=7), max_rounds=5, algorithm=algorithm)
    assert bool((module.norm.running_var > 0).all())
    assert bool(torch.isfinite(module.norm.running_var).all())


class KeepsEnds(Callback):
    ends: dict[int, list[dict[str, Tensor]]] = {}
    starts: dict[int, list[dict[str, Tensor]]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.starts.setdefault(len(trainer.train_dataloader.dataset), []).append(weights(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends.setdefault(len(trainer.train_dataloader.dataset), []).append(weights(pl_module))


def test_local_batch_norm_stays_with_its_client() -> None:
    KeepsEnds.ends, KeepsEnds.starts = {}, {}
    module = Norm()
    before = weights(module)
    fit_federated(module, sites(3, batch_size=7), max_rounds=3, batch_norm="local", client_callbacks=[KeepsEnds()])
    for size in (11, 18, 25):
        for round in (1, 2):
            for name in before:
                here, last = KeepsEnds.starts[size][round][name], KeepsEnds.ends[size][round - 1][name]
                assert torch.equal(here, last) == name.startswith("norm"), name
    after = weights(module)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("norm"))
    assert not torch.equal(before["net.0.weight"], after["net.0.weight"])


def test_recalibrated_statistics_are_those_of_the_pooled_data() -> None:
    module, clients = Norm(), sites(3, batch_size=64)  # one batch a client: its batch statistics are its data's
    fit_federated(module, clients, max_rounds=2, batch_norm="recalibrate")
    pooled = torch.cat([data.dataset.tensors[0] for data in clients.values()]).double()  # type: ignore[attr-defined]
    torch.testing.assert_close(module.norm.running_mean.double(), pooled.mean(0), atol=1e-5, rtol=1e-5)
    # torch's running variance is unbiased in each batch, so the mean of the clients' has another denominator
    torch.testing.assert_close(module.norm.running_var.double(), pooled.var(0), atol=0.08, rtol=0.05)


def test_a_model_without_batch_norm_does_not_mind_the_policy() -> None:
    ends = []
    start = Classifier()
    for policy in ("average", "local", "recalibrate"):
        module = copy.deepcopy(start)
        fit_federated(module, sites(3), batch_norm=policy)
        ends.append(weights(module))
    assert all(torch.equal(ends[0][n], end[n]) for end in ends for n in end)


class Frozen(Classifier):
    """A frozen backbone, a tied head, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 8)
        self.backbone.requires_grad_(False)
        self.again = nn.Linear(8, 3)
        self.again.weight = self.net[0].weight
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x)) + self.again(x) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.again.weight is self.net[0].weight
        self.scale *= 0.5  # a float buffer of the client's own: the server keeps its value
        return super().training_step(batch, batch_idx)


def test_an_averaged_count_is_rounded_to_an_integer() -> None:
    """Clients of 7 and 8 batches give 7.6 batches on average, by examples: 8, and no cut to 7."""

    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    module = Normed()
    fit_federated(module, {"a": loader(56, batch_size=8), "b": loader(96, batch_size=12)})
    assert module.norm.num_batches_tracked.dtype is torch.int64
    assert module.norm.num_batches_tracked.item() == round((56 * 7 + 96 * 8) / 152) == 8


def test_frozen_parameters_and_other_buffers_are_neither_sent_nor_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = Codec.size

    def watched(self: Codec, contribution: Contribution, task: ClientTask) -> int:
        assert num_bytes(contribution.trees.values()) == 4 * (8 * 3 + 3 + 3)  # the tied weight once, two biases
        written.append(len(self.encode(contribution, task, {})[0]))
        return original(self, contribution, task)

    monkeypatch.setattr(Codec, "size", watched)
    module = Frozen()
    before = weights(module)
    trainer = fit_federated(module, sites(3), max_rounds=2)
    after = weights(module)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"backbone.weight", "backbone.bias", "table", "scale", "flag"}
    assert torch.equal(after["again.weight"], after["net.0.weight"])
    assert module.again.weight is module.net[0].weight
    assert [report.num_bytes_up for report in trainer.round_history] == [sum(written[:3]), sum(written[3:])]
    model = {name: after[name] for name in ("net.0.weight", "net.0.bias", "again.bias")}
    down = 3 * len(pack({"model": model, "buffers": {}}))
    assert [report.num_bytes_down for report in trainer.round_history] == [down] * 2


def test_tied_weights_train_as_in_plain_torch() -> None:
    module = Frozen()
    expected = trained_alone(module, lambda net, x: net(x), [])
    optimizer = torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], lr=0.1)
    for x, y in loader(20, shuffle=False):
        expected.scale *= 0.5  # type: ignore[operator]
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        optimizer.step()
    fit_federated(module, {"a": loader(20, shuffle=False)})
    mine, theirs = weights(module), weights(expected)
    del mine["scale"], theirs["scale"]
    assert_close(mine, theirs)


def test_a_frozen_server_still_gives_its_values_to_the_clients() -> None:
    seen: list[float] = []

    class Reads(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(pl_module.backbone.bias.sum()))

    module = Frozen()
    with torch.no_grad():
        module.backbone.bias.fill_(3.0)
    fit_federated(module, sites(2), max_rounds=2, client_callbacks=[Reads()])
    assert seen == [24.0] * 4


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_sum_is_in_the_modules_precision(precision: Any) -> None:
    module = Classifier()
    fit_federated(module, sites(3), precision=precision)
    assert module.net[0].weight.dtype == {"32-true": torch.float32, "64-true": torch.float64}[precision]
