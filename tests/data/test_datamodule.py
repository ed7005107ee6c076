"""FederatedDataModule against the plain Lightning Trainer with the module that it wraps."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fl_lightning.data import IID, Dirichlet, FederatedDataModule, Natural
from fl_lightning.errors import MisconfigurationException

pytestmark = [
    # Lightning's own use of torch, and its `from_datasets`, which pins memory on machines that have nothing to pin for
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # the tests are about data: two cores and an empty log folder are as they should be
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*[Cc]heckpoint directory.*exists and is not empty.*"),
]

HOOKS = [
    "prepare_data", "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "state_dict", "load_state_dict",
    "on_exception",
]  # fmt: skip


def toy(length: int = 40, classes: int = 4) -> TensorDataset:
    return TensorDataset(torch.arange(float(length))[:, None].expand(-1, 32), torch.arange(length) % classes)


class Toy(lightning.LightningDataModule):
    """Overrides no hook but these, and counts."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_classes = 4
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.train, self.val = toy(), toy(20)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self) -> DataLoader[Any]:
        self.calls.append("train_dataloader")
        return DataLoader(self.train, batch_size=self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=8)


class Stateful(Toy):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append(f"loaded {state_dict['seen']}")

    def on_exception(self, exception: BaseException) -> None:
        self.calls.append(f"exception {type(exception).__name__}")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("batch")
        return batch


