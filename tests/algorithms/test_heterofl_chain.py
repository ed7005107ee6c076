"""Which modules have a narrow version: one chain of layers, found by following their calls."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer, HeteroFL, Quantize
from fl_lightning.algorithms.heterofl import kept_lengths
from fl_lightning.algorithms.layer_chain import check_chain
from fl_lightning.callbacks.attacks import NoiseAttack
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientTask, ClientUpdate, Work

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "log_clients": False, "num_threads": 1, "max_rounds": 1,
}  # fmt: skip


class Base(pl.LightningModule):
    """Trains what ``forward`` gives."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Words(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(8, 32), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Any:
        return self.net(x[:, :1].abs().long().clamp(0, 7))


class TwoHeads(Base):
    """The heads are chosen so that shapes alone allow a chain."""

    def __init__(self, first: int = 8) -> None:
        super().__init__()
        self.body, self.h1, self.h2 = nn.Linear(8, 8), nn.Linear(8, first), nn.Linear(8, 4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = torch.relu(self.body(batch[0]))
        return F.cross_entropy(self.h1(hidden), batch[1] % 2) + F.cross_entropy(self.h2(hidden), batch[1])


class HeadFirst(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.body(x)))


class Parallel(Base):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.one(x) + self.two(x)))


class Regularised(Base):
    """A hidden layer stands in the loss as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.body(batch[0])
        return F.cross_entropy(self.head(torch.relu(hidden)), batch[1]) + hidden.square().mean()


class Softmax(Base):
    def __init__(self, mixing: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), mixing or nn.Softmax(dim=1), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Twice(Softmax):
    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.net.insert(1, self.net[0])


class Residual(Base):
    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.head, self.whole = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3), whole

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.one(x))
        return self.head(torch.relu((x if self.whole else hidden) + self.two(hidden)))


class Pictures(Base):
    """Written out, with sizes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = F.max_pool2d(torch.relu(self.one(x.view(x.size(0), 1, 2, -1))), 1)
        hidden = F.dropout(torch.tanh(self.two(hidden)), 0.0).mean(dim=(2, 3))
        return self.head(hidden.view(hidden.shape[0], -1))


class Branching(Base):
    """``training_step`` cannot be followed without numbers, the part with the layers can."""

    def __init__(self, follow: bool = True) -> None:
        super().__init__()
        layers = (nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.net = nn.Sequential(*layers) if follow else nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            x = x * 2
        if isinstance(self.net, nn.Sequential):
            return self.net(x)
        for part in self.net:
            x = part(x)
        return x


def train(module: pl.LightningModule, width: float = 0.5, **arguments: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 8, generator=draw), torch.randint(3, (12,), generator=draw)
    loaders = {name: DataLoader(TensorDataset(x, y), batch_size=6) for name in "ab"}
    trainer = FederatedTrainer(
        algorithm=HeteroFL(), **{"client_overrides": {"a": {"width": width}}, **QUIET, **arguments}
    )
    trainer.fit(module, loaders)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Words(), r"'net\.0\.weight'.*belongs to no linear or convolution layer but to a Embedding"),
        (TwoHeads(), r"'h2\.weight': it gets its inputs from 'body' and not from 'h1'.*a single output layer last"),
        (TwoHeads(2), r"'h2\.weight': it gets its inputs from 'body' and not from 'h1'"),
        (
            HeadFirst(),
            r"'head\.weight': it gets its inputs from 'body' and not from 'the inputs.*in the order in which",
        ),
        (Parallel(), r"'two\.weight': it gets its inputs from 'the inputs of the model' and not from 'one'"),
        (Residual(whole=True), r"'head\.weight': it gets its inputs from 'the inputs of the model' and not from 'two'"),
        (Regularised(), r"'body\.weight': it gives outputs of the model, as 'head' does"),
        (Softmax(), r"'net\.2\.weight': it follows 'net\.0' behind Softmax, which is not known to keep units apart"),
        (Twice(), r"'net\.0\.weight': it is used twice"),
        (Softmax(nn.Linear(8, 8).requires_grad_(False)), r"'net\.2\.weight': it follows 'net\.0' behind Linear"),
        (Branching(follow=False), r"cannot see how the layers of Branching feed one another.*one nn\.Sequential"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:.*optimizer.*")
def test_what_is_no_chain_is_refused_by_name(module: pl.LightningModule, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        train(module)
    train(module, width=1.0)


@pytest.mark.parametrize("module", [Residual(), Branching(), Softmax(nn.ReLU())], ids=lambda m: type(m).__name__)
def test_chains_are_found_however_they_are_written(module: pl.LightningModule) -> None:
    train(module)


def test_a_chain_with_pictures_is_found_and_convolutions_that_are_no_chain_are_not() -> None:
    names = [name for name, _ in Pictures().named_parameters()]
    check_chain(Pictures(), names)
    for middle, message in (
        (
            nn.ConvTranspose2d(8, 16, 3),
            r"'1\.weight'.*belongs to no linear or convolution layer but to a ConvTranspose2d",
        ),
        (nn.Conv2d(8, 16, 3, groups=8), r"'1\.weight'.*Conv2d with groups=8"),
        (nn.Sequential(nn.Flatten(2), nn.Softmax(1), nn.Unflatten(2, (6, 6)), nn.Conv2d(8, 16, 3)), "Softmax"),
    ):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.Conv2d(16, 3, 3))
        with pytest.raises(MisconfigurationException, match=message):
            check_chain(net, [name for name, _ in net.named_parameters()])
    # a transposed convolution with as many inputs as outputs has the shapes of another one
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 3, 3))
    kept_lengths({name: tuple(p.shape) for name, p in net.named_parameters()}, 0.5)
    with pytest.raises(MisconfigurationException, match="ConvTranspose2d"):
        check_chain(net, [name for name, _ in net.named_parameters()])


