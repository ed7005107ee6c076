"""Clients of different width against really narrow networks in plain torch, and against FedAvg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import BufferedHeteroFL, DeviceFleet, FedAvg, FedBuff, FederatedTrainer, HeteroFL
from fl_lightning.algorithms.heterofl import kept_lengths
from fl_lightning.devices import AdaptiveWidth, DeviceBuffer, DeviceRounds
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import Arrival, Contribution

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "log_clients": False, "num_threads": 1,
}  # fmt: skip
LR = 0.2


def mlp(width: float = 1.0, activation: Callable[[], nn.Module] = nn.Sigmoid) -> nn.Sequential:
    """Return a network whose activation is not zero at zero, so that the zeros outside have to be harmless."""
    one, two = round(8 * width), round(6 * width)
    return nn.Sequential(nn.Linear(5, one), activation(), nn.Linear(one, two), activation(), nn.Linear(two, 3))


def cnn(width: float = 1.0) -> nn.Sequential:
    one, two = round(4 * width), round(6 * width)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, one, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(one, two, 2), nn.Tanh(), nn.Flatten(), nn.Linear(two, 3),
    )  # fmt: skip


class Net(pl.LightningModule):
    def __init__(self, net: nn.Module, momentum: float = 0.9) -> None:
        super().__init__()
        self.net, self.momentum = net, momentum

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=self.momentum, weight_decay=0.01)


def data(size: int = 5) -> dict[str, DataLoader[Any]]:
    draw = torch.Generator().manual_seed(0)
    sets = {
        name: TensorDataset(torch.randn(n, size, generator=draw), torch.randint(3, (n,), generator=draw))
        for name, n in (("a", 12), ("b", 12), ("c", 24))
    }
    return {name: DataLoader(own, batch_size=6) for name, own in sets.items()}


def fit(net: nn.Module, algorithm: Any = None, size: int = 5, **arguments: Any) -> dict[str, Tensor]:
    pl.seed_everything(1, verbose=False)
    trainer = FederatedTrainer(algorithm=algorithm or HeteroFL(), **{"max_rounds": 2, **QUIET, **arguments})
    trainer.fit(Net(net), data(size))
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def by_hand(make: Callable[[float], nn.Sequential], start: nn.Module, widths: dict[str, float], size: int) -> Any:
    """Return the model after a round in which every client trains a network that really has its width."""
    whole = {name: tensor.detach().clone() for name, tensor in start.state_dict().items()}
    sums = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for name, loader in data(size).items():
        narrow = make(widths[name])
        where = {n: tuple(slice(length) for length in t.shape) for n, t in narrow.state_dict().items()}
        narrow.load_state_dict({n: whole[n][own] for n, own in where.items()})
        optimizer = torch.optim.SGD(narrow.parameters(), lr=LR, momentum=0.9, weight_decay=0.01)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(narrow(x), y).backward()
            optimizer.step()
        examples = len(loader.dataset)  # type: ignore[arg-type]
        for n, own in where.items():
            sums[n][own] += examples * (narrow.state_dict()[n] - whole[n][own])
            weights[n][own] += examples
    return {n: whole[n] + torch.where(weights[n] > 0, sums[n] / weights[n], 0.0) for n in whole}


@pytest.mark.parametrize("loop", ["lean", "lightning"])
@pytest.mark.parametrize(("make", "size"), [(mlp, 5), (cnn, 16)], ids=["mlp", "cnn"])
@pytest.mark.parametrize("widths", [{"a": 0.5, "b": 1.0, "c": 0.5}, {"a": 0.5, "b": 0.5, "c": 0.5}])
def test_a_round_is_that_of_networks_which_are_really_narrow(
    make: Any, size: int, widths: dict[str, float], loop: str
) -> None:
    torch.manual_seed(0)
    net = make()
    expected = by_hand(make, net, widths, size)
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    overrides = {name: {"width": width} for name, width in widths.items()}
    found = fit(net, size=size, max_rounds=1, client_overrides=overrides, local_loop=loop)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-5)
    alone = all(width == 0.5 for width in widths.values())
    assert any(bool((found[n] == before[n]).any()) for n in before) == alone  # what nobody holds stays


def test_with_everyone_at_full_width_it_is_fedavg_to_the_bit() -> None:
    results = []
    for algorithm in (HeteroFL(), FedAvg()):
        torch.manual_seed(0)
        results.append(fit(mlp(), algorithm))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_buffer_of_everyone_is_heterofl_and_one_of_whole_models_is_fedbuff() -> None:
    overrides = {"a": {"width": 0.5}, "c": {"width": 0.25}}
    work = {"local_epochs": None, "local_steps": 2}  # equally long for everyone
    steps, buffered = {"client_overrides": overrides, **work}, BufferedHeteroFL(3, 3)
    for algorithms, arguments in (
        ((buffered, HeteroFL()), steps),
        ((BufferedHeteroFL(2, 3), FedBuff(2, 3)), {"max_rounds": 4}),
    ):
        results = []
        for algorithm in algorithms:
            torch.manual_seed(0)
            results.append(fit(mlp(), algorithm, **arguments))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    torch.manual_seed(0)
    whole = fit(mlp(), BufferedHeteroFL(3, 3), **work)
    assert any(not torch.equal(results[0][name], whole[name]) for name in whole)


def test_in_a_buffer_the_discount_shortens_the_step_of_each_entry() -> None:
    """Three numbers by hand: a stale update of the whole model, weight 1, and a fresh narrow one, weight 3."""
    algorithm = BufferedHeteroFL(2, server_lr=1.0)
    shapes = {"a.weight": (2, 1), "b.weight": (1, 2)}
    old = Contribution({"delta": {n: torch.full(s, 8.0) for n, s in shapes.items()}}, {"weight": 1.0, "width 1.0": 1.0})
    new = {"a.weight": torch.tensor([[6.0], [0.0]]), "b.weight": torch.tensor([[6.0, 0.0]])}
    fresh = Contribution({"delta": new}, {"weight": 3.0, "width 0.5": 3.0})
    stale = algorithm.receive(old, Arrival(staleness=3))  # halved
    delta = {n: stale.trees["delta"][n] + new[n] for n in shapes}
    total = Contribution({"delta": delta}, {"weight": 4.0, "width 1.0": 1.0, "width 0.5": 3.0})
    gradient, _ = algorithm.apply(total, {}, 2)
    # entries of both: (4 + 6) / 4; those of the whole model alone: 4 / 1
    assert algorithm.receive(fresh, Arrival(staleness=0)) is fresh
    assert gradient["a.weight"].flatten().tolist() == [-2.5, -4.0]
    assert gradient["b.weight"].flatten().tolist() == [-2.5, -4.0]


def test_narrow_models_of_small_devices_arrive_earlier_in_a_buffer() -> None:
    memory = {"a": 8.0, "b": 3.0, "c": 1.0}
    fleet = DeviceFleet(memory_gb=memory.__getitem__)
    pl.seed_everything(1, verbose=False)
    arguments = {"algorithm": BufferedHeteroFL(1, 3), "max_rounds": 5, "fleet": fleet, "local_steps": 4, **QUIET}
    policies = DeviceBuffer(policies=[AdaptiveWidth(memory_gb=6.0, smallest=0.25)])
    trainer = FederatedTrainer(schedule=policies, **arguments)
    trainer.fit(Net(mlp()), data())
    reports = trainer.round_history
    # four steps take "c" a sixteenth of four seconds and "b" a quarter of them
    assert [(r.cohort, r.metrics["simulated_seconds"]) for r in reports] == [
        (["c"], 0.25), (["c"], 0.5), (["c"], 0.75), (["b"], 1.0), (["c"], 1.0),
    ]  # fmt: skip


def test_a_policy_gives_small_devices_a_narrow_model_and_less_time() -> None:
    memory = {"a": 8.0, "b": 3.0, "c": 1.0}
    fleet = DeviceFleet(memory_gb=lambda client_id: memory[client_id])
    torch.manual_seed(0)
    net = mlp()
    expected = by_hand(mlp, net, {"a": 1.0, "b": 0.5, "c": 0.5}, 5)
    rounds = DeviceRounds(policies=[AdaptiveWidth(memory_gb=6.0, smallest=0.5)])
    pl.seed_everything(1, verbose=False)
    trainer = FederatedTrainer(algorithm=HeteroFL(), max_rounds=1, fleet=fleet, schedule=rounds, **QUIET)
    trainer.fit(Net(net), data())
    for name, value in expected.items():
        torch.testing.assert_close(net.state_dict()[name], value, atol=2e-6, rtol=1e-5)
    # "c" has four steps of a quarter of a second each, "a" two whole ones
    assert trainer.round_history[0].metrics["simulated_seconds"] == pytest.approx(2.0)
    work = AdaptiveWidth(6.0).adapt
    from fl_lightning.devices import Circumstances
    from fl_lightning.types import Work

    widths = [
        work(Work(), Circumstances("a", 1.0, False, 1, 1.0, 1.0, 9.0, memory_gb=gb)).width for gb in (6, 5.9, 1, 0.1)
    ]
    assert widths == [1.0, 0.5, 0.125, 0.0625]


def test_lengths_follow_from_layer_to_layer() -> None:
    shapes = {name: tuple(t.shape) for name, t in cnn().named_parameters()}
    assert kept_lengths(shapes, 0.25) == {
        "1.weight": (1, 1, 3, 3), "1.bias": (1,), "4.weight": (2, 1, 2, 2), "4.bias": (2,), "7.weight": (3, 2),
        "7.bias": (3,),
    }  # fmt: skip
    flattened = {"0.weight": (6, 1, 3, 3), "2.weight": (10, 24), "3.weight": (2, 10)}
    assert kept_lengths(flattened, 0.4) == {"0.weight": (3, 1, 3, 3), "2.weight": (4, 12), "3.weight": (2, 4)}


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
            r"cannot cut 'net\.1\.weight' of shape \(8,\): it belongs to no linear or convolution layer",
        ),
        (nn.Sequential(nn.Linear(5, 8), nn.PReLU(), nn.Linear(8, 3)), r"cannot cut 'net\.1\.weight'"),
        (
            nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 3)).append(
                nn.Linear(3, 3)
            ),
            None,
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(net: nn.Module, message: str | None) -> None:
    overrides = {"a": {"width": 0.5}}
    if message is None:
        assert fit(net, client_overrides=overrides)
        return
    with pytest.raises(MisconfigurationException, match=message):
        fit(net, client_overrides=overrides)


def test_who_asks_for_widths_is_told_what_has_them() -> None:
    overrides = {"a": {"width": 0.5}}
    with pytest.raises(MisconfigurationException, match=r"FedAvg sums whole models.*Use algorithm=HeteroFL\(\)"):
        fit(mlp(), FedAvg(), client_overrides=overrides)
    with pytest.raises(
        MisconfigurationException,
        match=r"FedBuff sums whole models.*Use algorithm=BufferedHeteroFL\(\.\.\.\), or leave",
    ):
        fit(mlp(), FedBuff(1, concurrency=1), client_overrides={name: {"width": 0.5} for name in "abc"})
    with pytest.raises(MisconfigurationException, match=r"\['width'\] in \(0, 1\], got 1\.5"):
        fit(mlp(), client_overrides={"a": {"width": 1.5}})
    with pytest.raises(MisconfigurationException, match=r"takes 9 inputs, and the layer before it has 8 outputs"):
        kept_lengths({"a.weight": (8, 5), "b.weight": (3, 9)}, 0.5)
    with pytest.raises(MisconfigurationException, match=r"takes 8 inputs, and the layer before it has 2 outputs"):
        kept_lengths({"a.weight": (8, 5), "b.weight": (2, 8), "c.weight": (4, 8)}, 0.5)  # no multiple: nothing flattens
    for bad in ({"memory_gb": 0.0}, {"memory_gb": 6.0, "smallest": 0.0}, {"memory_gb": float("inf")}):
        with pytest.raises(MisconfigurationException, match="AdaptiveWidth expected memory_gb > 0 and smallest"):
            AdaptiveWidth(**bad)
