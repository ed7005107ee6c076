"""FedPer and Ditto: what stays with a client, and what the others see of it."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import Net, clients, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import OPTIMA, Quadratic, client, parabola, quiet_trainer, trajectory
from torch import Tensor, nn

from fl_lightning.algorithms import Ditto, FedAvg, FedPer
from fl_lightning.schedules import FixedSampler


class Memories(pl.Callback):
    """Reads what clients keep, while the store is open."""

    def __init__(self, ids: list[Any]) -> None:
        self.ids = ids
        self.rounds: list[dict[Any, Any]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        store = trainer.federated_fit.federation.store
        self.rounds.append({client_id: store.get(client_id) for client_id in self.ids})


class Shifted(pl.LightningModule):
    """Two numbers of which only the sum matters: x is shared, y is the client's own."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.y = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h, linear, constant = batch[0].unbind(-1)
        z = self.x + self.y
        return (h / 2 * z**2 - linear * z + constant).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_fedper_shares_one_part_and_remembers_the_other() -> None:
    data = {name: client(parabola(1.0, e), 2) for name, e in zip("abc", OPTIMA, strict=True)}
    x, own = 0.0, [0.5, 0.5, 0.5]
    expected = []
    for _ in range(3):
        moves = []
        for k, e in enumerate(OPTIMA):
            local, mine = x, own[k]
            for _ in range(2):
                slope = local + mine - e
                local, mine = local - 0.1 * slope, mine - 0.1 * slope
            own[k] = mine
            moves.append(local - x)
        x += sum(moves) / 3
        expected.append((x, *own))
    memories = Memories(["a", "b", "c"])
    module = Shifted()
    values = trajectory_of(module, FedPer(["y"], weights="uniform"), data, memories)
    for round, numbers in enumerate(expected):
        kept = [memories.rounds[round][name]["local"]["y"].item() for name in "abc"]
        assert (values[round], *kept) == pytest.approx(numbers, abs=1e-12)
    assert module.y.item() == 0.5  # the server's own copy is nobody's


def trajectory_of(module: Shifted, algorithm: Any, data: Any, *callbacks: pl.Callback) -> list[float]:
    values: list[float] = []

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            values.append(pl_module.x.item())

    quiet_trainer(algorithm=algorithm, max_rounds=3, callbacks=[Record(), *callbacks]).fit(module, data)
    return values


def test_personal_layers_do_not_travel() -> None:
    whole = quiet_trainer(algorithm=FedAvg(), max_rounds=1)
    whole.fit(Net(), clients())
    part = quiet_trainer(algorithm=FedPer(["head.*"]), max_rounds=1)
    part.fit(Net(), clients())
    head = 4 * (8 * 3 + 3) * 3  # float32, in the payloads of three clients
    saved = whole.round_history[0].num_bytes_up - part.round_history[0].num_bytes_up
    assert head <= saved <= head + 3 * 300  # with the names and shapes of two tensors in each payload's header


def test_ditto_without_a_pull_is_local_training_to_the_bit() -> None:
    data, rounds = clients(batch_size=50), 3  # one batch, so that no shuffling draws numbers
    module = Net(momentum=0.5)
    expected = {}
    for name, loader in data.items():
        local = copy.deepcopy(module)
        for _ in range(rounds):
            optimizer = local.configure_optimizers()  # a round starts with a new optimizer
            for _ in range(2):
                optimizer.zero_grad()
                for batch in loader:
                    order = torch.tensor(sorted(range(len(batch[1])), key=lambda i: batch[0][i].tolist()))
                    local.loss([tensor[order] for tensor in batch]).backward()
                optimizer.step()
        expected[name] = weights(local)
    memories = Memories(list(data))
    trainer = quiet_trainer(algorithm=Ditto(lam=0.0), max_rounds=rounds, local_epochs=2, callbacks=[memories])

    class Sorted(Net):
        def loss(self, batch: Any) -> Tensor:
            order = torch.tensor(sorted(range(len(batch[1])), key=lambda i: batch[0][i].tolist()))
            return super().loss([tensor[order] for tensor in batch])

    personal = Sorted(momentum=0.5)
    personal.load_state_dict(module.state_dict())
    trainer.fit(personal, data)
    for name, state in expected.items():
        kept = memories.rounds[-1][name]["personal"]
        assert all(torch.equal(kept[key], state[key]) for key in state), name