class ThirdParty(pytorch_lightning.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(toy(), batch_size=4)


class Duck:
    """No LightningDataModule at all, just the hooks."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(toy(), batch_size=4)


class Model(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return super().validation_step(batch[0], batch_idx)


def trainer(path: Path, **kwargs: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {
        "max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "accelerator": "cpu", "devices": 1, "default_root_dir": path, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return lightning.Trainer(**{**quiet, **kwargs})


@pytest.mark.parametrize("inner", [Toy(), Stateful(), BoringDataModule()])
def test_hooks_count_as_overridden_exactly_where_they_are(inner: lightning.LightningDataModule) -> None:
    wrapped = FederatedDataModule(inner, IID(2))
    for hook in HOOKS:
        assert is_overridden(hook, wrapped) == is_overridden(hook, inner), hook
    # a hook of the model must win when the data module has none, also inside the wrapper
    selector = _DataHookSelector(BoringModel(), wrapped)
    for hook in selector._valid_hooks:
        plain = _DataHookSelector(BoringModel(), inner).get_instance(hook)
        assert isinstance(selector.get_instance(hook), BoringModel) == isinstance(plain, BoringModel)


def test_third_party_and_duck_modules() -> None:
    for inner in (ThirdParty(), Duck()):
        wrapped = FederatedDataModule(inner, IID(4))  # type: ignore[arg-type]
        wrapped.setup("fit")
        wrapped.teardown("fit")
        assert is_overridden("train_dataloader", wrapped)
        assert not is_overridden("val_dataloader", wrapped)
        assert wrapped.client_size(3) == 10
        assert wrapped.client_eval_dataloader(3) is None


@pytest.mark.parametrize("hold_out", [0.0, 0.5])
def test_in_a_plain_trainer_it_is_the_wrapped_module(tmp_path: Path, hold_out: float) -> None:
    def run(wrap: bool) -> tuple[list[torch.Tensor], list[str]]:
        lightning.seed_everything(1, verbose=False)
        inner, model = Stateful(), Model()
        trainer(tmp_path, enable_checkpointing=False).fit(
            model, datamodule=FederatedDataModule(inner, IID(3), hold_out) if wrap else inner
        )
        return [parameter.detach() for parameter in model.parameters()], inner.calls

    (ours, our_calls), (theirs, their_calls) = run(True), run(False)
    assert our_calls == their_calls
    assert our_calls.count("train_dataloader") == 1
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_state_and_hyperparameters_in_checkpoints(tmp_path: Path) -> None:
    inner = Stateful(batch_size=5)
    run = trainer(tmp_path)
    run.fit(Model(), datamodule=FederatedDataModule(inner, IID(3)))
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert Toy.load_from_checkpoint(path).hparams["batch_size"] == 5  # the user's own class, from our checkpoint
    again = Stateful(batch_size=5)
    trainer(tmp_path, max_epochs=2).fit(Model(), datamodule=FederatedDataModule(again, IID(3)), ckpt_path=path)
    assert "loaded 7" in again.calls


def test_exceptions_reach_the_wrapped_module(tmp_path: Path) -> None:
    class Broken(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    inner = Stateful()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, enable_checkpointing=False).fit(Broken(), datamodule=FederatedDataModule(inner, IID(3)))
    assert "exception ZeroDivisionError" in inner.calls


def test_trainer_and_attributes_pass_through() -> None:
    inner = Toy()
    wrapped = FederatedDataModule(inner, IID(3))
    marker = object()
    wrapped.trainer = marker
    assert inner.trainer is marker
    assert wrapped.trainer is marker
    assert wrapped.num_classes == 4  # modules read self.trainer.datamodule.num_classes
    assert not hasattr(wrapped, "client_datamodule")


def test_clients_have_all_examples_once_and_the_loader_is_asked_once() -> None:
    inner = Toy()
    wrapped = FederatedDataModule(inner, Dirichlet(5, 0.5))
    wrapped.prepare_data()
    wrapped.setup("fit")
    rows = [
        float(row)
        for client in wrapped.client_ids()
        for batch in wrapped.client_dataloader(client)
        for row in batch[0][:, 0]
    ]
    assert sorted(rows) == list(range(40))
    assert inner.calls.count("train_dataloader") == 1
    assert [wrapped.client_size(client) for client in wrapped.client_ids()] == wrapped.partition.sizes().tolist()
    assert wrapped.client_dataloader(0).batch_size == 4
    assert wrapped.client_dataloader(0, batch_size=2).batch_size == 2
    wrapped.setup("fit")  # other data may be there now
    wrapped.client_dataloader(0)
    assert inner.calls.count("train_dataloader") == 2


def rows_of(loader: Any) -> list[float]:
    return [] if loader is None else [float(row) for batch in loader for row in batch[0][:, 0]]


def test_held_out_examples() -> None:
    wrapped = FederatedDataModule(Toy(), IID(4), client_val_fraction=0.3)
    wrapped.setup("fit")
    for client in range(4):
        train, held_out = rows_of(wrapped.client_dataloader(client)), rows_of(wrapped.client_val_dataloader(client))
        assert len(held_out) == 3
        assert len(train) == wrapped.client_size(client) == 7
        assert sorted(train + held_out) == sorted(wrapped.partition[client].tolist())
        assert held_out == sorted(held_out) == rows_of(wrapped.client_val_dataloader(client))
    assert FederatedDataModule(Toy(), IID(40), 0.9).client_val_fraction == 0.9
    lonely = FederatedDataModule(Toy(), IID(40), 0.9)
    lonely.setup("fit")
    assert lonely.client_size(3) == 1
    assert lonely.client_val_dataloader(3) is None
    nothing = FederatedDataModule(Toy(), IID(4))
    nothing.setup("fit")
    assert nothing.client_val_dataloader(0) is None


def test_evaluation_clients_share_the_validation_data() -> None:
    wrapped = FederatedDataModule(Toy(), Dirichlet(30, 0.1, seed=1))
    wrapped.setup("fit")
    parts = [rows_of(wrapped.client_eval_dataloader(client)) for client in wrapped.client_ids()]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == list(range(20))
    assert [] in parts
    for client, part in zip(wrapped.client_ids(), parts, strict=True):
        assert (wrapped.client_eval_dataloader(client) is None) == (not part)


def test_evaluation_clients_get_their_part_of_each_of_several_loaders() -> None:
    class Two(Toy):
        def val_dataloader(self) -> Any:
            whole = super().val_dataloader()
            return [whole, DataLoader(Subset(whole.dataset, range(3)), batch_size=2)]

    wrapped = FederatedDataModule(Two(), IID(4, seed=1))
    wrapped.setup("fit")
    first, second = zip(*(wrapped.client_eval_dataloader(client) for client in wrapped.client_ids()), strict=True)
    assert sorted(row for loader in first for row in rows_of(loader)) == list(range(20))
    assert sorted(row for loader in second for row in rows_of(loader)) == [0, 1, 2]
    assert min(len(loader) for loader in second) == 0  # it keeps its place


@pytest.mark.parametrize("loaders", [None, []])
def test_no_validation_data(loaders: Any) -> None:
    class NoValidation(Toy):
        def val_dataloader(self) -> Any:
            return loaders

    wrapped = FederatedDataModule(NoValidation(), IID(2))
    wrapped.setup("fit")
    assert wrapped.client_eval_dataloader(0) is None


class Sites(Dataset[Any]):
    def __init__(self, sites: list[str]) -> None:
        self.sites = sites

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> Any:
        return torch.full((2,), float(index)), 0


def test_natural_clients_keep_their_names_in_validation() -> None:
    inner = lightning.LightningDataModule.from_datasets(Sites(["b", "a", "b"]), Sites(["b", "c"]), batch_size=2)
    wrapped = FederatedDataModule(inner, Natural("sites"))
    assert wrapped.client_ids() == ["a", "b"]
    assert wrapped.client_eval_dataloader("a") is None
    assert rows_of(wrapped.client_eval_dataloader("b")) == [0.0]


def test_label_counts_and_distances() -> None:
    wrapped = FederatedDataModule(Toy(), Dirichlet(8, 0.2, seed=3))
    wrapped.setup("fit")
    ids, classes, counts = wrapped.label_counts()
    assert (ids, classes) == (list(range(8)), [0, 1, 2, 3])
    np.testing.assert_array_equal(counts.sum(axis=0), 10)
    np.testing.assert_array_equal(counts.sum(axis=1), wrapped.partition.sizes())
    from scipy.spatial.distance import cityblock

    expected = [cityblock(row / row.sum(), np.full(4, 0.25)) / 2 for row in counts]
    np.testing.assert_allclose(wrapped.distance_to_global(), expected)
    ids, _, counts = wrapped.label_counts(max_clients=3)
    assert ids == [0, 2, 5]
    assert counts.shape == (3, 4)
    np.testing.assert_allclose(wrapped.distance_to_global(3), np.array(expected)[ids])  # global means everyone


def test_pictures_do_not_read_every_sample() -> None:
    wrapped = FederatedDataModule(lightning.LightningDataModule.from_datasets(Sites(["a", "b"])), Natural("sites"))
    with pytest.raises(MisconfigurationException, match=r"Sites stores no labels .*target_fn"):
        wrapped.label_counts()
    wrapped.partitioner.target_fn = lambda sample: sample[1]
    assert wrapped.label_counts()[1] == [0]


def test_copies_and_pickles() -> None:
    wrapped = FederatedDataModule(Toy(), IID(4, seed=2))
    wrapped.setup("fit")
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert copied.datamodule is not wrapped.datamodule
        assert copied.val_dataloader.__self__ is copied.datamodule
        assert copied.partition[1].tolist() == wrapped.partition[1].tolist()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: FederatedDataModule(toy(), IID(2)), r"expected a LightningDataModule .*got TensorDataset"),  # type: ignore[arg-type]
        (lambda: FederatedDataModule(Toy(), 10), r"expected a partitioner, got int"),  # type: ignore[arg-type]
        (lambda: FederatedDataModule(Toy(), IID(2), 1.0), r"client_val_fraction in \[0, 1\), got 1.0"),
        (
            lambda: FederatedDataModule(FederatedDataModule(Toy(), IID(2)), IID(2)),
            r"FederatedDataModule knows its clients already",
        ),
        (lambda: FederatedDataModule(Toy(), IID(2)).client_size(0), r"setup\('fit'\) before asking for clients"),
        (lambda: FederatedDataModule(Duck(), IID(2)).client_size(2), r"one of 2 clients \(0, 1\), got 2"),  # type: ignore[arg-type]
        (lambda: FederatedDataModule(Duck(), IID(2)).client_eval_dataloader("0"), r"got '0'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(act: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        act()


def test_errors_in_the_users_hook_stay_themselves() -> None:
    class Broken(Toy):
        def train_dataloader(self) -> Any:
            raise AttributeError("no such thing as my_dataset")

    wrapped = FederatedDataModule(Broken(), IID(2))
    wrapped.setup("fit")
    with pytest.raises(AttributeError, match="no such thing as my_dataset"):
        wrapped.client_size(0)
