"""Nothing of one client reaches the next; what a client keeps on purpose is what plain torch would have kept."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import spine_modules as zoo
import torch
from lightning.pytorch import Callback, LightningDataModule
from spine_zoo import (
    Classifier,
    assert_close,
    assert_same_bits,
    examples,
    fit_federated,
    fit_plain,
    loader,
    sites,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from fl_lightning.algorithms import FedAvg
from fl_lightning.data import IID, FederatedDataModule
from fl_lightning.errors import MisconfigurationException
from fl_lightning.schedules import Sampler


class Sticky(Classifier):
    """Keeps everything that a module can keep, and trains with it: any leak changes the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0
        self.losses: list[Tensor] = []
        self.table: dict[str, list[int]] = {"seen": []}
        self.array = np.zeros(2)
        self.schedule = [0.1 * k for k in range(1, 100)]
        self.metric = MeanMetric()
        self.hidden_metrics = {"in a dict": MeanMetric()}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("moving", torch.zeros(3), persistent=False)
        self.dropout = nn.Dropout(0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.counter += 1
        self.table["seen"].append(len(x))
        self.count += 1
        self.array += 1
        rate = self.schedule.pop(0)
        logits = self(self.dropout(x))
        self.moving = 0.9 * self.moving + 0.1 * logits.detach().mean(0)
        loss = F.cross_entropy(logits - self.moving, y)
        self.losses.append(loss.detach())
        self.metric.update(loss.detach())
        self.hidden_metrics["in a dict"].update(loss.detach())
        self.dropout.p = min(0.5, self.dropout.p + 0.05)
        self.new_attribute = getattr(self, "new_attribute", 0) + 1
        factor = (
            self.counter + len(self.table["seen"]) + float(self.count) + self.array.sum() + rate + self.new_attribute
            + float((torch.stack(self.losses).sum() + self.metric.compute()).detach())
            + float(self.hidden_metrics["in a dict"].compute().detach())
            + random.random() + np.random.rand()  # the global generators are a client's own
        )  # fmt: skip
        return loss * float(factor) * 0.01

    def on_train_epoch_end(self) -> None:
        self.net[0].bias.requires_grad_(False)  # stays frozen for this client only


class StickyCallback(Callback):
    """A callback with state, which scales gradients by it."""

    def __init__(self) -> None:
        self.calls = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls += 1
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad *= 1.0 + 0.1 * self.calls


class Only(Sampler):
    """The same cohort in every round."""

    def __init__(self, *ids: Any) -> None:
        self.ids = list(ids)

    def cohort(self, population: Any, size: int, seed: int, round: int) -> list[Any]:
        return self.ids


class Take(Callback):
    """Keeps what each client's training ended with, from inside the client."""

    ends: dict[int, dict[str, Tensor]] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends[len(trainer.train_dataloader.dataset)] = weights(pl_module)


@pytest.mark.parametrize("client_state", ["reset", "keep"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_client_after_another_is_that_client_alone(rounds: int, client_state: Any) -> None:
    ends = []
    start = Sticky()
    for cohort in (("s1", "s2", "s3"), ("s3",)):
        Take.ends = {}
        fit_federated(
            copy.deepcopy(start), sites(5), max_rounds=rounds, local_epochs=2, sampler=Only(*cohort), num_lanes=1,
            client_callbacks=[StickyCallback(), Take()], client_state=client_state, algorithm=still(),
        )  # fmt: skip
        ends.append(Take.ends[32])
    assert_same_bits(ends[0], ends[1])
    assert float((ends[0]["net.0.weight"] - start.net[0].weight.detach()).abs().max()) > 1e-3


def still() -> FedAvg:
    """A server that does not move, so that every round starts from the same weights."""
    return FedAvg(server_optimizer=lambda params: torch.optim.SGD(params, lr=0.0))


def test_every_part_of_the_sticky_module_matters() -> None:
    """The module of the test above notices a leak: a client that is trained twice in plain Lightning differs."""
    module = Sticky()
    again = copy.deepcopy(module)
    fit_plain(module, sites()["s3"], client="s3")
    start = {name: value.clone() for name, value in weights(again).items()}
    fit_plain(again, sites()["s1"], client="s1")
    again.load_state_dict(start)
    for parameter in again.parameters():
        parameter.requires_grad_(True)
    fit_plain(again, sites()["s3"], client="s3")
    assert not torch.equal(module.net[0].weight, again.net[0].weight)


def test_the_users_own_objects_are_untouched() -> None:
    module, callback = Sticky(), StickyCallback()
    random.seed(3)
    before = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(3)
    np.random.seed(0)
    torch.manual_seed(0)
    fit_federated(module, sites(3), max_rounds=2, client_callbacks=[callback])
    assert callback.calls == 0
    assert (module.counter, module.losses, module.table, len(module.schedule)) == (0, [], {"seen": []}, 99)
    assert module.dropout.p == 0.3
    assert not hasattr(module, "new_attribute")
    assert module.net[0].bias.requires_grad
    assert int(module.count) == 0
    assert before


def test_a_generator_given_to_a_loader_does_not_leak() -> None:
    ends = []
    start = Classifier()
    for cohort in (("a", "b"), ("b",)):
        Take.ends = {}
        generator = torch.Generator().manual_seed(1)  # one for both clients
        data = {
            k: DataLoader(examples(n, n), batch_size=4, shuffle=True, generator=generator)
            for k, n in (("a", 9), ("b", 13))
        }
        fit_federated(copy.deepcopy(start), data, sampler=Only(*cohort), client_callbacks=Take())
        ends.append(Take.ends[13])
    assert_same_bits(ends[0], ends[1])


# ---- client_state, overrides, schedules, against hand-written references --------------------------------------------


def _by_hand(start: nn.Module, clients: dict[str, Any], rounds: int, keep: bool, **options: Any) -> nn.Module:
    """FedAvg in plain torch with Adam and a StepLR on each client, whose state is kept or made anew."""
    net = copy.deepcopy(start)
    states: dict[str, tuple[Any, Any]] = {}
    epochs, lr, factor = options.get("epochs", {}), options.get("lr", {}), options.get("factor", lambda round: 1.0)
    for round in range(rounds):
        total, count = [torch.zeros_like(p) for p in net.parameters()], 0
        for name, data in clients.items():
            client = copy.deepcopy(net)
            rate = lr.get(name, 0.02)
            optimizer = torch.optim.Adam(client.parameters(), lr=rate)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            if keep and name in states:
                optimizer.load_state_dict(states[name][0])
                schedule.load_state_dict(states[name][1])
            for _ in range(epochs.get(name, 1)):
                for x, y in data:
                    base = [group["lr"] for group in optimizer.param_groups]
                    for group in optimizer.param_groups:
                        group["lr"] *= factor(round)
                    optimizer.zero_grad()
                    F.cross_entropy(client(x), y).backward()
                    optimizer.step()
                    for group, value in zip(optimizer.param_groups, base, strict=True):
                        group["lr"] = value
                schedule.step()
            states[name] = (copy.deepcopy(optimizer.state_dict()), copy.deepcopy(schedule.state_dict()))
            n = len(data.dataset)
            count += n
            for t, p, q in zip(total, client.parameters(), net.parameters(), strict=True):
                t += n * (p.detach() - q.detach())
        with torch.no_grad():
            for p, t in zip(net.parameters(), total, strict=True):
                p += t / count
    return net


class AdamStep(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "epochs": ({"client_overrides": {"s1": {"epochs": 3}}}, {"epochs": {"s1": 3}}),
    "lr": ({"client_overrides": {"s0": {"lr": 0.1}}}, {"lr": {"s0": 0.1}}),
    "schedule": ({"client_lr_schedule": lambda round: 0.5**round}, {"factor": lambda round: 0.5**round}),
    "schedule-and-lr": (
        {"client_lr_schedule": lambda round: 1.0 / (1 + round), "client_overrides": {"s2": {"lr": 0.05}}},
        {"factor": lambda round: 1.0 / (1 + round), "lr": {"s2": 0.05}},
    ),
}


@pytest.mark.parametrize("local_loop", ["lightning", "auto"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("keep", [False, True], ids=["reset", "keep"])
def test_client_state_and_overrides_by_hand(keep: bool, option: str, local_loop: str) -> None:
    arguments, by_hand = OPTIONS[option]
    module, clients = AdamStep(), sites(3, shuffle=False)
    expected = _by_hand(module.net, clients, 4, keep, **by_hand)
    fit_federated(
        module, clients, max_rounds=4, client_state="keep" if keep else "reset", local_loop=local_loop, **arguments
    )
    assert_close(weights(module.net), weights(expected), atol=2e-6)


def test_keep_and_reset_differ() -> None:
    module, clients = AdamStep(), sites(3, shuffle=False)
    kept, fresh = (weights(_by_hand(module.net, clients, 4, keep)) for keep in (True, False))
    assert max(float((kept[name] - fresh[name]).abs().max()) for name in kept) > 1e-3


@pytest.mark.parametrize("local_loop", ["lightning", "auto"])
def test_local_steps_count_optimizer_steps_over_several_passes(local_loop: str) -> None:
    module = Classifier()
    net = copy.deepcopy(module.net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = list(loader(20, shuffle=False))  # three batches, taken seven times
    for step in range(7):
        x, y = batches[step % 3]
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    trainer = fit_federated(module, {"a": loader(20, shuffle=False)}, local_steps=7, local_loop=local_loop)
    assert trainer.round_history[0].num_steps == 7
    assert_close(weights(module.net), weights(net))


class Pooled(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(48, batch_size=8)


def test_an_override_of_steps_and_of_batch_size() -> None:
    data = FederatedDataModule(Pooled(), IID(num_clients=3))
    trainer = fit_federated(Classifier(), data, client_overrides={0: {"steps": 5}, 1: {"batch_size": 16}})
    assert trainer.round_history[0].num_steps == 5 + 1 + 2  # of 16 examples: five steps, one batch, two batches


def test_an_override_of_batch_size_for_a_mapping_of_loaders() -> None:
    """The loader is built again with the other size; a client without an override keeps its own."""
    plain = fit_federated(Classifier(), {"a": loader(20, batch_size=4), "b": loader(20)})
    changed = fit_federated(Classifier(), {"a": loader(20), "b": loader(20)}, client_overrides={"a": {"batch_size": 4}})
    assert changed.round_history[0].num_steps == plain.round_history[0].num_steps


def test_a_population_that_becomes_smaller_than_a_cohort_goes_on_with_those_who_stay() -> None:
    clients = sites(3)

    class Leaves(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            clients.pop("s1", None)

    trainer = fit_federated(Classifier(), clients, max_rounds=2, clients_per_round=3, callbacks=[Leaves()])
    assert [report.cohort for report in trainer.round_history] == [["s0", "s1", "s2"], ["s0", "s2"]]


def test_an_override_by_a_function_reaches_a_client_that_joins_later() -> None:
    clients = sites(2)

    class Joins(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            clients["new"] = loader(20)

    trainer = fit_federated(
        Classifier(), clients, max_rounds=2, callbacks=[Joins()],
        client_overrides=lambda client_id: {"steps": 7} if client_id == "new" else {"steps": 1},
    )  # fmt: skip
    assert [report.num_steps for report in trainer.round_history] == [2, 2 + 7]


def test_an_override_of_batch_size_needs_a_loader_that_can_be_built_again() -> None:
    with pytest.raises(MisconfigurationException, match=r"loader is a list that cannot be built again"):
        fit_federated(Classifier(), {"a": list(loader(8))}, client_overrides={"a": {"batch_size": 4}})


def test_onecycle_of_the_demo_zoo_starts_anew_each_round() -> None:
    """A schedule with a fixed number of steps runs in full in every round when clients forget."""
    trainer = fit_federated(zoo.OneCycle(), sites(2), max_rounds=3)
    assert [report.num_steps for report in trainer.round_history] == [5, 5, 5]
