"""The hooks that a module sees on a client are those that plain Lightning calls, in the same order."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as other_pl
import torch
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from spine_zoo import (
    QUIET,
    ROOT_SEED,
    Classifier,
    Sites,
    assert_one_ulp,
    examples,
    fit_federated,
    fit_plain,
    loader,
    sites,
    val_loader,
    weights,
)
from torch.nn import functional as F

from fl_lightning.algorithms import FedAvg
from fl_lightning.data import IID, FederatedDataModule
from fl_lightning.seeding import seed_everywhere, seed_for
from fl_lightning.trainer import FederatedTrainer

CALLS: list[tuple[str, str]] = []
# loaders come from outside, and Lightning refuses the old name of configure_model beside the new one
NOT_RECORDED = {
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "configure_sharded_model",
}
HOOKS = [
    name
    for kind in (ModelHooks, DataHooks, CheckpointHooks)
    for name, value in vars(kind).items()
    if inspect.isfunction(value) and not name.startswith("_") and name not in NOT_RECORDED
] + ["optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "configure_optimizers",
     "configure_callbacks", "training_step", "validation_step"]  # fmt: skip


def _recorded(name: str) -> Any:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        side = "server" if isinstance(self._trainer, FederatedTrainer) else "client"
        CALLS.append((side, name))
        return getattr(Classifier, name)(self, *args, **kwargs)

    hook.__signature__ = inspect.signature(getattr(Classifier, name))  # type: ignore[attr-defined]
    return hook


Recorder = type("Recorder", (Classifier,), {name: _recorded(name) for name in HOOKS})


def recorded(run: Any, side: str) -> list[str]:
    CALLS.clear()
    run()
    return [name for where, name in CALLS if where == side]


def test_the_recorder_knows_every_hook() -> None:
    assert {"on_fit_start", "on_before_zero_grad", "setup", "transfer_batch_to_device", "on_save_checkpoint"} < set(
        HOOKS
    )
    assert len(HOOKS) > 45


@pytest.mark.parametrize("validates", [False, True], ids=["train", "train-and-validate"])
def test_a_client_sees_lightnings_hooks_in_lightnings_order(validates: bool) -> None:
    val = val_loader if validates else lambda: None
    options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    plain = recorded(lambda: fit_plain(Recorder(), loader(), val(), epochs=2, **options), "client")
    client_val = {"a": val()} if validates else None
    data = Sites({"a": loader()}, client_val)
    client = recorded(
        lambda: fit_federated(Recorder(), data, local_epochs=2, local_loop="lightning", **options), "client"
    )
    assert client == plain
    assert plain.count("on_train_batch_end") == 6


def test_the_server_validates_with_lightnings_hooks() -> None:
    """Two rounds validate as two epochs of plain Lightning do, and no hook of training runs on the server."""
    server = recorded(lambda: fit_federated(Recorder(), sites(2), val_loader(), max_rounds=2), "server")
    plain = recorded(lambda: fit_plain(Recorder(), loader(8), val_loader(), epochs=2, num_sanity_val_steps=2), "client")
    only = [name for name in server if "validation" in name or name in ("eval", "on_fit_start", "setup", "on_fit_end")]
    expected = [
        name for name in plain if "validation" in name or name in ("eval", "on_fit_start", "setup", "on_fit_end")
    ]
    assert only == expected
    training = {"training_step", "backward", "on_before_zero_grad", "on_after_backward", "on_before_optimizer_step",
                "optimizer_step", "on_train_batch_start", "on_train_epoch_end", "configure_optimizers"}  # fmt: skip
    assert not training & set(server)


def test_client_callbacks_see_lightnings_order() -> None:
    order: list[str] = []

    class Watch(pl.Callback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_") or name in ("setup", "teardown"):
                order.append(name)
            return super().__getattribute__(name)

    fit_plain(Classifier(), loader(), callbacks=[Watch()])
    plain, order[:] = list(order), []
    fit_federated(Classifier(), {"a": loader()}, client_callbacks=[Watch()], local_loop="lightning")
    kept = [name for name in order if name != "on_client_end"]
    assert kept == plain


# ---- pytorch_lightning ----------------------------------------------------------------------------------------------


class OtherModule(other_pl.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def on_train_epoch_end(self) -> None:
        assert self.trainer.callback_metrics["train_loss"] > 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class OtherData(other_pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(40, batch_size=8)

    def val_dataloader(self) -> Any:
        return val_loader()

    def test_dataloader(self) -> Any:
        return val_loader()

    def predict_dataloader(self) -> Any:
        return val_loader()


def test_a_module_of_the_other_package_is_its_plain_fit() -> None:
    module, expected = OtherModule(), OtherModule()
    expected.load_state_dict(module.state_dict())
    start = weights(module)
    trainer = other_pl.Trainer(**{**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0})
    seed_everywhere(seed_for(ROOT_SEED, 0, "a", "training"))
    trainer.fit(expected, loader(), val_loader())
    fit_federated(module, {"a": loader()}, algorithm=FedAvg(weights="uniform"))
    assert_one_ulp(weights(module), weights(expected), start)


def test_modules_and_data_of_the_other_package_go_all_the_way(tmp_path: Any) -> None:
    module = OtherModule(lr=0.2)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    trainer = fit_federated(
        module, FederatedDataModule(OtherData(), IID(num_clients=4)), max_rounds=3, enable_checkpointing=True,
        callbacks=[keep], clients_per_round=2,
    )  # fmt: skip
    assert type(module) is OtherModule
    losses = [report.metrics["val_loss"] for report in trainer.round_history]
    assert losses[2] < losses[0]
    (validated,) = trainer.validate(module, verbose=False)
    (plain,) = other_pl.Trainer(**QUIET).validate(module, val_loader(), verbose=False)
    assert validated == plain
    assert trainer.test(ckpt_path="best", verbose=False)[0]["val_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert OtherModule.load_from_checkpoint(tmp_path / "best.ckpt").hparams["lr"] == 0.2
    assert len(torch.cat(trainer.predict(module))) == 60
    assert type(module) is OtherModule


def test_the_population_may_change_between_rounds() -> None:
    class Coming(Sites):
        def client_ids(self) -> list[Any]:
            rounds = self.trainer.current_epoch if self.trainer is not None else 0
            return ["a", "b", "late"] if rounds else ["a", "b", "gone"]

    data = Coming({name: loader(8 + n, n) for n, name in enumerate(["a", "b", "late", "gone"])})
    trainer = fit_federated(Classifier(), data, max_rounds=2)
    assert [sorted(report.cohort) for report in trainer.round_history] == [["a", "b", "gone"], ["a", "b", "late"]]


def test_ids_come_back_as_they_were_given() -> None:
    data = Sites({3: loader(), "3": loader(), 10: loader()})
    trainer = fit_federated(Classifier(), data, client_overrides={3: {"epochs": 2}})
    assert trainer.round_history[0].cohort == [3, 10, "3"]
    assert trainer.round_history[0].num_steps == 6 + 3 + 3
    assert len(examples(3, 1)) == 3
