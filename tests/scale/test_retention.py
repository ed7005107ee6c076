"""Client memory on disk: what a checkpoint that exists may ask for stays, everything else goes."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scale_federation import Clients, Linear, fit
from torch import Tensor

from fl_lightning.retention import Retention
from fl_lightning.store import ClientStore

# Lightning would have the resumed fit save checkpoints too; here it must not, so that nothing is saved or deleted
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def run(root: Path, rounds: int, ckpt_path: Any = None, **arguments: Any) -> tuple[dict[str, Tensor], Path]:
    """Train three of five clients a round, whose momentum lives on, and return the weights and the run's folder."""
    torch.manual_seed(3)
    pl.seed_everything(11, verbose=False)
    module = Linear()
    trainer = fit_from(ckpt_path, module, root, max_rounds=rounds, **arguments)
    folder = Path(trainer.federated_folder)
    return copy.deepcopy(module.state_dict()), folder


def fit_from(ckpt_path: Any, module: pl.LightningModule, root: Path, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {
        "clients_per_round": 3,
        "client_state": "keep",
        "default_root_dir": root,
        "logger": True,
        "enable_checkpointing": True,
    }
    seen: list[str] = []

    class Folder(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            seen.append(str(trainer.federated_fit.federation.store.folder.parent))

    arguments = {**defaults, **arguments}
    arguments["callbacks"] = [*arguments.pop("callbacks", []), Folder()]
    trainer = fit(Clients(range(5)), module, ckpt_path=ckpt_path, **arguments)
    trainer.federated_folder = seen[0]
    return trainer


def memory_of(folder: Path) -> list[Path]:
    return sorted((folder / "memory").rglob("*.memory"))


def named_by(checkpoint: Path) -> dict[Any, str]:
    index: dict[Any, str] = torch.load(checkpoint, weights_only=True)["fl_lightning"]["memory"]
    return index


def test_only_the_newest_versions_stay_without_checkpoints(tmp_path: Path) -> None:
    _, folder = run(tmp_path, 12, enable_checkpointing=False)
    assert len(memory_of(folder)) == 5


@pytest.mark.parametrize(
    "saver",
    [
        {"every_n_epochs": 4, "save_top_k": -1},
        {"save_top_k": 2, "monitor": "loss", "mode": "max", "filename": "{epoch}"},
        {"save_top_k": 1, "save_last": True, "every_n_epochs": 3},
        {"save_top_k": 1, "save_last": "link"},
    ],
    ids=str,
)
def test_every_checkpoint_that_exists_resumes_to_the_bits_of_the_whole(saver: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", 12, enable_checkpointing=False)
    _, folder = run(tmp_path / "run", 10, callbacks=[ModelCheckpoint(**saver)])
    checkpoints = sorted(folder.rglob("*.ckpt"))
    assert checkpoints
    # nothing is kept that neither the federation (five clients) nor a checkpoint names
    assert len(memory_of(folder)) <= 5 + len({item for path in checkpoints for item in named_by(path).items()})
    for number, path in enumerate(checkpoints):
        resumed, _ = run(tmp_path / f"{number}", 12, ckpt_path=path, enable_checkpointing=False)
        assert all(torch.equal(resumed[name], value) for name, value in whole.items()), path.name


def contents(folder: Path, checkpoint: Path) -> dict[Any, Any]:
    """Return the memory that a checkpoint names."""
    store = ClientStore(folder / "memory")
    store.load_state_dict(named_by(checkpoint))
    return {client: store.get(client) for client in store.state_dict()}


def test_a_run_that_goes_on_in_its_folder_from_an_older_checkpoint_spares_the_newer_one(tmp_path: Path) -> None:
    saver = {"every_n_epochs": 3, "save_top_k": -1, "filename": "{epoch}"}
    _, folder = run(tmp_path, 9, callbacks=[ModelCheckpoint(tmp_path / "kept", **saver)], logger=False)
    older, newer = tmp_path / "kept" / "epoch=2.ckpt", tmp_path / "kept" / "epoch=8.ckpt"
    before = contents(folder, newer)
    # the same folder, since there is no logger; other clients take part, so other memory is written in rounds 3 to 8
    other = ModelCheckpoint(tmp_path / "other", save_top_k=1)
    _, same = run(tmp_path, 9, ckpt_path=older, callbacks=[other], logger=False, clients_per_round=4)
    assert same == folder
    assert_same(contents(folder, newer), before)
    (newest,) = (tmp_path / "other").glob("*.ckpt")
    assert named_by(newest) != named_by(newer)


def test_a_second_run_in_the_same_folder_spares_the_first_ones_checkpoint_elsewhere(tmp_path: Path) -> None:
    _, folder = run(tmp_path, 4, callbacks=[ModelCheckpoint(tmp_path / "a")], logger=False)
    (first,) = (tmp_path / "a").glob("*.ckpt")
    before = contents(folder, first)
    _, same = run(tmp_path, 5, callbacks=[ModelCheckpoint(tmp_path / "b")], logger=False, clients_per_round=2)
    assert same == folder
    assert_same(contents(folder, first), before)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    run(tmp_path, 3, logger=False, callbacks=[ModelCheckpoint(tmp_path / "c", save_top_k=0)])
    assert len(memory_of(folder)) <= 5, "what no checkpoint names any more is swept"


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def test_a_copy_of_a_run_resumes_when_the_original_has_gone_on(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", 8, enable_checkpointing=False)
    _, folder = run(tmp_path / "run", 4)
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (original,) = (folder / "checkpoints").glob("*.ckpt")
    (checkpoint,) = (copied / "checkpoints").glob("*.ckpt")
    shutil.rmtree(folder / "memory")
    original.unlink()
    resumed, _ = run(tmp_path / "more", 8, ckpt_path=checkpoint, enable_checkpointing=False)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_what_an_update_left_that_was_not_accepted_is_deleted(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.put("a", 0, {"x": 1})
    store.put("b", 0, {"x": 1})
    assert store.commit(["a"], 0) == []
    assert len(list(tmp_path.glob("*/*.memory"))) == 1
    assert store.get("b") == {}


def test_a_checkpoint_that_was_saved_after_a_fit_keeps_its_memory(tmp_path: Path) -> None:
    module = Linear()
    saver = ModelCheckpoint(tmp_path / "kept", save_top_k=0)
    trainer = fit_from(None, module, tmp_path, max_rounds=3, callbacks=[saver], logger=False)
    trainer.save_checkpoint(tmp_path / "elsewhere" / "after.ckpt")
    before = contents(Path(trainer.federated_folder), tmp_path / "elsewhere" / "after.ckpt")
    other = fit_from(None, Linear(), tmp_path, max_rounds=6, callbacks=[saver], logger=False)
    assert other.federated_folder == trainer.federated_folder
    assert_same(contents(Path(trainer.federated_folder), tmp_path / "elsewhere" / "after.ckpt"), before)


def test_files_of_a_killed_round_are_swept_at_the_next_start(tmp_path: Path) -> None:
    _, folder = run(tmp_path, 4, callbacks=[ModelCheckpoint(tmp_path / "kept", save_last=True)], logger=False)
    killed = ClientStore(folder / "memory")
    killed.put("of a killed round", 4, {"x": torch.ones(3)})
    (folder / "memory" / "00").mkdir(exist_ok=True)
    (folder / "memory" / "00" / "half.partial").write_bytes(b"half")
    silent = ModelCheckpoint(tmp_path / "kept", save_top_k=0)
    run(tmp_path, 5, ckpt_path=tmp_path / "kept" / "last.ckpt", callbacks=[silent], logger=False)
    assert not [path for path in memory_of(folder) if "killed" in path.name]
    assert not list((folder / "memory").rglob("*.partial"))


def test_nothing_from_before_is_deleted_when_a_checkpoint_cannot_be_read(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "memory")
    store.put("a", 0, {"x": 1})
    store.commit(["a"], 0)
    (tmp_path / "odd.ckpt").write_bytes(b"no checkpoint")
    again = ClientStore(tmp_path / "memory")
    retention = Retention(again)
    retention.start([tmp_path])
    again.put("a", 1, {"x": 2})
    retention.committed(again.commit(["a"], 1), 1)
    again.put("a", 2, {"x": 3})
    retention.committed(again.commit(["a"], 2), 2)
    assert len(list((tmp_path / "memory").glob("*/*.memory"))) == 2
    assert again.get("a") == {"x": 3}


@pytest.mark.parametrize("seed", range(30))
def test_the_law_under_random_checkpoints(seed: int, tmp_path: Path) -> None:
    """Whatever is saved, overwritten and deleted: what exists finds its memory, and nothing else stays for long."""
    dice, store = random.Random(seed), ClientStore(tmp_path / "memory")
    retention = Retention(store)
    saved: dict[Path, tuple[dict[Any, str], dict[Any, Any]]] = {}
    for round in range(40):
        cohort = dice.sample("abcdef", dice.randint(0, 4))
        for client in cohort:
            store.put(client, round, {"round": round})
        delivered = [client for client in cohort if dice.random() < 0.8]
        retention.committed(store.commit(delivered, round), round)
        if dice.random() < 0.5:
            path = tmp_path / f"{dice.randint(0, 5)}.ckpt"
            path.write_text("")
            index = store.state_dict()
            retention.saved(path)
            saved[path] = index, {client: store.get(client) for client in index}
        if saved and dice.random() < 0.4:
            victim = dice.choice(sorted(saved))
            victim.unlink()
            del saved[victim]
        for index, contents in saved.values():
            other = ClientStore(store.folder)
            other.load_state_dict(index)
            assert {client: other.get(client) for client in index} == contents
    retention.committed([], 40)
    named = set(store.state_dict().items()) | {item for index, _ in saved.values() for item in index.items()}
    assert len(list(store.folder.glob("*/*.memory"))) == len(named)
