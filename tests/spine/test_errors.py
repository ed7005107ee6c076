"""Bad input gets a clear error that names the client, and nothing is lost."""

from __future__ import annotations

import errno
import math
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from spine_zoo import (
    QUIET,
    Classifier,
    ServedSites,
    Sites,
    assert_close,
    assert_same_bits,
    examples,
    fit_federated,
    fit_plain,
    loader,
    sites,
    weights,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fl_lightning.algorithms import FedAvg
from fl_lightning.data import Dirichlet, FederatedDataModule
from fl_lightning.errors import (
    BadUpdateError,
    ClientError,
    EmptyClientError,
    MisconfigurationException,
    NotEnoughClientsError,
)
from fl_lightning.schedules import Sampler
from fl_lightning.trainer import FederatedTrainer


class Cohort(Sampler):
    def __init__(self, *ids: Any) -> None:
        self.ids = list(ids)

    def cohort(self, population: Any, size: int, seed: int, round: int) -> list[Any]:
        return self.ids


def size_of(pl_module: Any) -> int:
    return len(pl_module.trainer.train_dataloader.dataset)


class FailsOn25(Classifier):
    """The client with 25 examples (s2) fails, in the way that ``how`` says."""

    how = "raise"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if size_of(self) != 25:
            return loss
        if self.how == "raise":
            raise ZeroDivisionError("a broken sensor")
        return loss * {"nan": math.nan, "inf": math.inf}[self.how]


class NaN(FailsOn25):
    how = "nan"


class Inf(FailsOn25):
    how = "inf"


# ---- who the clients are --------------------------------------------------------------------------------------------


def test_duplicate_ids() -> None:
    class Twice(Sites):
        def client_ids(self) -> list[Any]:
            return ["a", "b", "a"]

    with pytest.raises(MisconfigurationException, match="every client id once, got 'a' twice"):
        fit_federated(Classifier(), Twice({"a": loader(), "b": loader()}))


def test_a_sampler_of_doubles_or_strangers() -> None:
    with pytest.raises(MisconfigurationException, match="chose client 's1' twice in round 0"):
        fit_federated(Classifier(), sites(3), sampler=Cohort("s1", "s1"))
    with pytest.raises(MisconfigurationException, match=r"one of 3 clients \('s0', 's1', 's2'\), got 'ghost'"):
        fit_federated(Classifier(), sites(3), sampler=Cohort("s1", "ghost"))


def test_overrides_of_strangers() -> None:
    with pytest.raises(
        MisconfigurationException, match="client_overrides names 'ghost', which is none of the 3 clients"
    ):
        fit_federated(Classifier(), sites(3), client_overrides={"ghost": {"epochs": 2}})


def test_more_clients_per_round_than_exist() -> None:
    with pytest.raises(MisconfigurationException, match=r"clients_per_round=9 asks for more clients than exist \(3\)"):
        fit_federated(Classifier(), sites(3), clients_per_round=9)


def test_too_few_clients() -> None:
    with pytest.raises(NotEnoughClientsError, match="min_clients=4, but only 3 clients are available"):
        fit_federated(Classifier(), sites(3), min_clients=4)
    with pytest.raises(NotEnoughClientsError, match="min_clients=2, but only 1 client is available"):
        fit_federated(Classifier(), sites(3), min_clients=2, clients_per_round=1)


@pytest.mark.filterwarnings("ignore:Client 's2' is skipped")
def test_too_few_that_deliver() -> None:
    with pytest.raises(NotEnoughClientsError, match="min_clients=3, but only 2 clients"):
        fit_federated(FailsOn25(), sites(3), min_clients=3, on_bad_update="skip")


@pytest.mark.parametrize(
    "data",
    [DataLoader(examples(8, 1)), None, {}, [DataLoader(examples(8, 1))]],
    ids=["loader", "none", "empty", "list"],
)
def test_data_without_clients(data: Any) -> None:
    with pytest.raises(MisconfigurationException, match="client"):
        fit_federated(Classifier(), data)


def test_a_partition_without_labels() -> None:
    class Unlabelled(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.randn(40, 8), batch_size=8)

    with pytest.raises(MisconfigurationException, match="target_fn"):
        fit_federated(Classifier(), FederatedDataModule(Unlabelled(), Dirichlet(num_clients=3, alpha=0.5)))


# ---- a client that does not deliver ---------------------------------------------------------------------------------


class Nothing(Dataset[Any]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError


@pytest.mark.parametrize(
    "empty",
    [lambda: DataLoader(Nothing()), lambda: loader(5, batch_size=8, drop_last=True), list],
    ids=["no-examples", "drop-last", "list"],
)
def test_an_empty_client_is_named(empty: Any) -> None:
    with pytest.raises(EmptyClientError, match="Client 'empty' failed in round 0: it has no batch"):
        fit_federated(Classifier(), {"full": loader(), "empty": empty()})
    with pytest.warns(UserWarning, match="Client 'empty' is skipped"):
        trainer = fit_federated(Classifier(), {"full": loader(), "empty": empty()}, on_bad_update="skip")
    assert trainer.round_history[0].cohort == ["full"]
    assert list(trainer.round_history[0].skipped) == ["empty"]


def test_manual_optimization_need_not_count_a_step() -> None:
    class Quiet(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    trainer = fit_federated(Quiet(), {"a": loader()})
    assert trainer.round_history[0].num_steps == 0


@pytest.mark.parametrize("local_loop", ["lightning", "auto"])
@pytest.mark.parametrize("module", [NaN, Inf])
def test_a_bad_update_is_named(module: Any, local_loop: str) -> None:
    with pytest.raises(
        BadUpdateError,
        match=r"Client 's2' failed in round 0: .*NaN or infinite.*'net.0.weight'\.\nMend .*on_bad_update='skip'",
    ):
        fit_federated(module(), sites(4), local_loop=local_loop)


@pytest.mark.parametrize("module", [NaN, Inf, FailsOn25])
def test_a_skipped_client_is_reported_and_leaves_no_trace(module: Any) -> None:
    start = Classifier()
    ends = []
    for kind, ids in ((module, ["s0", "s1", "s2", "s3"]), (Classifier, ["s0", "s1", "s3"])):
        server = kind()
        server.load_state_dict(start.state_dict())
        arguments: dict[str, Any] = {"max_rounds": 2, "sampler": Cohort(*ids), "client_state": "keep"}
        if kind is Classifier:
            trainer = fit_federated(server, sites(4), **arguments)
        else:
            with pytest.warns(UserWarning, match="Client 's2' is skipped in round"):
                trainer = fit_federated(server, sites(4), on_bad_update="skip", **arguments)
        ends.append((weights(server), trainer.round_history))
    assert_close(ends[0][0], ends[1][0])
    for report, clean in zip(ends[0][1], ends[1][1], strict=True):
        assert report.cohort == clean.cohort == ["s0", "s1", "s3"]
        assert list(report.skipped) == ["s2"]
        assert report.num_examples == clean.num_examples == 11 + 18 + 32
        assert report.metrics["train_loss"] == pytest.approx(clean.metrics["train_loss"], rel=1e-6)
    reason = ends[0][1][0].skipped["s2"]
    assert ("ZeroDivisionError: a broken sensor" if module is FailsOn25 else "NaN or infinite") in reason


def test_a_clients_error_keeps_its_traceback() -> None:
    with pytest.raises(
        ClientError, match="Client 's2' failed in round 0: ZeroDivisionError: a broken sensor"
    ) as caught:
        fit_federated(FailsOn25(), sites(4))
    error = caught.value
    assert (error.client_id, error.round) == ("s2", 0)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert "training_step" in "".join(traceback.format_tb(error.__cause__.__traceback__))


class BrokenLoader:
    def __iter__(self) -> Any:
        raise OSError("the disk of the site is gone")


class BreaksLater(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 9:
            raise OSError("the disk of the site is gone")
        return torch.zeros(8), torch.tensor(0)


@pytest.mark.parametrize(
    "broken", [BrokenLoader, lambda: DataLoader(BreaksLater(), batch_size=4)], ids=["iter", "item"]
)
def test_the_first_error_is_the_one_that_is_told(broken: Any) -> None:
    with pytest.raises(ClientError, match="the disk of the site is gone") as caught:
        fit_federated(Classifier(), {"a": loader(), "b": broken()})
    assert isinstance(caught.value.__cause__, OSError)


def test_a_failed_client_does_not_spoil_the_next() -> None:
    """s2 fails in the middle of its training; who trains after it in the same lane is as good as alone."""
    start = Classifier()
    ends = []
    for ids in (("s2", "s1"), ("s1",)):
        server = FailsOn25()
        server.load_state_dict(start.state_dict())
        arguments: dict[str, Any] = {"sampler": Cohort(*ids), "num_lanes": 1, "on_bad_update": "skip"}
        if len(ids) == 2:
            with pytest.warns(UserWarning, match="'s2' is skipped"):
                fit_federated(server, sites(3), **arguments)
        else:
            fit_federated(server, sites(3), **arguments)
        ends.append(weights(server))
    assert_same_bits(*ends)


def test_a_misconfigured_module_is_no_clients_fault() -> None:
    class NoOptimizer(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise MisconfigurationException("wrong for everyone")

    with pytest.raises(MisconfigurationException, match="wrong for everyone"):
        fit_federated(NoOptimizer(), {"a": DataLoader(torch.randn(8, 32), batch_size=4)})


# ---- models that cannot travel --------------------------------------------------------------------------------------


def test_lazy_parameters_are_named() -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.LazyLinear(3)

    with pytest.raises(MisconfigurationException, match=r"Parameter 'late.weight' of Lazy has no shape yet"):
        fit_federated(Lazy(), sites(2))


def test_nothing_to_train_is_an_error() -> None:
    module = Classifier()
    module.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="no trainable parameter"):
        fit_federated(module, sites(2))


def test_a_module_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    module = Classifier()
    with open(tmp_path / "log", "w") as file:
        module.file = file
        with pytest.raises(MisconfigurationException, match="Classifier cannot be copied for the clients: TypeError"):
            fit_federated(module, sites(2))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class OtherAlgorithm(FedAvg):
    pass


def saved(folder: Path, rounds: int = 2, **arguments: Any) -> tuple[Classifier, str]:
    module, keep = Classifier(), ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    fit_federated(module, sites(3), max_rounds=rounds, enable_checkpointing=True, callbacks=[keep], **arguments)
    return module, str(folder / f"epoch={rounds - 1}.ckpt")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    _, path = saved(tmp_path / "a")
    for other in (Classifier(hidden=4), BoringModel()):
        before = weights(other)
        trainer = FederatedTrainer(max_rounds=4, **QUIET)
        with pytest.raises(MisconfigurationException, match=r"of another model: [0-9]+ tensors differ"):
            trainer.fit(other, sites(3), ckpt_path=path)
        assert_same_bits(before, weights(other))


def test_a_checkpoint_of_another_algorithm(tmp_path: Path) -> None:
    module, path = saved(tmp_path / "a")
    trainer = FederatedTrainer(max_rounds=4, algorithm=OtherAlgorithm(), **QUIET)
    with pytest.raises(MisconfigurationException, match=r"written by FedAvg, and this trainer runs OtherAlgorithm"):
        trainer.fit(module, sites(3), ckpt_path=path)


def test_a_checkpoint_of_no_federation(tmp_path: Path) -> None:
    module = Classifier()
    plain = fit_plain(module, loader(), enable_checkpointing=True)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match=r"no FederatedTrainer wrote.*load_from_checkpoint"):
        FederatedTrainer(max_rounds=2, **QUIET).fit(module, sites(2), ckpt_path=tmp_path / "plain.ckpt")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the third checkpoint's bytes reach the disk, over the name of the second one."""
    real, writes = LocalFileOpener.write, []

    def full(file: Any, data: Any) -> int:
        writes.append(file.path)
        if len(writes) != 3:
            return int(real(file, data))
        real(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    module = Classifier()
    keep = ModelCheckpoint(tmp_path / "kept", filename="last", save_top_k=1, enable_version_counter=False)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileOpener, "write", full)
        with pytest.raises(OSError, match="No space left on device"):
            fit_federated(module, ServedSites(sites(3)), max_rounds=5, enable_checkpointing=True, callbacks=[keep])
    assert [Path(path).name for path in writes] == ["last.ckpt"] * 3
    assert type(module) is Classifier
    (survivor,) = (tmp_path / "kept").glob("*.ckpt")
    checkpoint = torch.load(survivor, weights_only=True)
    assert checkpoint["fl_lightning"]["round"] == 2

    resumed = Classifier()
    again = ModelCheckpoint(tmp_path / "kept", filename="last", save_top_k=1, enable_version_counter=False)
    trainer = FederatedTrainer(**{**QUIET, "max_rounds": 4, "enable_checkpointing": True, "callbacks": [again]})
    trainer.fit(resumed, ServedSites(sites(3)), ckpt_path=survivor)
    assert trainer.current_round == 4
    assert Classifier.load_from_checkpoint(survivor).hparams["lr"] == 0.1
