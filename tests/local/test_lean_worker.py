"""The worker forgets every client, whether it can compare an attribute or has to copy it."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric
from zoo import ZOO, both, job, loader

from fl_lightning.local.worker import Worker


class Keeper(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"rate": 0.5, "sizes": [1, 2]})
        self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.net[0].bias.requires_grad_(False)
        self.metric = MeanMetric()
        self.counter = 0
        self.losses: list[Any] = []
        self.schedule = {"warm": [0.1, 0.2], "kinds": {"a", "b"}}
        self.shared = self.schedule["warm"]
        self.state = {"tensor": torch.zeros(2)}
        self.alias = self.state["tensor"]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return type(left) is type(right) and left == right


CHANGES = {
    "number": lambda m: setattr(m, "counter", 3),
    "type": lambda m: setattr(m, "counter", False),
    "list": lambda m: m.losses.append(1.0),
    "new list": lambda m: setattr(m, "losses", []),
    "nested": lambda m: m.schedule["warm"].append(0.3),
    "nested set": lambda m: m.schedule["kinds"].add("c"),
    "hyperparameters": lambda m: m.hparams["sizes"].append(3),
    "tensor in a dictionary": lambda m: m.state["tensor"].add_(1),
    "alias": lambda m: m.alias.add_(1),
    "new attribute": lambda m: setattr(m, "extra", 1),
    "lost attribute": lambda m: delattr(m, "losses"),
    "new layer": lambda m: setattr(m, "head", nn.Linear(2, 2)),
    "other layer": lambda m: m.net.__setitem__(0, nn.Linear(2, 2)),
    "metric": lambda m: m.metric.update(3.0),
    "statistics": lambda m: m.net[1].running_mean.add_(1),
    "frozen weight": lambda m: m.net[0].bias.data.add_(1),
    "frozen": lambda m: m.net[0].weight.requires_grad_(False),
    "unfrozen": lambda m: m.net[0].bias.requires_grad_(True),
    "mode": lambda m: m.eval(),
    "hook": lambda m: m.net.register_forward_hook(lambda *_: None),
    "log": lambda m: m.__dict__.__setitem__("log", print),
}


@pytest.mark.parametrize("change", CHANGES)
def test_everything_is_put_back(change: str) -> None:
    torch.manual_seed(0)
    module = Keeper()
    as_it_was = copy.deepcopy(module)
    worker = Worker(module, torch.device("cpu"))
    for _ in range(2):  # the second time starts from what the first restored
        worker.restore()
        CHANGES[change](module)
        worker.restore()
        for part, old in zip(module.modules(), as_it_was.modules(), strict=True):
            assert type(part) is type(old)
            assert vars(part).keys() == vars(old).keys()
            for name in ("training", "_forward_hooks", "_hparams"):
                assert vars(part).get(name) == vars(old).get(name)
        for name in ("counter", "losses", "schedule", "state", "hparams"):
            assert same(getattr(module, name), getattr(as_it_was, name)), name
        assert module.shared is module.schedule["warm"]
        assert module.alias is module.state["tensor"]
        assert not module.metric.update_called
        values = [*module.buffers(), module.net[0].bias]
        old_values = [*as_it_was.buffers(), as_it_was.net[0].bias]
        assert all(torch.equal(a, b) for a, b in zip(values, old_values, strict=True))
        assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in as_it_was.parameters()]


def test_what_a_client_kept_of_a_list_stays_its_own() -> None:
    module = Keeper()
    worker = Worker(module, torch.device("cpu"))
    worker.restore()
    kept = module.losses
    kept.append(1.0)
    worker.restore()
    module.losses.append(2.0)
    assert kept == [1.0]


def test_an_object_shared_by_comparable_and_other_attributes_stays_one() -> None:
    class Sharing(Keeper):
        def __init__(self) -> None:
            super().__init__()
            self.memory: list[Any] = [1]
            self.box = {"tensor": torch.ones(1), "memory": self.memory}

    module = Sharing()
    worker = Worker(module, torch.device("cpu"))
    for _ in range(2):
        module.memory.append(2)
        worker.restore()
        assert module.memory == [1]
        assert module.box["memory"] is module.memory


def test_channels_last_is_a_layout_and_no_other_model() -> None:
    torch.manual_seed(0)
    module = ZOO["group norm"]()
    plain, turned, _ = both(module, lambda b: [job(b, loader)], memory_format="channels_last")
    usual, *_ = both(module, lambda b: [job(b, loader)])
    worker = Worker(copy.deepcopy(module), torch.device("cpu"), "channels_last")
    weights = [p for p in worker.module.parameters() if p.ndim == 4]
    assert weights
    assert all(weight.stride(1) == 1 for weight in weights)
    worker.restore()
    assert all(weight.stride(1) == 1 for weight in weights)
    for left, right, other in zip(plain, turned, usual, strict=True):
        assert left.update is not None and right.update is not None and other.update is not None  # noqa: PT018
        for name, delta in left.update.delta.items():
            assert torch.equal(delta, right.update.delta[name]), "both loops use the layout"
            torch.testing.assert_close(delta, other.update.delta[name], rtol=1e-3, atol=1e-5)
