"""The reference modules against published numbers, torch and a plain Lightning run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn

from fl_lightning.data import DigitsDataModule, Dirichlet, FederatedDataModule
from fl_lightning.errors import MisconfigurationException
from fl_lightning.models import Classifier, DigitsClassifier, FedAvg2NN, FedAvgCNN, LogisticRegression

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning's use of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.mark.parametrize(("make", "published"), [(FedAvg2NN, 199_210), (FedAvgCNN, 1_663_370)])
def test_parameters_of_the_paper(make: type[Classifier], published: int) -> None:
    module = make()
    assert sum(parameter.numel() for parameter in module.parameters()) == published
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_logistic_regression_is_binary_cross_entropy() -> None:
    """Same loss and same gradient as torch's binary cross entropy on one logit."""
    torch.manual_seed(0)
    module = LogisticRegression(in_features=13, lr=0.1)
    features, labels = torch.randn(20, 13), torch.randint(2, (20,))
    nn.functional.cross_entropy(module(features), labels).backward()
    reference = nn.Linear(13, 1)
    reference.load_state_dict(dict(zip(["weight", "bias"], module.net.parameters(), strict=True)))
    nn.functional.binary_cross_entropy_with_logits(reference(features)[:, 0], labels.float()).backward()
    for ours, theirs in zip(module.net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert LogisticRegression(5, num_classes=3)(torch.zeros(1, 5)).shape == (1, 3)


@pytest.mark.parametrize("federated", [False, True])
def test_digits_are_learned_in_a_plain_trainer(tmp_path: Path, federated: bool) -> None:
    lightning.seed_everything(0, verbose=False)
    digits: lightning.LightningDataModule = DigitsDataModule(batch_size=32)
    if federated:
        digits = FederatedDataModule(digits, Dirichlet(10, 0.3))
    trainer = lightning.Trainer(
        max_epochs=12, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        devices=1, default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    module = DigitsClassifier()
    trainer.fit(module, datamodule=digits)
    assert {"train_loss", "train_acc", "val_loss", "val_acc"} <= set(trainer.callback_metrics)
    assert trainer.test(module, datamodule=digits, verbose=False)[0]["test_acc"] > 0.93
    predictions = module.predict_step(next(iter(digits.val_dataloader())), 0)
    assert predictions.shape == (180,)
    assert predictions.dtype == torch.int64


def test_hyperparameters_come_back(tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", devices=1, default_root_dir=tmp_path,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    module = DigitsClassifier(hidden=7, lr=0.3)
    trainer.fit(module, datamodule=DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = DigitsClassifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert again.hparams["hidden"] == 7
    assert again.lr == 0.3
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))


def test_bad_input() -> None:
    with pytest.raises(MisconfigurationException, match=r"LogisticRegression expected num_classes >= 2, got 1"):
        LogisticRegression(3, num_classes=1)
