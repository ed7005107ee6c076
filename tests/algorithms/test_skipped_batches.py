"""Clients whose ``training_step`` returns None: for some batches, or for all."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from algorithm_zoo import Net
from everyone import ASYNCHRONOUS, EVERYONE, LOOPS, cohort, train
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quadratics import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning.callbacks import StepCounter
from fl_lightning.errors import NoLossError
from fl_lightning.schedules import PowerOfChoiceSampler

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")


class Skips(Net):
    """Skips what is out of range, as a guard against broken records does."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if float(batch[0].max()) > 1e3 else super().training_step(batch, batch_idx)


def broken(name: str, part: int | None = None) -> dict[str, DataLoader[Any]]:
    """Return clients of whom one has broken records only, or so many."""
    loaders = cohort()
    x, y = loaders[name].dataset.tensors
    x = x.clone()
    x[:part] += 1e6
    loaders[name] = DataLoader(TensorDataset(x, y), batch_size=4)
    return loaders


NEEDS_A_LOSS = ("AFL", "FedProx adaptive", "MimeLite", "QFedAvg", "Scaffold I")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", sorted(EVERYONE.keys() - set(ASYNCHRONOUS)))
def test_a_client_that_skips_every_batch_stays_where_it_is_or_is_named(name: str, loop: str) -> None:
    """A zero update with the client's weight where that is defined, an error that names it where a loss is needed."""
    data = broken("site-1")
    arguments: dict[str, Any] = {"rounds": 1, **LOOPS[loop]}
    if name in NEEDS_A_LOSS:
        message = r"Client 'site-1' failed in round 0: Skips.training_step returned None for each of its 5 batches"
        with pytest.raises(NoLossError, match=message):
            train(name, Skips(), data, **arguments)
        with pytest.warns(UserWarning, match="Client 'site-1' is skipped in round 0"):
            trainer = train(name, Skips(), data, on_bad_update="skip", **arguments)
        assert list(trainer.round_history[0].skipped) == ["site-1"]
    elif name.startswith("FedNova"):
        with pytest.raises(MisconfigurationException, match=r"client 'site-1'.*returned None for every batch"):
            train(name, Skips(), data, **arguments)
    else:
        trainer = train(name, Skips(), data, **arguments)
        assert trainer.round_history[0].cohort == list(data)


def test_power_of_choice_takes_last_who_has_no_loss() -> None:
    trainer = quiet_trainer(max_rounds=1, clients_per_round=4, sampler=PowerOfChoiceSampler(5))
    trainer.fit(Skips(), broken("site-3"))
    assert trainer.round_history[0].cohort == ["site-0", "site-1", "site-2", "site-4"]


def test_a_skipped_batch_is_no_step_of_the_normaliser() -> None:
    """torch's SGD leaves its momentum alone then."""
    counter = StepCounter()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[counter], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Skips(momentum=0.9), broken("site-1", part=8)["site-1"])
    assert counter.num_steps == 3  # of five batches of four, two are broken
    assert counter.a_norm == pytest.approx(1 + 1.9 + 2.71)
