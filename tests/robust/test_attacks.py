"""Attacks do what their formulas say, to the attackers only; FedAvg breaks and robust rules hold."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from robust_zoo import Net, clients, cohort_of, identical, joined, quiet_trainer, train, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import IID, Dirichlet, FederatedDataModule
from fl_lightning.algorithms import AFL, Algorithm, FedAvg, MimeLite, Scaffold
from fl_lightning.algorithms.fltrust import FLTrust
from fl_lightning.algorithms.robust import (
    ALittleIsEnough,
    Cohort,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
)
from fl_lightning.algorithms.robust.base import RobustAlgorithm
from fl_lightning.algorithms.robust.little import little_z
from fl_lightning.callbacks.attacks import LabelFlip, LittleIsEnough, ModelReplacement, NoiseAttack, SignFlip
from fl_lightning.data import DigitsDataModule
from fl_lightning.types import Contribution

ATTACKER = "site-1"


class Spy(RobustAlgorithm):
    """Keeps what every client sent in the first round and takes one step of nothing."""

    sent: dict[Any, dict[str, Tensor]]

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        self.sent = {c: dict(s.trees["delta"]) for c, s in zip(cohort.client_ids, cohort._contributions, strict=True)}
        return cohort.mixture("delta", torch.zeros(len(cohort)))


def sent(attacks: list[Any], data: Any = None, loop: Any = "auto") -> dict[Any, dict[str, Tensor]]:
    torch.manual_seed(1)
    spy = Spy()
    train(spy, Net(), data, max_rounds=1, client_callbacks=attacks, local_loop=loop)
    return spy.sent


@pytest.mark.parametrize("loop", ["lean", "lightning"])
@pytest.mark.parametrize(
    ("attack", "factor"),
    [(SignFlip([ATTACKER], 3.0), -3.0), (ModelReplacement([ATTACKER], 7.0), 7.0), (NoiseAttack([ATTACKER], 0.0), 0.0)],
    ids=lambda value: type(value).__name__,
)
def test_an_update_is_scaled_at_the_attacker_only(attack: Any, factor: float, loop: str) -> None:
    honest, attacked = sent([], loop=loop), sent([attack], loop=loop)
    for client_id, delta in honest.items():
        if client_id != ATTACKER:
            assert identical(attacked[client_id], delta)
    for name, delta in honest[ATTACKER].items():
        assert torch.allclose(attacked[ATTACKER][name], factor * delta, rtol=1e-4, atol=1e-6)


def test_noise_is_of_the_size_that_was_asked_and_new_for_each_client() -> None:
    attacked = sent([NoiseAttack([ATTACKER, "site-3"], std=5.0)])
    noise = torch.cat([value.reshape(-1) for value in attacked[ATTACKER].values()])
    other = torch.cat([value.reshape(-1) for value in attacked["site-3"].values()])
    assert 4 < float(noise.std()) < 6
    assert abs(float(noise.mean())) < 2
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.4
    assert identical(sent([NoiseAttack([ATTACKER], std=5.0)])[ATTACKER], attacked[ATTACKER])


def test_added_noise_keeps_the_honest_update() -> None:
    honest, noise = sent([]), sent([NoiseAttack([ATTACKER], std=0.1)])
    added = sent([NoiseAttack([ATTACKER], std=0.1, add=True)])
    for name, delta in honest[ATTACKER].items():
        assert torch.allclose(added[ATTACKER][name], delta + noise[ATTACKER][name], atol=1e-5)


@pytest.mark.parametrize("loop", ["lean", "lightning"])
@pytest.mark.parametrize("flip", [LabelFlip([ATTACKER], 3), LabelFlip([ATTACKER], mapping={0: 2, 2: 1})])
def test_flipped_labels_are_training_on_other_labels_to_the_bit(flip: LabelFlip, loop: str) -> None:
    data, poisoned = clients(), clients()
    x, y = poisoned[ATTACKER].dataset.tensors
    wrong = torch.tensor([2, 1, 0])[y] if flip.num_classes else torch.tensor([2, 1, 1])[y]
    poisoned[ATTACKER] = DataLoader(TensorDataset(x, wrong), batch_size=4, shuffle=True)
    before = y.clone()
    attacked, expected = sent([flip], data, loop), sent([], poisoned, loop)
    assert all(identical(attacked[c], expected[c]) for c in expected)
    assert torch.equal(data[ATTACKER].dataset.tensors[1], before)
    assert not identical(attacked[ATTACKER], sent([], loop=loop)[ATTACKER])


def in_groups(attacks: list[Any], **arguments: Any) -> tuple[dict[Any, dict[str, Tensor]], str | None]:
    """Return what clients of one lane sent, and why they did not train in groups."""
    why: list[str | None] = []

    class Reason(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            together = trainer.federated_fit.federation.engine.client_half.loop.together
            why.append(together.reason or together.trouble)

    torch.manual_seed(1)
    spy = Spy()
    data = clients((8, 8, 8, 8, 8), shuffle=False)
    groups = {"local_loop": "lean", "group_size": 5, **arguments}
    train(spy, Net(), data, max_rounds=1, client_callbacks=attacks, num_lanes=1, callbacks=[Reason()], **groups)
    return spy.sent, why[0]


@pytest.mark.parametrize("choice", [{}, {"local_loop": "auto", "group_size": "auto"}], ids=["five", "auto"])
@pytest.mark.parametrize(
    "attacks",
    [
        [SignFlip([ATTACKER], 3.0)],
        [LabelFlip([ATTACKER], 3)],
        [LabelFlip([ATTACKER], mapping={0: 2}), ModelReplacement([ATTACKER], 5.0)],
        [NoiseAttack([ATTACKER], 2.0, add=True)],
    ],
    ids=["sign", "labels", "backdoor", "noise"],
)
def test_in_groups_honest_clients_keep_their_bits_and_attackers_send_what_they_send_alone(
    attacks: list[Any], choice: dict[str, Any]
) -> None:
    (honest, no_reason), (attacked, reason) = in_groups([], **choice), in_groups(attacks, **choice)
    alone, _ = in_groups(attacks, local_loop="lean", group_size=1)
    assert no_reason is reason is None
    assert any(not identical(honest[c], alone[c]) for c in honest if c != ATTACKER), "was there a group?"
    for client_id, delta in honest.items():
        if client_id != ATTACKER:
            assert identical(attacked[client_id], delta)
    assert not identical(attacked[ATTACKER], honest[ATTACKER])
    for name, delta in alone[ATTACKER].items():
        assert torch.allclose(attacked[ATTACKER][name], delta, rtol=1e-4, atol=1e-5)


def test_an_attack_with_hooks_of_its_own_trains_one_by_one() -> None:
    class Late(SignFlip):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            """Something that a group does not know."""

    class Own(SignFlip):
        def forged(self, delta: Any, task: Any) -> Any:
            return {name: 0 * tensor for name, tensor in delta.items()}

    assert in_groups([Late([ATTACKER])])[1] == "the callback Late sees one client"
    sent, reason = in_groups([Own([ATTACKER])])
    assert reason is None
    assert all(not tensor.any() for tensor in sent[ATTACKER].values())


@pytest.mark.parametrize("loop", ["lean", "lightning"])
@pytest.mark.parametrize(
    "make", [lambda: AFL(0.2), lambda: MimeLite(0.5), lambda: Scaffold("I")], ids=["AFL", "Mime", "I"]
)
def test_flipped_labels_are_in_the_loss_and_the_gradient_at_the_start_too(make: Any, loop: str) -> None:
    data, poisoned = clients(), clients()
    x, y = poisoned[ATTACKER].dataset.tensors
    poisoned[ATTACKER] = DataLoader(TensorDataset(x, 2 - y), batch_size=4, shuffle=True)
    start, found = Net(), []
    for own, attacks in ((data, [LabelFlip([ATTACKER], 3)]), (poisoned, []), (data, [])):
        module = Net()
        module.load_state_dict(start.state_dict())
        train(make(), module, own, max_rounds=2, client_callbacks=attacks, local_loop=loop)
        found.append(weights(module))
    assert identical(found[0], found[1])
    assert not identical(found[0], found[2])
    assert torch.equal(data[ATTACKER].dataset.tensors[1], y)


def test_attacks_can_be_combined() -> None:
    flipped = sent([LabelFlip([ATTACKER], 3)])
    boosted = sent([LabelFlip([ATTACKER], 3), ModelReplacement([ATTACKER], 5.0)])
    for name, delta in flipped[ATTACKER].items():
        assert torch.allclose(boosted[ATTACKER][name], 5 * delta, rtol=1e-4, atol=1e-6)


def test_in_a_plain_trainer_an_attack_does_nothing() -> None:
    module, other = Net(), Net()
    other.load_state_dict(module.state_dict())
    before = weights(module)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    attacks: list[pl.Callback] = [SignFlip(["a"]), LabelFlip(["a"], 3), NoiseAttack(["a"], 5.0)]
    for net, callbacks in ((module, attacks), (other, [])):
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **quiet)
        trainer.fit(net, clients(shuffle=False)["site-0"])
    assert identical(weights(module), weights(other))
    assert not identical(weights(module), before)


class Digits(pl.LightningModule):
    """Logs nothing: many small federations are trained here."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


