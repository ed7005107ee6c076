"""The callbacks of local training against torch and closed forms, in a plain Trainer and in the federation."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_training import QUIET, Net, by_hand, data, plain_fit, same
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import FedAvg, FedProx
from fl_lightning.callbacks import GradientClip, GradientCorrection, GradientNoise, ProximalTerm, StepCounter
from fl_lightning.types import ClientTask


def test_the_proximal_term_is_the_gradient_of_the_penalty() -> None:
    def penalised(module: Net, start: list[Tensor], loss: Tensor) -> Any:
        distance = sum(((p - s) ** 2).sum() for p, s in zip(module.parameters(), start, strict=True))
        return loss + 0.5 / 2 * distance, lambda: None

    module = Net()
    expected, unpulled = by_hand(module, penalised), by_hand(module, lambda m, s, loss: (loss, lambda: None))
    plain_fit(module, ProximalTerm(mu=0.5))
    assert same(module, expected)
    assert not same(module, unpulled, 1e-3)


@pytest.mark.parametrize("argument", ["max_norm", "value"])
def test_clipping_is_torchs(argument: str) -> None:
    limit = {"max_norm": 0.2, "value": 0.03}[argument]

    def clipped(module: Net, start: list[Tensor], loss: Tensor) -> Any:
        if argument == "value":
            return loss, lambda: nn.utils.clip_grad_value_(module.parameters(), limit)
        return loss, lambda: nn.utils.clip_grad_norm_(module.parameters(), limit)

    module = Net()
    expected, free = by_hand(module, clipped), by_hand(module, lambda m, s, loss: (loss, lambda: None))
    plain_fit(module, GradientClip(**{argument: limit}))
    assert same(module, expected)
    assert not same(module, free, 1e-3)


def test_clipping_leaves_small_gradients_and_zeros_alone() -> None:
    task, small = ClientTask("a", 0, 0, {}, seed=0), {"a": torch.tensor([0.3]), "b": torch.tensor([-0.4, 0.0])}
    for clip in (GradientClip(max_norm=1.0), GradientClip(value=1.0)):
        corrected = clip.correct(small, {}, task)
        assert all(torch.equal(corrected[name], small[name]) for name in small)
        assert torch.equal(clip.correct({"a": torch.zeros(3)}, {}, task)["a"], torch.zeros(3))


def test_noise_has_its_standard_deviation_and_comes_from_the_global_generator() -> None:
    task, grads = ClientTask("a", 0, 0, {}, seed=0), {"w": torch.full((40_000,), 5.0), "v": torch.zeros(40_000)}
    torch.manual_seed(3)
    first = GradientNoise(std=0.5).correct(grads, {}, task)
    torch.manual_seed(3)
    again = GradientNoise(std=0.5).correct(grads, {}, task)
    for name, mean in (("w", 5.0), ("v", 0.0)):
        assert torch.equal(first[name], again[name])
        assert float(first[name].mean()) == pytest.approx(mean, abs=0.01)
        assert float(first[name].std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([first["w"], first["v"]]))[0, 1])) < 0.02


def test_noise_moves_a_plain_fit_as_hand_drawn_noise_does() -> None:
    def noisy(module: Net, start: list[Tensor], loss: Tensor) -> Any:
        def edit() -> None:
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter.grad += 0.1 * torch.randn_like(parameter.grad)

        return loss, edit

    module = Net()
    before = copy.deepcopy(module)

    class Seed(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            torch.manual_seed(11)

    plain_fit(module, Seed(), GradientNoise(std=0.1), epochs=1)  # a second epoch would make the loader draw as well
    batches = list(data())
    torch.manual_seed(11)
    assert same(module, by_hand(before, noisy, epochs=1, batches=batches))


@pytest.mark.parametrize(
    "neutral", [ProximalTerm(mu=0.0), GradientNoise(std=0.0), GradientClip(max_norm=1e9), GradientClip(value=1e9)]
)
def test_a_neutral_callback_changes_no_bit(neutral: GradientCorrection) -> None:
    module = Net()
    expected = copy.deepcopy(module)
    plain_fit(expected)
    plain_fit(module, neutral)
    assert neutral.num_corrections == 12
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    "correction", [ProximalTerm(mu=0.3), GradientClip(max_norm=0.1), GradientClip(value=0.02)], ids=type
)
def test_a_correction_under_vmap_is_each_clients_own(correction: GradientCorrection) -> None:
    draw = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(4, generator=draw)}
    task = ClientTask("a", 0, 0, {"model": start}, seed=0)
    grads = {"w": torch.randn(7, 4, generator=draw)}  # leaves: (clients, *param.shape)
    params = {"w": torch.randn(7, 4, generator=draw)}
    grouped = torch.func.vmap(lambda g, p: correction.correct(g, p, task))(grads, params)["w"]
    alone = [correction.correct({"w": g}, {"w": p}, task)["w"] for g, p in zip(grads["w"], params["w"], strict=True)]
    assert torch.allclose(grouped, torch.stack(alone), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "make", [lambda: ProximalTerm(0.5), lambda: GradientClip(max_norm=0.2), lambda: GradientClip(value=0.03)]
)
def test_one_client_and_one_round_equal_a_plain_trainer(make: Any) -> None:
    module = Net()
    expected = copy.deepcopy(module)
    plain_fit(expected, make())
    trainer = FederatedTrainer(max_rounds=1, local_epochs=2, client_callbacks=[make()], **QUIET)
    trainer.fit(module, {"a": data()})
    assert same(module, expected, 2e-7)


def test_noise_in_the_federation_is_drawn_per_client_and_round() -> None:
    class Still(Net):
        """Without a gradient of its own, the update is the noise."""

        def loss(self, batch: Any) -> Tensor:
            return 0.0 * sum(p.sum() for p in self.parameters())

    def updates(seed: int, noise: float) -> list[dict[str, Tensor]]:
        seen: list[dict[str, Tensor]] = []

        def remember(update: Any) -> float:
            seen.append({name: value.clone() for name, value in update.delta.items()})
            return 1.0

        pl.seed_everything(seed, verbose=False)
        trainer = FederatedTrainer(
            algorithm=FedAvg(weights=remember), max_rounds=2, client_callbacks=[GradientNoise(noise)], **QUIET
        )
        sgd = lambda params: torch.optim.SGD(params, lr=1.0)  # noqa: E731
        trainer.fit(Still(sgd), {"a": data(), "b": data()})
        return seen

    first, again, other = updates(1, 0.1), updates(1, 0.1), updates(2, 0.1)
    assert len(first) == 4
    vectors = [torch.cat([v.flatten() for v in update.values()]) for update in first]
    for left in range(4):
        assert torch.equal(vectors[left], torch.cat([v.flatten() for v in again[left].values()]))
        assert not torch.equal(vectors[left], torch.cat([v.flatten() for v in other[left].values()]))
        for right in range(left):
            assert not torch.equal(vectors[left], vectors[right])
    # six steps of lr 1 with std .1: the standard deviation of a sum
    assert float(torch.cat(vectors).std()) == pytest.approx(0.1 * 6**0.5, rel=0.15)


def test_a_term_pulls_towards_the_start_of_each_fit() -> None:
    term, first, second = ProximalTerm(0.5), Net(), Net()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter += 1.0
    expected = copy.deepcopy(second)
    plain_fit(first, term)
    plain_fit(second, term)
    plain_fit(expected, ProximalTerm(0.5))
    assert same(second, expected)
    # a task that a loop gave stays, also after a plain fit
    term.begin(given := ClientTask("a", 0, 0, {"model": {}}, seed=0), {})
    plain_fit(first, term)
    assert term.task is given


def test_manual_optimization_is_corrected_and_counted() -> None:
    counter, term = StepCounter(0.5), ProximalTerm(0.5)
    module = ManualOptimBoringModel()
    plain_fit(module, counter, term, loader=DataLoader(RandomDataset(32, 8), batch_size=2))
    assert counter.num_steps == term.num_corrections > 0


def test_only_the_gradients_of_the_optimizer_that_steps_are_corrected() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            first, _ = self.optimizers()
            self.manual_backward(self.loss(batch))
            before = self.head.weight.grad.clone()
            first.step()
            assert torch.equal(self.head.weight.grad, before)
            assert float(self.body.weight.grad.abs().max()) <= 2**-10
            first.zero_grad()
            self.head.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]

    clip = GradientClip(value=2**-10)
    plain_fit(Two(), clip)
    assert clip.num_corrections == 12


def test_two_corrections_of_a_kind_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"ProximalTerm would correct every gradient twice.*Leave out"):
        plain_fit(Net(), ProximalTerm(0.1), ProximalTerm(0.2))
    trainer = FederatedTrainer(algorithm=FedProx(0.1), max_rounds=1, client_callbacks=[ProximalTerm(0.2)], **QUIET)
    with pytest.raises(MisconfigurationException, match="when the algorithm brings its own"):
        trainer.fit(Net(), {"a": data()})


def test_different_corrections_run_in_their_order() -> None:
    module = Net()

    def clipped_after_pull(module: Net, start: list[Tensor], loss: Tensor) -> Any:
        distance = sum(((p - s) ** 2).sum() for p, s in zip(module.parameters(), start, strict=True))
        return loss + distance, lambda: nn.utils.clip_grad_value_(module.parameters(), 0.01)

    expected = by_hand(module, clipped_after_pull)
    plain_fit(module, ProximalTerm(2.0), GradientClip(value=0.01))
    assert same(module, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProximalTerm(-1.0), "ProximalTerm expected mu to be a finite number >= 0, got -1.0; mu=0 switches"),
        (lambda: ProximalTerm(float("nan")), "finite number >= 0, got nan"),
        (lambda: GradientNoise(-0.1), "GradientNoise expected std to be a finite number >= 0, got -0.1"),
        (lambda: GradientClip(), "expected one of max_norm and value, got max_norm=None and value=None"),
        (lambda: GradientClip(1.0, 2.0), "expected one of max_norm and value, got max_norm=1.0 and value=2.0"),
        (lambda: GradientClip(max_norm=0.0), "max_norm to be a finite number > 0, got 0.0"),
        (lambda: GradientClip(value=-1.0), "value to be a finite number > 0, got -1.0"),
        (lambda: StepCounter(mu=-1.0), "StepCounter expected mu to be a finite number >= 0"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()
