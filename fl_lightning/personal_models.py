"""Every client's personal model as the user's own class: saved as a checkpoint, and loaded from a federation's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from fl_lightning.algorithms.base import PERSONAL
from fl_lightning.data import ClientPopulation
from fl_lightning.federation_settings import FederationSettings
from fl_lightning.models.adapters import merge_lora_state
from fl_lightning.store import ClientStore
from fl_lightning.types import ClientId, Memory, Tree

__all__ = ["SavesPersonalModels", "load_personal_model", "personal_tensors"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def personal_tensors(memory: Memory) -> dict[str, Tensor]:
    """Return what makes a client's model its own: layers that stay with it (FedPer, FedRep, FedBN) and the personal
    model of Ditto or APFL.

    Example:
        >>> memory = {"local": {"head": torch.ones(1)}, "personal": {"body": torch.zeros(1)}, "apfl": {"alpha": 0.5}}
        >>> sorted(personal_tensors(memory))
        ['body', 'head']
    """
    return {**memory.get("local", {}), **memory.get(PERSONAL, {})}


def load_personal_model(
    module_class: type[ModuleType] | ModuleType, checkpoint_path: str | Path, client_id: ClientId, **arguments: Any
) -> ModuleType:
    """Load a client's personal model from a checkpoint of a federation.

    The model is the checkpoint's global model with what the client had kept of its own at that round. A client that had
    not taken part by then has the global model.

    Args:
        module_class: the user's ``LightningModule``; or an instance, which is loaded in place and returned: for one
            that was changed after it was built, as by ``add_lora``.
        checkpoint_path: a checkpoint that a ``FederatedTrainer`` wrote, still in its run's folder, where the clients'
            memory is.
        client_id: the client, as ``client_ids()`` gives it; 1 and ``"1"`` are different clients.
        arguments: of ``module_class.load_from_checkpoint``.

    Raises:
        MisconfigurationException: for a checkpoint of no federation, or of one that keeps no personal models.
    """
    owner = module_class.__name__ if isinstance(module_class, type) else type(module_class).__name__
    plain = arguments.get("weights_only", True)  # of a checkpoint that may come from anywhere
    checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=plain)
    saved = checkpoint.get("fl_lightning")
    if saved is None:
        raise MisconfigurationException(
            f"{str(checkpoint_path)!r} was written by no FederatedTrainer, so no client has a model in it. A file of "
            f"save_personal_model is loaded by {owner}.load_from_checkpoint(path)."
        )
    store = _store_of(Path(checkpoint_path), saved)
    mine = _own_tensors(store, client_id, saved["algorithm"])
    if not mine:
        rank_zero_warn(
            f"Client {client_id!r} had not taken part when {str(checkpoint_path)!r} was written, if there is such a "
            "client: its model is the global one."
        )
    if isinstance(module_class, type):
        module: ModuleType = module_class.load_from_checkpoint(checkpoint_path, **arguments)  # type: ignore[attr-defined]
    else:
        module = module_class
        module.load_state_dict(checkpoint["state_dict"], strict=arguments.get("strict", True))
    _overlay(module, mine)
    return module


class SavesPersonalModels(pl.Trainer):
    """The part of ``FederatedTrainer`` that gives out personal models."""

    settings: FederationSettings
    client_memory: ClientStore | None = None
    """What clients kept in the last fit; ``None`` before the first one."""
    client_population: ClientPopulation | None = None
    """The clients of the last fit; ``None`` before the first one."""

    def save_personal_model(self, client_id: ClientId, filepath: str | Path, merge_lora: bool = False) -> None:
        """Save a client's personal model as a checkpoint of the user's own class, after ``fit``.

        ``MyModule.load_from_checkpoint(filepath)`` then gives it back, in plain Lightning: the global model with the
        layers that stay with this client (``FedPer``, ``FedRep``, ``batch_norm="local"``), or its own model of
        ``Ditto`` or ``APFL``. A client that has not taken part has the global model. With several processes all of them
        must call it.

        Args:
            client_id: the client, as ``client_ids()`` gives it; 1 and ``"1"`` are different clients.
            filepath: where to write.
            merge_lora: fold LoRA adapters into the weights of their layers, so that the class itself loads the file
                when ``add_lora`` changed an instance of it.

        Raises:
            MisconfigurationException: before a fit has ended, for an algorithm that keeps no personal models, or for a
                client that does not exist.
        """
        if self.client_memory is None or self.lightning_module is None:
            raise MisconfigurationException(
                "save_personal_model has no personal models yet: call it after trainer.fit has ended. From a "
                "checkpoint of a federation use load_personal_model(MyModule, path, client_id)."
            )
        if self.client_population is not None and client_id not in self.client_population.client_ids():
            raise MisconfigurationException(
                f"save_personal_model was asked for client {client_id!r}, and the population has no such client. Use "
                "the ids as client_ids() gives them: 1 and '1' are different clients."
            )
        mine = _own_tensors(self.client_memory, client_id, type(self.settings.algorithm).__name__)
        with _replaced(self.lightning_module, mine), _merged(self.lightning_module, merge_lora):
            super().save_checkpoint(filepath, weights_only=True)  # of the module alone, not of the federation


@contextmanager
def _merged(module: nn.Module, merge: bool) -> Iterator[None]:
    """Let the module's state be that of a module without adapters inside the block."""
    if not merge:
        yield
        return
    hook = module.register_state_dict_post_hook(lambda module, state, *_: merge_lora_state(module, state))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _replaced(module: nn.Module, tensors: Tree) -> Iterator[None]:
    own = _tensors(module)
    before = {name: own[name].detach().clone() for name in tensors}
    _overlay(module, tensors)
    try:
        yield
    finally:
        _overlay(module, before)


@torch.no_grad()
def _overlay(module: nn.Module, tensors: Tree) -> None:
    own = _tensors(module)
    for name, value in tensors.items():
        own[name].copy_(value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _own_tensors(store: ClientStore, client_id: ClientId, algorithm: str) -> Mapping[str, Tensor]:
    """Return what a client keeps of its own; of one that has not taken part in such a federation, nothing."""
    mine = personal_tensors(store.get(client_id))
    known = list(store.state_dict())
    if not mine and not any(personal_tensors(store.get(other)) for other in known[:1]):
        raise MisconfigurationException(
            f"Client {client_id!r} keeps no model of its own under {algorithm}: nobody does. Clients that took part "
            "keep one with FedPer, FedRep, Ditto, APFL or batch_norm='local'. What personalize_epochs makes of a model "
            "is evaluated and forgotten: load the global one, and train it by lightning.Trainer(max_epochs=...) on the "
            "client's data."
        )
    return mine


def _store_of(checkpoint_path: Path, saved: Mapping[str, Any]) -> ClientStore:
    """Return the memory as it was when the checkpoint was written, wherever its run's folder is now."""
    beside = checkpoint_path.resolve().parent.parent / "memory"  # <version>/checkpoints/<file>
    folder = beside if beside.is_dir() else Path(saved["folder"]) / "memory"
    store = ClientStore(folder)
    store.load_state_dict(saved["memory"])
    return store
