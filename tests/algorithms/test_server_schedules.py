"""A server's learning rate that follows a value: against torch's own scheduler, resumed, and with wrong advice."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from algorithm_zoo import Judged, Net, Sites, clients, identical, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as CommandLinesPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import quiet_trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from fl_lightning.algorithms import FedAvg, FedAvgM

NARROW: dict[str, Any] = {"patience": 0, "factor": 0.5, "threshold": 0.2}


class Rates(pl.Callback):
    """Learning rate of the server in each round, and the value that it watches after it."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(schedule: Any, rounds: int = 6, resume: Any = None, callbacks: Any = (), **arguments: Any) -> Any:
    torch.manual_seed(0)
    module, rates = Judged(), Rates()
    algorithm = FedAvgM(0.9, lr=0.5, server_lr_scheduler=schedule)
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=rounds, callbacks=[rates, *callbacks], **arguments)
    pl.seed_everything(3, verbose=False)
    loaders = clients(batch_size=50)
    data = (
        (Sites(),)
        if "evaluate_clients" in arguments
        else (loaders, DataLoader(loaders["site-0"].dataset, batch_size=50))
    )
    trainer.fit(module, *data, ckpt_path=resume)
    return module, trainer, rates.rates


def as_torch(values: list[float], every: int = 1) -> list[float]:
    """Return the rates of torch's scheduler that sees these values itself."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule, rates = ReduceLROnPlateau(optimizer, **NARROW), []
    for round, value in enumerate(values):
        rates.append(optimizer.param_groups[0]["lr"])
        if (round + 1) % every == 0:
            schedule.step(value)
    return rates


def watching(name: str, **more: Any) -> Any:
    return lambda optimizer: {"scheduler": ReduceLROnPlateau(optimizer, **NARROW), "monitor": name, **more}


@pytest.mark.parametrize(
    ("schedule", "name", "every", "arguments"),
    [
        (watching("val_loss"), "val_loss", 1, {}),
        (watching("train_loss"), "train_loss", 1, {}),
        (watching("val_loss", frequency=2), "val_loss", 2, {}),
        (watching("clients/val_loss"), "clients/val_loss", 1, {"evaluate_clients": True}),
        (watching("val_loss"), "val_loss", 2, {"check_val_every_n_epoch": 2}),
        (partial(CommandLinesPlateau, monitor="val_loss", **NARROW), "val_loss", 1, {}),
    ],
    ids=["val", "train", "every second round", "clients", "validates every second round", "command line"],
)
def test_a_plateau_lowers_the_rate_as_torch_does(schedule: Any, name: str, every: int, arguments: Any) -> None:
    _, trainer, rates = run(schedule, **arguments)
    values = [report.metrics.get(name, float("nan")) for report in trainer.round_history]
    assert rates == as_torch(values, every)
    assert rates[-1] < rates[0]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # each resumed run has a folder of its own
@pytest.mark.parametrize("name", ["val_loss", "train_loss"])
@pytest.mark.parametrize("at_the_end", [True, False], ids=["saved after the round", "saved after validation"])
def test_a_resumed_run_has_the_rates_of_the_whole_one(at_the_end: bool, name: str, tmp_path: Path) -> None:
    def saving(folder: Path) -> dict[str, Any]:
        saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=at_the_end)
        return {"callbacks": [saver], "enable_checkpointing": True, "default_root_dir": str(folder)}

    whole, _, rates = run(watching(name), **saving(tmp_path / "whole"))
    for after in (1, 2, 3):
        path = tmp_path / "whole" / f"epoch={after - 1}.ckpt"
        resumed, _, rest = run(watching(name), resume=path, **saving(tmp_path / f"from {after}"))
        assert rest == rates[after:]
        assert identical(weights(resumed), weights(whole))
    assert len(set(rates)) > 2


def test_a_dict_may_hold_any_scheduler() -> None:
    def schedule(optimizer: Any) -> Any:
        return {"scheduler": StepLR(optimizer, 1, gamma=0.5), "frequency": 2, "interval": "step"}

    assert run(schedule, rounds=5)[2] == [0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ReduceLROnPlateau, r"ReduceLROnPlateau, and nobody said.*'monitor': 'val_loss'\}.*lightning.pytorch.cli"),
        (lambda o: {"optimizer": o, "lr_scheduler": StepLR(o, 1)}, "Expected server_lr_scheduler to return a torch"),
        (lambda o: {"scheduler": StepLR(o, 1), "monitr": "x"}, "dict with 'scheduler' and perhaps 'monitor'.*monitr"),
        (lambda o: o, r"Expected server_lr_scheduler to return.*got SGD"),
        (watching("val_los"), "watches 'val_los', which round 0 has no value of. It has .*'val_loss'.*'strict': False"),
    ],
)
def test_a_schedule_that_cannot_run_says_what_to_write(schedule: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"(?s)" + message):
        run(schedule, rounds=1)


def test_a_value_that_is_never_there_may_be_allowed() -> None:
    assert run(watching("val_los", strict=False), rounds=3)[2] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(torch.optim.SparseAdam, lr=0.1), "SparseAdam takes sparse gradients only, and the mean.*SGD or Adam"),
        (partial(torch.optim.SGD, lr=-1.0), "server_optimizer cannot be made for the 4 parameters.*Invalid learning"),
        (partial(getattr(torch.optim, "Muon", torch.optim.SGD), weight_decay=-1.0, lr=1.0), "cannot be made for the 4"),
    ],
    ids=["SparseAdam", "SGD", "Muon"],
)
def test_a_server_optimizer_that_a_round_cannot_feed_is_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(algorithm=FedAvg(server_optimizer=optimizer), max_rounds=1).fit(Net(), clients())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_for_matrices() -> None:
    with pytest.raises(MisconfigurationException, match=r"cannot be made for the 4 parameters.*Muon only supports 2D"):
        quiet_trainer(algorithm=FedAvg(server_optimizer=torch.optim.Muon), max_rounds=1).fit(Net(), clients())
