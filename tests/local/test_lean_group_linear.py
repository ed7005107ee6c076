"""Weights of linear layers step without a gradient: that changes the rounding, and where it changes more, it is off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouped import assert_alike, ragged, together
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CLASSES, FEATURES, Plain, adam, linear, mlp, momentum

from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.algorithms.fedprox import FedProx
from fl_lightning.local import lean_group
from fl_lightning.local.lean_group_linear import step_weight


def decayed(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, weight_decay=0.1)


def two_rates(module: Any) -> Any:
    first, *rest = module.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.2, "weight_decay": 0.05}, {"params": rest}], lr=0.01)


def falling(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


class Rows(nn.Module):
    """Two layers over rows of an example, one of them fed by what is the same for every client."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8, bias=False)
        self.place = nn.Linear(4, 8)
        self.head = nn.Linear(8, CLASSES)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.unflatten(1, (4, 3))) + self.place(torch.eye(4))
        logits: Tensor = self.head(self.frozen(rows.tanh()).mean(1))
        return logits


FUSED: dict[str, Callable[[], Any]] = {
    "logistic": lambda: Plain(linear()),
    "perceptron": lambda: Plain(mlp()),
    "weight decay": lambda: Plain(mlp(), decayed),
    "two groups of parameters": lambda: Plain(mlp(), two_rates),
    "scheduler": lambda: Plain(mlp(), falling),
    "rows": lambda: Plain(Rows()),
    "rows and decay": lambda: Plain(Rows(), decayed),
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every weight that took its step without a gradient."""
    seen: list[Any] = []

    def spy(weight: Tensor, *arguments: Any) -> None:
        seen.append(weight.shape[1:])
        step_weight(weight, *arguments)

    monkeypatch.setattr(lean_group, "step_weight", spy)
    return seen


ROUNDING = 5e-5
"""Of an update's norm: a step rounds the weight, which is some hundred times as long as these updates are."""


@pytest.mark.parametrize("kind", FUSED)
def test_it_is_what_clients_get_alone(kind: str, steps: list[Any]) -> None:
    torch.manual_seed(0)
    module = FUSED[kind]()
    alone, group, loop = together(module, ragged(epochs=2))
    assert_alike(alone, group, ROUNDING)
    assert loop.together.reason is None
    layers = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    assert {weight.shape for weight in layers if weight.requires_grad} == set(steps)


def test_clients_of_unlike_learning_rates(steps: list[Any]) -> None:
    torch.manual_seed(0)
    sizes = ragged()
    rates = [0.5, 1.0, 2.0, 0.1, 0.7, 0.3, 1.5, 0.9, 0.2]

    def jobs(broadcast: Any) -> Any:
        made = sizes(broadcast)
        for job, factor in zip(made, rates, strict=True):
            job.task = type(job.task)(
                job.task.client_id, 0, 0, broadcast, job.task.seed, type(job.task.work)(epochs=2, lr_factor=factor)
            )
        return made

    alone, group, _ = together(Plain(mlp(), decayed), jobs)
    assert_alike(alone, group, ROUNDING)
    assert steps


class Twice(Plain):
    """A layer that runs twice in a step."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh()))
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        hidden = self.middle(self.middle(self.net(batch[0])).tanh())
        logits = self.head(hidden)
        return F.cross_entropy(logits, batch[1]), logits


class Penalised(Plain):
    """A weight that the loss sees beside its layer."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(batch)
        return loss + 0.1 * self.net[0].weight.abs().sum(), logits


class OnlyPenalised(Plain):
    """A layer whose output leads nowhere, and whose weight the loss sees elsewhere."""

    def __init__(self) -> None:
        super().__init__(linear())
        self.side = nn.Linear(FEATURES, 3, bias=False)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(batch)
        self.side(batch[0])
        return loss + 0.1 * self.side.weight.square().sum(), logits


def tied() -> Any:
    module = Plain(nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16), linear()))
    module.net = nn.Sequential(*list(module.net)[:4], nn.Linear(16, CLASSES))
    module.net[3].weight = module.net[2].weight
    return module


def in_place() -> Any:
    return Plain(nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)))


@pytest.mark.parametrize("make", [Twice, lambda: Penalised(mlp()), OnlyPenalised, in_place])
def test_where_it_would_be_wrong_gradients_are_whole(make: Any, steps: list[Any]) -> None:
    torch.manual_seed(0)
    alone, group, loop = together(make(), ragged(epochs=2))
    assert_alike(alone, group)
    assert loop.together.reason is None, "they still train together"
    assert loop.together.fuses is False


def test_a_weight_of_two_layers_has_a_whole_gradient_and_the_others_none(steps: list[Any]) -> None:
    torch.manual_seed(0)
    alone, group, loop = together(tied(), ragged(epochs=2))
    assert_alike(alone, group, ROUNDING)
    assert loop.together.fuses
    assert set(steps) == {(16, FEATURES), (CLASSES, 16)}


@pytest.mark.parametrize(
    ("module", "algorithm", "arguments"),
    [
        (lambda: Plain(mlp(), momentum), FedAvg(), {}),
        (lambda: Plain(mlp(), adam), FedAvg(), {}),
        (lambda: Plain(mlp()), FedProx(mu=0.1), {}),
        (lambda: Plain(mlp()), FedAvg(), {"trainer_arguments": {"gradient_clip_val": 0.1}}),
    ],
)
def test_what_looks_at_gradients_gets_them(module: Any, algorithm: Any, arguments: Any, steps: list[Any]) -> None:
    torch.manual_seed(0)
    alone, group, _ = together(module(), ragged(epochs=2), algorithm, **arguments)
    assert_alike(alone, group, tolerance=1e-4)
    assert not steps


def test_layers_are_themselves_again_after_a_group() -> None:
    torch.manual_seed(0)
    _, _, loop = together(Plain(mlp()), ragged(epochs=1))
    assert all("forward" not in vars(part) for part in loop.worker.module.modules())
