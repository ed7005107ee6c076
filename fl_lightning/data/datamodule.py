"""An ordinary data module becomes a population of clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from fl_lightning.data.loaders import ClientLoaders, recorded_arguments
from fl_lightning.data.partition import Partition, label_counts, total_variation
from fl_lightning.data.partitioners import Partitioner
from fl_lightning.data.targets import find_targets
from fl_lightning.errors import MisconfigurationException
from fl_lightning.packages import lightning_base
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId

__all__ = ["FederatedDataModule"]

# what Lightning asks `is_overridden` about: present here exactly when the wrapped module has it
_HOOKS = (
    "prepare_data", "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader", "state_dict",
    "load_state_dict", "on_exception", "on_before_batch_transfer", "transfer_batch_to_device",
    "on_after_batch_transfer",
)  # fmt: skip
_SETTINGS = (
    "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices", "_log_hyperparams", "_hparams_name",
)  # fmt: skip


class FederatedDataModule(LightningDataModule):
    """Cuts the training data of a data module into clients, and is that data module in everything else.

    Every hook of the wrapped module is called as Lightning calls it, and hooks that it does not override count as not
    overridden. ``val_dataloader()`` and friends are the server's. The wrapped ``train_dataloader()`` is called once
    after ``setup``; a client's loader is a copy of that loader over an index view of the same data set
    (:class:`fl_lightning.data.loaders.ClientLoaders` says what is kept). Attributes that are not found here are looked
    up in the wrapped module. In a plain ``lightning.Trainer`` this is the pooled data.

    Args:
        datamodule: a ``LightningDataModule`` of ``lightning`` or ``pytorch_lightning``, or an object with its hooks.
        partitioner: who gets which example.
        client_val_fraction: part of each client's examples, in ``[0, 1)``, that is held out for
            ``client_val_dataloader``; a client keeps at least one example to train on.

    Raises:
        MisconfigurationException: for a module without ``train_dataloader``, something else than a partitioner, or a
            fraction out of range.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from fl_lightning.data import IID
        >>> data = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10) % 2)
        >>> pooled = LightningDataModule.from_datasets(data, batch_size=4)
        >>> clients = FederatedDataModule(pooled, IID(num_clients=2))
        >>> clients.client_ids(), clients.client_size(0), len(clients.client_dataloader(0))
        (range(0, 2), 5, 2)
    """

    def __init__(
        self, datamodule: LightningDataModule, partitioner: Partitioner, client_val_fraction: float = 0.0
    ) -> None:
        _check_arguments(datamodule, partitioner, client_val_fraction)
        self.datamodule = datamodule
        self.partitioner = partitioner
        self.client_val_fraction = client_val_fraction
        super().__init__()
        for name in _HOOKS:
            if _defines(datamodule, name):
                setattr(self, name, getattr(datamodule, name))
        for name in _SETTINGS:
            if hasattr(datamodule, name):
                setattr(self, name, getattr(datamodule, name))
        self._was_set_up = False
        self._forget()

    # Lightning's own hooks

    def setup(self, stage: str | None = None) -> None:
        self._forget()  # the wrapped module may make other data sets now
        self._call("setup", stage)
        self._was_set_up = True

    def teardown(self, stage: str | None = None) -> None:
        self._call("teardown", stage)

    @property
    def trainer(self) -> Any:
        """The Trainer, which the wrapped module sees too."""
        return getattr(self.datamodule, "trainer", None)

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self.datamodule.trainer = trainer

    @property
    def hparams(self) -> Any:
        """The wrapped module's hyperparameters, so that its own ``load_from_checkpoint`` works."""
        return getattr(self.datamodule, "hparams", {})

    @property
    def hparams_initial(self) -> Any:
        """The wrapped module's hyperparameters as they were at first."""
        return getattr(self.datamodule, "hparams_initial", {})

    def __getattr__(self, name: str) -> Any:
        # dunder names are asked for by copy and pickle before there is a wrapped module to ask
        if name.startswith("__") or "datamodule" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if hasattr(type(self), name):  # a property raised: its own error says more than a missing name
            return object.__getattribute__(self, name)
        return getattr(self.datamodule, name)

    # the population

    def client_ids(self) -> Sequence[ClientId]:
        """Return ``range(num_clients)``, or the ids that the data name."""
        if self.partitioner.client_ids is not None:
            return self.partitioner.client_ids
        return self.partition.client_ids

    def client_size(self, client_id: ClientId) -> int:
        """Return the number of the client's training examples."""
        size = self.partition.size(client_id)
        return size - self._num_held_out(size)

    def client_dataloader(self, client_id: ClientId, batch_size: int | None = None) -> DataLoader[Any]:
        """Return the client's training loader.

        Args:
            client_id: one of ``client_ids()``.
            batch_size: replaces the batch size of the wrapped module's loader.

        Raises:
            MisconfigurationException: for an unknown client, or a loader that cannot be built again.
        """
        return self._train.build(self._client_indices(client_id)[0], batch_size)

    def client_val_dataloader(self, client_id: ClientId) -> DataLoader[Any] | None:
        """Return the client's held-out training examples in order, or ``None`` when there are none."""
        held_out = self._client_indices(client_id)[1]
        return self._train.build(held_out, order="evaluation") if len(held_out) else None

    def client_eval_dataloader(self, client_id: ClientId) -> DataLoader[Any] | list[DataLoader[Any]] | None:
        """Return the client's part of the server's validation data in order, or ``None`` when it has none.

        The validation data are cut by the same partitioner, so a client sees the label distribution of its training
        data. Of several validation loaders the client gets its part of each, as a list of the same length.
        """
        self.partition.size(client_id)  # raises for an unknown client
        nobody = np.empty(0, np.int64)
        shares = [
            partition[client_id] if client_id in partition else nobody  # noqa: SIM401 (an unknown id is no KeyError)
            for _, partition in self._evaluation
        ]
        if not any(len(share) for share in shares):
            return None
        parts = [
            loaders.build(share, order="evaluation")
            for (loaders, _), share in zip(self._evaluation, shares, strict=True)
        ]
        return parts if len(parts) > 1 else parts[0]

    @property
    def partition(self) -> Partition:
        """Which training examples belong to which client."""
        if self._partition_cache is None:
            self._partition_cache = self.partitioner.split(self._train.dataset, targets=self._partition_targets())
        return self._partition_cache

    # the picture

    def label_counts(self, max_clients: int = 200) -> tuple[list[ClientId], list[Any], NDArray[np.int64]]:
        """Return label counts of at most ``max_clients`` clients, evenly spaced over all.

        Samples are read for this only when there is a ``target_fn``, or when the partitioner had to.

        Returns:
            The clients' ids, the classes, and the counts.

        Shape:
            ``(clients, classes)``

        Raises:
            MisconfigurationException: when the data set stores no labels.
        """
        ids = _evenly_spaced(self.client_ids(), max_clients)
        classes, labels = self._classes()
        return ids, classes.tolist(), label_counts(self.partition, labels, len(classes), ids)

    def distance_to_global(self, max_clients: int = 200) -> NDArray[np.float64]:
        """Return the total variation distance of each client's labels to everyone's, for the clients of
        :meth:`label_counts`.

        Shape:
            ``(clients,)``, in ``[0, 1]``
        """
        _, classes, counts = self.label_counts(max_clients)
        return total_variation(counts, np.bincount(self._classes()[1], minlength=len(classes)))

    # inside

    _train_cache: ClientLoaders | None
    _partition_cache: Partition | None
    _evaluation_cache: list[tuple[ClientLoaders, Partition]] | None
    _targets: NDArray[Any] | None

    def _forget(self) -> None:
        self._train_cache = self._partition_cache = self._evaluation_cache = self._targets = None

    def _call(self, hook: str, stage: str | None) -> None:
        function: Callable[..., Any] | None = getattr(self.datamodule, hook, None)
        if function is not None:
            function(stage)

    def _loader(self, hook: str) -> Any:
        try:
            with recorded_arguments():
                return getattr(self.datamodule, hook)()
        except (AttributeError, TypeError) as error:
            if self._was_set_up:
                raise
            raise MisconfigurationException(
                f"{type(self.datamodule).__name__}.{hook}() failed: {error}. Outside of a trainer call "
                "prepare_data() and setup('fit') before asking for clients."
            ) from error

    @property
    def _train(self) -> ClientLoaders:
        if self._train_cache is None:
            self._train_cache = ClientLoaders(self._loader("train_dataloader"))
        return self._train_cache

    @property
    def _evaluation(self) -> list[tuple[ClientLoaders, Partition]]:
        if self._evaluation_cache is None:
            given = self._loader("val_dataloader") if _defines(self.datamodule, "val_dataloader") else None
            several = given if isinstance(given, list | tuple) else [given]
            wrapped = [ClientLoaders(loader, "val_dataloader()") for loader in several if loader is not None]
            self._evaluation_cache = [
                (loaders, self.partitioner.split(loaders.dataset, allow_empty=True)) for loaders in wrapped
            ]
        return self._evaluation_cache

    def _partition_targets(self) -> NDArray[Any] | None:
        if self.partitioner.needs_targets and self._targets is None:
            self._targets = self.partitioner.find_targets(self._train.dataset)
        return self._targets

    def _classes(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        targets = self._partition_targets()
        if targets is None:
            self._targets = targets = find_targets(self._train.dataset, self.partitioner.target_fn, iterate=False)
        if targets is None:
            raise MisconfigurationException(
                f"{type(self._train.dataset).__name__} stores no labels (.targets, .labels or .y), so there is nothing "
                "to count. Pass the partitioner target_fn=lambda sample: <label> to read them from the samples."
            )
        classes, labels = np.unique(targets, return_inverse=True)
        return classes, labels.astype(np.int64)

    def _num_held_out(self, size: int) -> int:
        return min(round(self.client_val_fraction * size), size - 1)

    def _client_indices(self, client_id: ClientId) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        indices = self.partition[client_id]
        held_out = self._num_held_out(len(indices))
        if held_out < 1:
            return indices, indices[:0]
        seed = seed_for(self.partitioner.seed, -1, client_id, "held-out examples")
        shuffled = np.random.default_rng(seed).permutation(indices)
        return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def _check_arguments(datamodule: Any, partitioner: Any, client_val_fraction: float) -> None:
    if not callable(getattr(datamodule, "train_dataloader", None)):
        raise MisconfigurationException(
            "FederatedDataModule expected a LightningDataModule (or an object with train_dataloader()), got "
            f"{type(datamodule).__name__}. Use LightningDataModule.from_datasets(...) around plain data sets."
        )
    if callable(getattr(datamodule, "client_dataloader", None)):
        raise MisconfigurationException(
            f"{type(datamodule).__name__} knows its clients already (it has client_dataloader). "
            "Pass it to the trainer without FederatedDataModule."
        )
    if not isinstance(partitioner, Partitioner):
        raise MisconfigurationException(
            f"FederatedDataModule expected a partitioner, got {type(partitioner).__name__}. "
            "Use for example Dirichlet(num_clients=100, alpha=0.3)."
        )
    if not 0.0 <= client_val_fraction < 1.0:
        raise MisconfigurationException(
            f"FederatedDataModule expected client_val_fraction in [0, 1), got {client_val_fraction!r}. "
            "Use 0 to hold nothing out."
        )


def _defines(datamodule: Any, hook: str) -> bool:
    """Whether Lightning would call the hook overridden, for a data module of either package or a plain object."""
    base = lightning_base(datamodule, "LightningDataModule")
    if base is not None:
        return is_overridden(hook, datamodule, base)
    return callable(getattr(datamodule, hook, None))


def _evenly_spaced(client_ids: Sequence[ClientId], at_most: int) -> list[ClientId]:
    if len(client_ids) <= at_most:
        return list(client_ids)
    return [client_ids[position * len(client_ids) // at_most] for position in range(at_most)]
