"""LoRA against its formula; only what trains travels."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer
from fl_lightning.models.adapters import LoRALinear, add_lora, lora, merge_lora
from fl_lightning.transforms import Codec
from fl_lightning.tree import num_bytes
from fl_lightning.types import ClientTask, Contribution


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def clients(sizes: tuple[int, ...] = (12, 20)) -> dict[str, DataLoader[Any]]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"site-{k}": DataLoader(
            TensorDataset(torch.randn(n, 6, generator=draw), torch.randint(3, (n,), generator=draw)), batch_size=4
        )
        for k, n in enumerate(sizes)
    }


def fit(module: pl.LightningModule, rounds: int = 3) -> FederatedTrainer:
    pl.seed_everything(1, verbose=False)
    trainer = FederatedTrainer(
        max_rounds=rounds, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_clients=False,
    )  # fmt: skip
    trainer.fit(module, clients())
    return trainer


def test_nothing_changes_at_first() -> None:
    module, x = Net(), torch.randn(5, 6)
    before = module(x)
    assert torch.equal(add_lora(module, rank=2)(x), before)


def test_the_correction_is_the_papers_formula() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    adapted = LoRALinear(layer, rank=2, alpha=6.0)
    nn.init.normal_(adapted.lora_b)
    expected = x @ (layer.weight + 3.0 * adapted.lora_b @ adapted.lora_a).T + layer.bias
    assert torch.allclose(adapted(x), expected, atol=1e-5)


def test_merging_gives_a_plain_module_that_computes_the_same() -> None:
    module, x = add_lora(Net(), rank=2), torch.randn(5, 6)
    fit(module)
    expected = module(x)
    merged = merge_lora(module)
    assert torch.allclose(merged(x), expected, atol=1e-5)
    assert merged.state_dict().keys() == Net().state_dict().keys()


@pytest.mark.parametrize("freeze_a", [False, True])
def test_only_what_trains_travels_and_moves(freeze_a: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    original = Codec.size

    def watched(self: Codec, contribution: Contribution, task: ClientTask) -> int:
        sent.append((num_bytes(contribution.trees.values()), len(self.encode(contribution, task, {})[0])))
        return original(self, contribution, task)

    monkeypatch.setattr(Codec, "size", watched)
    module = add_lora(Net(), rank=2, targets=["body"], trainable=["head.bias"], freeze_a=freeze_a)
    before = copy.deepcopy(module.state_dict())
    trainer = fit(module)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"body.lora_b", "head.bias"} | (set() if freeze_a else {"body.lora_a"})
    assert moved == expected
    values = sum(before[name].numel() for name in expected) * 4
    first = sent[: len(trainer.round_history[0].cohort)]
    assert {tensors for tensors, _ in first} == {values}
    assert trainer.round_history[0].num_bytes_up == sum(written for _, written in first)


def test_with_a_frozen_the_mean_of_corrections_is_exact() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6), torch.randn(3, 4, 2)
    assert torch.allclose((b @ a).mean(0), b.mean(0) @ a, atol=1e-6)
    other = torch.randn(3, 2, 6)
    assert not torch.allclose((b @ other).mean(0), b.mean(0) @ other.mean(0), atol=1e-2)


def test_a_shared_layer_stays_one_layer() -> None:
    layer = nn.Linear(4, 4)
    net = add_lora(nn.Sequential(layer, nn.ReLU(), layer), rank=1)
    assert net[0] is net[2]


def test_a_checkpoint_of_the_plain_module_is_loaded(tmp_path: Any) -> None:
    plain = Net()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.ckpt")
    module = lora(Net(), rank=2, weights=str(tmp_path / "plain.ckpt"))
    x = torch.randn(5, 6)
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank to be an integer >= 1, got 0"),
        ({"alpha": 0.0}, "alpha to be > 0, got 0.0"),
        ({"dropout": 1.0}, r"dropout to be in \[0, 1\), got 1.0"),
        ({"targets": ["encoder.*"]}, "match a linear layer each, got 'encoder"),
        ({"targets": "body"}, "targets to be a list of patterns"),
        ({"trainable": ["tail.*"]}, "match a parameter each, got 'tail"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        add_lora(Net(), **arguments)


def test_corrections_are_not_stacked() -> None:
    with pytest.raises(MisconfigurationException, match=r"corrections already \(in 'body'\).*merge_lora"):
        add_lora(add_lora(Net()))