def test_pooling_mixes_the_units_of_a_linear_layer_and_not_those_of_a_convolution() -> None:
    pool = nn.AvgPool1d(3, stride=1, padding=1)
    for layer, last, mixes in (
        (nn.Conv1d(2, 8, 1), nn.Conv1d(8, 3, 1), False),
        (nn.Linear(2, 8), nn.Linear(8, 3), True),
    ):
        net = nn.Sequential(layer, pool, last)
        names = [name for name, _ in net.named_parameters()]
        if mixes:
            with pytest.raises(MisconfigurationException, match="AvgPool1d, which is not known to keep units apart"):
                check_chain(net, names)
        else:
            check_chain(net, names)


@pytest.mark.parametrize(
    "arguments",
    [
        {
            "client_callbacks": [NoiseAttack(["a"], std=100.0)],
            "client_overrides": {"a": {"width": 0.5}, "b": {"lr": 1e-9}},
        },
        {"transforms": [Quantize(bits=1)], "client_overrides": {"a": {"width": 0.5}, "b": {"lr": 1e-9}}},
    ],
    ids=["noise attack", "lossy transform"],
)
def test_nobody_moves_what_it_does_not_hold(arguments: dict[str, Any]) -> None:
    """Rows 4 to 7 of the hidden layer are held by a client alone that learns nothing: the other may not move them."""
    torch.manual_seed(0)
    module = Softmax(nn.Tanh())
    before = module.net[0].weight.detach().clone()
    train(module, 0.5, **arguments)
    moved = (module.net[0].weight.detach() - before).abs()
    assert moved[:4].max() > 1e-3
    assert moved[4:].max() < 1e-7


def test_what_is_outside_is_cut_on_both_sides_of_the_wire() -> None:
    algorithm = HeteroFL()
    model = {"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(2, 4)}
    task = ClientTask("a", 0, 0, {"model": model}, seed=0, work=Work(width=0.5))
    update = ClientUpdate("a", {name: torch.ones_like(t) for name, t in model.items()}, {}, num_examples=2, num_steps=1)
    sent, _ = algorithm.contribute(update, task, {})
    assert [int(t.count_nonzero()) for t in sent.trees["delta"].values()] == [6, 4]
    sent.trees["delta"] = {name: torch.ones_like(t) for name, t in model.items()}
    assert [int(t.count_nonzero()) for t in algorithm.opened(sent, task).trees["delta"].values()] == [6, 4]
