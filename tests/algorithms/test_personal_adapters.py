"""Personal models of modules with adapters, of clients that never took part, and after local fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import Net, clients
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning import Ditto, FederatedTrainer, FedPer, load_personal_model
from fl_lightning.models.adapters import add_lora
from fl_lightning.schedules import FixedSampler

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(5))


def fitted(algorithm: Any, module: Any, folder: Path, **arguments: Any) -> FederatedTrainer:
    trainer = FederatedTrainer(
        algorithm=algorithm, max_rounds=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, log_clients=False, default_root_dir=str(folder), **arguments,
    )  # fmt: skip
    trainer.fit(module, clients())
    return trainer


def test_a_personal_model_with_adapters_is_the_users_own_class(tmp_path: Path) -> None:
    module = add_lora(Net(), rank=2, targets=["body"], trainable=["head.*"])
    trainer = fitted(Ditto(0.1), module, tmp_path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.save_personal_model("site-1", tmp_path / "adapters.ckpt")
    trainer.save_personal_model("site-1", tmp_path / "merged.ckpt", merge_lora=True)
    assert {n for n, v in module.state_dict().items() if torch.equal(v, before[n])} == before.keys()
    again = add_lora(Net(), rank=2, targets=["body"], trainable=["head.*"])
    again.load_state_dict(torch.load(tmp_path / "adapters.ckpt", weights_only=True)["state_dict"])
    plain = Net.load_from_checkpoint(tmp_path / "merged.ckpt")
    other = add_lora(Net(), rank=2, targets=["body"], trainable=["head.*"])
    loaded = load_personal_model(other, trainer.checkpoint_callback.best_model_path, "site-1")
    assert loaded is other
    assert torch.equal(loaded(X), again(X))
    assert torch.allclose(plain(X), again(X), atol=1e-6)
    assert not torch.allclose(module(X), again(X), atol=1e-4)


def test_a_client_that_never_took_part_has_the_global_model(tmp_path: Path) -> None:
    module = Net()
    trainer = fitted(FedPer(["head.*"]), module, tmp_path, sampler=FixedSampler([["site-1"]]))
    trainer.save_personal_model("site-0", tmp_path / "never.ckpt")
    trainer.save_personal_model("site-1", tmp_path / "took part.ckpt")
    assert torch.equal(Net.load_from_checkpoint(tmp_path / "never.ckpt")(X), module(X))
    assert not torch.equal(Net.load_from_checkpoint(tmp_path / "took part.ckpt")(X), module(X))
    path = trainer.checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match="'site-0' had not taken part.*its model is the global one"):
        assert torch.equal(load_personal_model(Net, path, "site-0")(X), module(X))
    with pytest.raises(MisconfigurationException, match="client 'site-9', and the population has no such client"):
        trainer.save_personal_model("site-9", tmp_path / "x.ckpt")


def test_a_fine_tuned_model_is_a_plain_fit_from_the_global_one(tmp_path: Path) -> None:
    """The program of docs/algorithms/fine_tuning.md."""
    module = Net()
    trainer = fitted(Ditto(0.1), module, tmp_path)
    tuned = Net.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    plain = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                       enable_model_summary=False, default_root_dir=str(tmp_path))  # fmt: skip
    plain.fit(tuned, clients()["site-1"])
    plain.save_checkpoint(tmp_path / "client.ckpt")
    assert torch.equal(Net.load_from_checkpoint(tmp_path / "client.ckpt")(X), tuned(X))
    assert not torch.equal(tuned(X), module(X))