@pytest.fixture(scope="module")
def digits() -> FederatedDataModule:
    data = FederatedDataModule(DigitsDataModule(batch_size=32), IID(num_clients=10))
    data.setup("fit")
    return data


def accuracy(algorithm: Algorithm, attacks: list[Any], digits: FederatedDataModule) -> float:
    pl.seed_everything(3, verbose=False)
    module = Digits()
    loaders = {client_id: digits.client_dataloader(client_id) for client_id in digits.client_ids()}
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=8, local_epochs=2, client_callbacks=attacks)
    trainer.fit(module, loaders)
    images, labels = next(iter(DataLoader(digits.val_dataloader().dataset, batch_size=1000)))
    with torch.no_grad():
        return float((module.net(images).argmax(1) == labels).float().mean())


ATTACKS: dict[str, list[Any]] = {
    "sign flip": [SignFlip([3, 8], 10.0)],
    "noise": [NoiseAttack([3, 8], 20.0)],
    "backdoor": [LabelFlip([3, 8], 10), ModelReplacement([3, 8], 10.0)],
}
HOLD: list[Algorithm] = [
    CoordinateMedian(2),
    TrimmedMean(0.2),
    GeometricMedian(2),
    Krum(2),
    MultiKrum(2),
    FLTrust(DigitsDataModule(batch_size=32), num_examples=100),
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_mean_breaks(attack: str, digits: FederatedDataModule) -> None:
    assert accuracy(FedAvg(), [], digits) > 0.85
    assert accuracy(FedAvg(), ATTACKS[attack], digits) < 0.4


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", HOLD, ids=lambda rule: type(rule).__name__)
def test_a_robust_rule_holds(rule: Algorithm, attack: str, digits: FederatedDataModule) -> None:
    assert accuracy(rule, ATTACKS[attack], digits) > 0.8


def test_clipping_holds_against_noise_and_weakens_model_replacement(digits: FederatedDataModule) -> None:
    assert accuracy(NormClipping(1.5), ATTACKS["noise"], digits) > 0.8
    assert accuracy(NormClipping(1.5), ATTACKS["backdoor"], digits) > 0.7


def test_fltrust_survives_a_majority_and_the_median_does_not(digits: FederatedDataModule) -> None:
    attack = [SignFlip(list(range(6)), 10.0)]
    assert accuracy(FLTrust(DigitsDataModule(batch_size=32), num_examples=100), attack, digits) > 0.8
    assert accuracy(CoordinateMedian(), attack, digits) < 0.4


def test_a_little_is_enough_gets_past_the_median() -> None:
    """Four of ten, among unlike clients: the shift is counted in standard deviations of the honest updates, which are
    large here. Among clients that are alike it is small, and costs a few points only."""
    unlike = FederatedDataModule(DigitsDataModule(batch_size=32), Dirichlet(num_clients=10, alpha=1.0))
    unlike.setup("fit")
    clean = accuracy(CoordinateMedian(4), [], unlike)
    attacked = accuracy(ALittleIsEnough(CoordinateMedian(4), [1, 3, 6, 8], z=1.5), [], unlike)
    assert clean > 0.7
    assert attacked < clean - 0.15


def test_krum_prefers_attackers_that_stay_inside_the_spread() -> None:
    """Distances do not give them away: what Krum takes is the attackers' update, in every coordinate."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(11, 200))
    attack = ALittleIsEnough(Krum(4), [f"c{k:03d}" for k in range(4)], z=0.5)
    gradient, _ = attack.combine(cohort_of(rows), {}, num_clients=11)
    assert joined(gradient) == pytest.approx(-(rows.mean(0) - 0.5 * rows.std(0)))


@pytest.mark.parametrize("omniscient", [True, False])
def test_colluders_know_each_other_or_everyone_but_nobody_without_weight(omniscient: bool) -> None:
    """FedAvg of four by hand, one of weight 0: what it has trained is nowhere in what the others send."""
    sent = [
        Contribution({"delta": {"w": torch.tensor([weight * x])}}, {"weight": weight})
        for x, weight in ((1.0, 2.0), (7.0, 1.0), (4.0, 3.0), (1e9, 0.0))
    ]
    attack = ALittleIsEnough(FedAvg(), clients=["a", "b", "d"], z=2.0, omniscient=omniscient)
    gradient, _ = attack.combine(Cohort("abcd", sent), {}, num_clients=4)
    known = np.array([1.0, 7.0, 4.0] if omniscient else [1.0, 7.0])
    lie = known.mean() - 2 * known.std()
    assert gradient["w"].item() == pytest.approx(-(3 * lie + 3 * 4.0) / 6, rel=1e-6)


def test_the_default_shift_counts_those_who_have_a_weight() -> None:
    votes = [1.0] * 10 + [0.0]
    sent = [Contribution({"delta": {"w": torch.tensor([w * k])}}, {"weight": w}) for k, w in enumerate(votes)]
    ids, found = [f"c{k}" for k in range(11)], []
    for z in (None, little_z(10, 4), little_z(11, 4)):
        attack = ALittleIsEnough(FedAvg(), clients=ids[:4], z=z)
        found.append(attack.combine(Cohort(ids, sent), {}, num_clients=11)[0]["w"].item())
    assert found[0] == found[1] != found[2]


def test_the_default_shift_is_the_papers() -> None:
    # n = 50, m = 24: s = 26 - 24 = 2 of 26 honest workers; Φ⁻¹(24 / 26) from a table of the normal distribution
    assert little_z(50, 24) == pytest.approx(1.4261, abs=1e-4)
    assert little_z(10, 2) == 0.0
    assert np.isfinite(little_z(10, 6))
    assert little_z(3, 3) == 0.0
    assert little_z(10, 4) > 0


@pytest.mark.parametrize("loop", ["lightning", "lean"])
@pytest.mark.parametrize("algorithm", [FedAvg(), CoordinateMedian(2)], ids=lambda rule: type(rule).__name__)
def test_colluders_are_named_as_other_attackers_are(algorithm: Algorithm, loop: Any) -> None:
    """As a callback and as a wrapper: the same bits, whatever stands beside it."""
    module = Net()
    others = [Net(), Net(), Net()]
    for other in others:
        other.load_state_dict(module.state_dict())
    who = ["site-1", "site-3"]
    flip = SignFlip(["site-0"], scale=0.5)
    train(algorithm, module, client_callbacks=[LittleIsEnough(who, z=1.5), flip], local_loop=loop)
    wrapped = ALittleIsEnough(algorithm, who, z=1.5, omniscient=False)
    train(wrapped, others[0], client_callbacks=[flip], local_loop=loop)
    train(algorithm, others[1], client_callbacks=[flip], local_loop=loop)
    train(algorithm, others[2], client_callbacks=[LittleIsEnough(["site-1"]), flip], local_loop=loop)
    assert identical(weights(module), weights(others[0]))
    assert not identical(weights(module), weights(others[1]))
    # who has nobody to ask knows no spread, and is honest
    assert all(torch.allclose(weights(others[1])[n], value, atol=1e-6) for n, value in weights(others[2]).items())


def test_colluders_send_what_the_paper_says_of_their_own_honest_updates() -> None:
    """One round in which nobody draws: the honest updates are those of a round without attackers."""
    module, other = Net(), Net()
    other.load_state_dict(module.state_dict())
    start, sent = weights(module), {}

    class Sent(FedAvg):
        def contribute(self, update: Any, task: Any, memory: Any) -> Any:
            sent[update.client_id] = (update.num_examples, {name: t.clone() for name, t in update.delta.items()})
            return super().contribute(update, task, memory)

    data = clients(shuffle=False)
    train(Sent(), other, data, max_rounds=1)
    lies = LittleIsEnough(["site-1", "site-2", "site-4"], z=0.7)
    trainer = train(FedAvg(), module, data, max_rounds=1, client_callbacks=[lies])
    assert type(trainer.algorithm).__name__ == "ALittleIsEnough"
    total = sum(count for count, _ in sent.values())
    for name, value in weights(module).items():
        own = torch.stack([sent[client_id][1][name].double() for client_id in lies.clients])
        lie = own.mean(0) - 0.7 * own.std(0, correction=0)
        deltas = {c: lie if c in lies.clients else delta[name].double() for c, (_, delta) in sent.items()}
        mean = sum(sent[c][0] * delta for c, delta in deltas.items()) / total
        assert torch.allclose(value.double(), start[name].double() + mean, atol=1e-6), name


def test_in_a_plain_trainer_nobody_colludes() -> None:
    module, other = Net(), Net()
    other.load_state_dict(module.state_dict())
    for own, callbacks in ((module, [LittleIsEnough(["a"])]), (other, [])):
        pl.seed_everything(1, verbose=False)
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(own, clients()["site-0"])
    assert identical(weights(module), weights(other))
