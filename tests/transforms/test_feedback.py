"""Error feedback: Top-1 diverges without it and converges with it; nothing that was left out is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spine_zoo import QUIET, Classifier, assert_same_bits, fit_federated, sites, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transforms_zoo import task, tree

from fl_lightning import ErrorFeedback, FedAvg, FederatedTrainer, Quantize, RandomK, TopK, chain
from fl_lightning.transforms import Codec, Eden, PowerSGD, Sign, Transform
from fl_lightning.types import Contribution

STEP = 0.05


class Saddle(pl.LightningModule):
    """f(x) = <a, x>^2 + |x|^2 / 4, with a in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch[0] @ self.x).square().sum() + self.x.square().sum() / 4

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=STEP)


def rotations() -> dict[str, DataLoader[Any]]:
    a = torch.tensor([-3.0, 2.0, 2.0], dtype=torch.float64)
    return {f"c{shift}": DataLoader(TensorDataset(a.roll(shift)[None])) for shift in range(3)}


def run(transforms: list[Transform], rounds: int) -> Tensor:
    module = Saddle()
    fit_federated(module, rotations(), max_rounds=rounds, transforms=transforms, log_clients=False)
    return module.x.detach()


def test_top_1_alone_diverges_as_its_closed_form_says() -> None:
    """x_k = (1 + 11 gamma / 6)^k (1, 1, 1): at gamma = .05 the twentieth is 5.778312 (Karimireddy et al. 2019)."""
    assert pytest.approx(5.778312, abs=1e-6) == (1 + 11 * STEP / 6) ** 20
    assert torch.allclose(run([TopK(k=1)], 20), torch.full((3,), 5.778312, dtype=torch.float64), atol=1e-6)


def test_top_1_with_error_feedback_converges() -> None:
    assert float(run([ErrorFeedback(TopK(k=1))], 200).norm()) < 1e-6


@pytest.mark.parametrize(
    "inner",
    [TopK(0.1), RandomK(0.1), Quantize(2), Quantize(1), Sign(), Eden(1), PowerSGD(1), chain(TopK(0.2), Quantize(3))],
    ids=lambda inner: type(inner).__name__,
)
def test_what_was_sent_and_what_waits_is_what_was_given(inner: Transform) -> None:
    """Summed over rounds, and the residual stays bounded: 60 equal updates would let a growing one reach 60."""
    update = tree(dtype=torch.float64)
    codec = Codec([ErrorFeedback(inner)], 0, update)
    memory: Any = {}
    sent = {name: torch.zeros_like(t) for name, t in update.items()}
    for round in range(60):
        data, memory = codec.encode(Contribution({"delta": update}), task(round=round), memory)
        for name, tensor in codec.decode(data, task(round=round)).trees["delta"].items():
            sent[name] += tensor
    (kept,) = memory.values()
    waiting = kept["residual"]["delta"]
    for name in update:
        torch.testing.assert_close(sent[name] + waiting[name], 60 * update[name], atol=1e-4, rtol=1e-5)
    total = torch.cat([t.flatten() for t in update.values()]).norm()
    assert float(torch.cat([t.flatten() for t in waiting.values()]).norm()) < 40 * float(total)
    assert float(torch.cat([sent[n].flatten() for n in sent]).norm()) > 25 * float(total)


def test_unbiased_random_k_under_feedback_would_grow_without_bound() -> None:
    """Why the contractive version runs: with the factor n / k the residual is multiplied by n / k - 1 now and then."""
    feedback = ErrorFeedback(RandomK(0.05))
    assert isinstance(feedback.transform, RandomK)
    assert not feedback.transform.unbiased
    norms = []
    for transform in (feedback.transform, RandomK(0.05)):
        feedback.transform = transform
        codec, memory = Codec([feedback], 0, tree()), {}
        for round in range(200):
            _, memory = codec.encode(Contribution({"delta": tree()}), task(round=round), memory or {})
        assert memory is not None
        norms.append(float(memory["0"]["residual"]["delta"]["w"].norm()))
    assert norms[0] < 1e3
    assert norms[1] > 1e6


TRANSFORM = chain(TopK(0.2), Quantize(4))


def test_residuals_survive_a_resume_to_the_bit(tmp_path: Path) -> None:
    """With two of four clients a round, so that residuals of absent clients must wait as well."""
    start = weights(Classifier(hidden=6))
    ends = []
    for stop in (None, 3):
        module = Classifier(hidden=6)
        module.load_state_dict(start)
        folder = tmp_path / str(stop)
        arguments: dict[str, Any] = {
            **QUIET, "default_root_dir": str(folder), "enable_checkpointing": True, "clients_per_round": 2,
            "transforms": [ErrorFeedback(TRANSFORM)], "num_threads": 1,
        }  # fmt: skip
        pl.seed_everything(3, verbose=False)
        saver = ModelCheckpoint(folder, save_last=True)
        trainer = FederatedTrainer(max_rounds=stop or 6, callbacks=[saver], **arguments)
        trainer.fit(module, sites(4))
        if stop:
            module = Classifier(hidden=6)
            trainer = FederatedTrainer(max_rounds=6, callbacks=[ModelCheckpoint(folder, save_last=True)], **arguments)
            trainer.fit(module, sites(4), ckpt_path=str(folder / "last.ckpt"))
        ends.append(weights(module))
    assert_same_bits(ends[0], ends[1])
    without = Classifier(hidden=6)
    without.load_state_dict(start)
    fit_federated(without, sites(4), seed=3, max_rounds=6, clients_per_round=2, transforms=[TRANSFORM])
    assert any(not torch.equal(ends[0][name], value) for name, value in weights(without).items())


class Watch(pl.Callback):
    """Keeps each client's residual as the store has it after each round."""

    def __init__(self) -> None:
        self.residuals: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        store = trainer.federated_fit.federation.store
        self.residuals.append({name: store.get(name) for name in ("s0", "s1", "s2")})


def test_a_client_whose_payload_is_refused_keeps_its_old_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Codec.encode

    def cut(self: Codec, contribution: Contribution, own: Any, memory: Any) -> Any:
        data, kept = original(self, contribution, own, memory)
        return (data[:-3] if (own.client_id, own.round) == ("s1", 1) else data), kept

    monkeypatch.setattr(Codec, "encode", cut)
    watch = Watch()
    with pytest.warns(UserWarning, match="Client 's1' is skipped in round 1: its payload cannot be read"):
        trainer = fit_federated(
            Classifier(), sites(3), max_rounds=3, algorithm=FedAvg(), callbacks=[watch], on_bad_update="skip",
            transforms=[ErrorFeedback(TopK(k=2))],
        )  # fmt: skip
    assert [report.cohort for report in trainer.round_history] == [["s0", "s1", "s2"], ["s0", "s2"], ["s0", "s1", "s2"]]

    def residual(round: int, client: str) -> Tensor:
        kept: Tensor = watch.residuals[round][client]["transforms"]["0"]["residual"]["delta"]["net.0.weight"]
        return kept

    assert torch.equal(residual(0, "s1"), residual(1, "s1"))
    assert not torch.equal(residual(1, "s1"), residual(2, "s1"))
    assert not torch.equal(residual(0, "s0"), residual(1, "s0"))