@pytest.mark.parametrize("lam", [0.5, 4.0])
def test_ditto_ends_between_the_client_and_the_global_model(lam: float) -> None:
    """At the end v = (e + lam w) / (1 + lam), and the global model is FedAvg's."""
    data = {name: client(parabola(1.0, e), 25) for name, e in zip("abc", OPTIMA, strict=True)}
    memories = Memories(["a", "b", "c"])
    algorithm, module = Ditto(lam, weights="uniform"), Quadratic(lr=0.3)
    quiet_trainer(algorithm=algorithm, max_rounds=4, callbacks=[memories]).fit(module, data)
    assert trajectory(FedAvg(weights="uniform"), data, 4, Quadratic(lr=0.3))[-1] == module.x.item()
    before = trajectory(FedAvg(weights="uniform"), data, 3, Quadratic(lr=0.3))[-1]
    for name, e in zip("abc", OPTIMA, strict=True):
        kept = memories.rounds[-1][name]["personal"]["x"].item()
        assert kept == pytest.approx((e + lam * before) / (1 + lam), abs=1e-5)


def test_ditto_gives_the_personal_model_its_own_number_of_epochs() -> None:
    data = {"a": client(parabola(1.0, 1.0))}
    memories = Memories(["a"])
    quiet_trainer(algorithm=Ditto(0.0, personal_epochs=5), max_rounds=1, callbacks=[memories]).fit(
        Quadratic(lr=0.1), data
    )
    assert memories.rounds[0]["a"]["personal"]["x"].item() == pytest.approx(1 - 0.9**5)


def test_patterns_must_match_something() -> None:
    trainer = quiet_trainer(algorithm=FedPer(["tail.*"]), max_rounds=1)
    with pytest.raises(MisconfigurationException, match=r"'tail.\*' matches no parameter of Net\. .*body.weight"):
        trainer.fit(Net(), clients())
    with pytest.raises(MisconfigurationException, match=r"got none. Write FedPer\(\['head.\*'\]\)"):
        FedPer([])
    with pytest.raises(MisconfigurationException, match="no trainable parameter that travels"):
        quiet_trainer(algorithm=FedPer(["*"]), max_rounds=1).fit(Net(), clients())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ditto(lam=-0.1), "Ditto expected lam to be a finite number >= 0, got -0.1; lam=0 trains"),
        (lambda: Ditto(personal_epochs=0), "personal_epochs to be an integer >= 1, or None"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_own_layers_are_trained_in_groups_as_one_by_one() -> None:
    """Each client starts from the head that it remembers: two of five come for the first time in the second round."""

    class Groups(pl.Callback):
        reasons: list[str | None] = []

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            together = trainer.federated_fit.federation.engine.client_half.loop.together
            self.reasons.append(together.reason or together.trouble)

    data, ids = clients((12, 12, 12, 8, 8)), [f"site-{k}" for k in range(5)]
    start, found = Net(momentum=0.9), []
    cohorts = FixedSampler([ids[:3], ids, ids[1:]])
    for group_size in (1, 5):
        module, memories = copy.deepcopy(start), Memories(ids)
        pl.seed_everything(5, verbose=False)
        quiet_trainer(
            algorithm=FedPer(["head.*"]), max_rounds=3, sampler=cohorts, local_loop="lean", group_size=group_size,
            num_lanes=1, callbacks=[memories, Groups()], local_epochs=2,
        ).fit(module, data)  # fmt: skip
        found.append((weights(module), memories.rounds))
    assert Groups.reasons[1] is None
    (alone, kept), (group, kept_in_group) = found
    assert all(torch.allclose(alone[name], group[name], atol=1e-5) for name in alone)
    assert any(not torch.equal(alone[name], group[name]) for name in alone), "to the bit the same: was there a group?"
    for one, other in zip(kept, kept_in_group, strict=True):
        for client_id in ids:
            assert one[client_id].keys() == other[client_id].keys()
            for name, value in one[client_id].get("local", {}).items():
                assert torch.allclose(value, other[client_id]["local"][name], atol=1e-5)
    heads = [kept_in_group[-1][client_id]["local"]["head.weight"] for client_id in ids]
    assert all(not torch.equal(heads[0], head) for head in heads[1:])
    assert all(head.untyped_storage().nbytes() == head.numel() * 4 for head in heads), "one head keeps a whole group"


def test_an_own_layer_that_is_not_trained_is_no_reason_to_fail() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head.bias.requires_grad_(False)

    start = Frozen()
    found = []
    for group_size in (1, 5):
        module = copy.deepcopy(start)
        pl.seed_everything(5, verbose=False)
        quiet_trainer(
            algorithm=FedPer(["head.*"]), max_rounds=2, local_loop="lean", group_size=group_size, num_lanes=1
        ).fit(module, clients())
        found.append(weights(module))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])
