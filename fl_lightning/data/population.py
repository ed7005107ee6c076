"""Every kind of population behind one interface: a data module that knows its clients, or a mapping of loaders."""

from __future__ import annotations

import inspect
from collections.abc import KeysView, Mapping, Sequence
from typing import Any

import numpy as np
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, SubsetRandomSampler

from fl_lightning.data.loaders import ClientLoaders
from fl_lightning.errors import MisconfigurationException
from fl_lightning.packages import lightning_base
from fl_lightning.types import ClientId, Population

__all__ = ["ClientPopulation", "MappingPopulation", "as_population", "client_size"]

_SCAN_ALWAYS = 10_000
"""Ids of at most so many clients are checked at every call; longer sequences once for each object and length."""


class MappingPopulation:
    """``{"site-a": loader, "site-b": loader}`` as a population, in the order of the mapping.

    A value that is a ``LightningDataModule`` becomes the client's data module.

    Args:
        loaders: anything that Lightning accepts as a train loader, by client id. The mapping is read at every call, so
            clients may come and go between rounds.

    Example:
        >>> sites = MappingPopulation({"site-a": [1, 2], "site-b": [3]})
        >>> sites.client_ids(), sites.client_dataloader("site-b")
        (['site-a', 'site-b'], [3])
    """

    def __init__(self, loaders: Mapping[ClientId, Any]) -> None:
        if not isinstance(loaders, Mapping) or not loaders:
            raise MisconfigurationException(
                f"MappingPopulation expected a mapping of at least one client id to a train loader, got {loaders!r}. "
                "Use for example {'site-a': loader_a, 'site-b': loader_b}."
            )
        self.loaders = loaders

    def client_ids(self) -> list[ClientId]:
        """Return the keys."""
        return list(self.loaders)

    def client_dataloader(self, client_id: ClientId) -> Any:
        """Return the loader of one client."""
        value = self._value(client_id)
        return value.train_dataloader() if _is_datamodule(value) else value

    def client_datamodule(self, client_id: ClientId) -> Any:
        """Return the data module of one client, or ``None`` when it brings a loader."""
        value = self._value(client_id)
        return value if _is_datamodule(value) else None

    def _value(self, client_id: ClientId) -> Any:
        if client_id not in self.loaders:
            raise MisconfigurationException(_unknown(client_id, list(self.loaders)))
        return self.loaders[client_id]


class ClientPopulation:
    """A checked population: what the rest of the house asks about clients, whatever it was made from.

    Methods that the source does not have return ``None``.

    Args:
        source: an object with ``client_ids()`` and ``client_dataloader(id)``.
    """

    def __init__(self, source: Population) -> None:
        self.source = source
        # the sequence itself is kept, so that its identity cannot be given to another one
        self._checked: tuple[Sequence[ClientId], int] | None = None

    def client_ids(self) -> Sequence[ClientId]:
        """Return the ids of the clients that exist now, as the source gave them.

        A ``range`` is returned as it is, and a long sequence is looked through only once: a million clients are free.

        Raises:
            MisconfigurationException: for ids that are no strings or integers, and for an id that stands twice.
        """
        ids = _as_sequence(self.source.client_ids(), type(self.source).__name__)
        if isinstance(ids, range):
            return ids
        if self._checked is not None and self._checked[0] is ids and self._checked[1] == len(ids):
            return ids
        _check_ids(ids)
        if len(ids) > _SCAN_ALWAYS:
            self._checked = ids, len(ids)
        return ids

    def client_dataloader(self, client_id: ClientId, batch_size: int | None = None) -> Any:
        """Return what the client trains on.

        Args:
            client_id: one of ``client_ids()``.
            batch_size: replaces the loader's batch size: by the source if it takes the argument, else the loader is
                built again.

        Raises:
            MisconfigurationException: when the source has no loader for the client, or cannot change its batch size.
        """
        if batch_size is None:
            loader = self.source.client_dataloader(client_id)
        elif _accepts_batch_size(self.source):
            loader = self.source.client_dataloader(client_id, batch_size=batch_size)  # type: ignore[call-arg]
        else:
            loader = self._with_batch_size(client_id, batch_size)
        if loader is None:
            raise MisconfigurationException(
                f"{type(self.source).__name__}.client_dataloader({client_id!r}) returned None. Return a train loader, "
                "or leave the client out of client_ids()."
            )
        return loader

    def client_size(self, client_id: ClientId) -> int | None:
        """Return the number of the client's training examples, or ``None`` when nothing tells it."""
        own = getattr(self.source, "client_size", None)
        if not callable(own):
            return _num_examples(self.source.client_dataloader(client_id))
        size = own(client_id)
        return None if size is None else int(size)

    def client_val_dataloader(self, client_id: ClientId) -> Any:
        """Return the client's own validation data, or ``None``."""
        return self._optional("client_val_dataloader", client_id)

    def client_eval_dataloader(self, client_id: ClientId) -> Any:
        """Return what the global model is evaluated on at this client: its part of the server's validation data if the
        source cuts those, else its own validation data, or ``None``.
        """
        loader = self._optional("client_eval_dataloader", client_id)
        return self.client_val_dataloader(client_id) if loader is None else loader

    def client_test_dataloader(self, client_id: ClientId) -> Any:
        """Return the client's own test data, or ``None``."""
        return self._optional("client_test_dataloader", client_id)

    def client_datamodule(self, client_id: ClientId) -> Any:
        """Return the client's ``LightningDataModule``, or ``None``."""
        return self._optional("client_datamodule", client_id)

    def _with_batch_size(self, client_id: ClientId, batch_size: int) -> Any:
        loader = self.source.client_dataloader(client_id)
        size = sized_len(getattr(loader, "dataset", None))
        if not isinstance(loader, DataLoader) or size is None:
            raise MisconfigurationException(
                f"A batch size of {batch_size} was asked for client {client_id!r}, whose loader is a "
                f"{type(loader).__name__} that cannot be built again. Use a torch DataLoader over a data set with a "
                "length, or give client_dataloader an argument batch_size=None and build the loader there."
            )
        loaders = ClientLoaders(loader, f"client_dataloader({client_id!r})")
        return loaders.build(np.arange(sized_len(loaders.dataset) or 0), batch_size)

    def _optional(self, name: str, client_id: ClientId) -> Any:
        method = getattr(self.source, name, None)
        return method(client_id) if callable(method) else None


def as_population(data: Any) -> ClientPopulation:
    """Return the population behind anything that may be passed to ``fit``.

    Args:
        data: a mapping ``{client id: train loader}``, a ``FederatedDataModule``, or any object with ``client_ids()``
            and ``client_dataloader(id)`` (and optionally ``client_size``, ``client_val_dataloader``,
            ``client_eval_dataloader``, ``client_test_dataloader``, ``client_datamodule``).

    Raises:
        MisconfigurationException: for data that do not say who their clients are.

    Example:
        >>> as_population({"site-a": [1, 2], "site-b": [3]}).client_ids()
        ['site-a', 'site-b']
    """
    if isinstance(data, ClientPopulation):
        return data
    if isinstance(data, Mapping):
        return ClientPopulation(MappingPopulation(data))
    if callable(getattr(data, "client_ids", None)) and callable(getattr(data, "client_dataloader", None)):
        return ClientPopulation(data)
    if _is_datamodule(data):
        raise MisconfigurationException(
            f"{type(data).__name__} does not say who its clients are. Cut it into clients with FederatedDataModule("
            f"{type(data).__name__}(...), Dirichlet(num_clients=100, alpha=0.3)), or give it client_ids() and "
            "client_dataloader(id)."
        )
    raise MisconfigurationException(
        f"Expected clients, got {type(data).__name__}. Pass a FederatedDataModule, a mapping "
        "{'site-a': loader_a, 'site-b': loader_b}, or an object with client_ids() and client_dataloader(id)."
    )


def client_size(population: Population, client_id: ClientId) -> int | None:
    """Return the number of a client's training examples, or ``None`` when nothing tells it.

    That is the population's own ``client_size(id)``; else the length of the loader's data set; else the number of
    batches times the batch size.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> client_size(MappingPopulation({"a": DataLoader(range(7), batch_size=2)}), "a")
        7
    """
    return as_population(population).client_size(client_id)


def _num_examples(loader: Any) -> int | None:
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    size = sized_len(getattr(loader, "dataset", None))
    if size is not None:
        return size
    num_batches, batch_size = sized_len(loader), getattr(loader, "batch_size", None)
    return num_batches * batch_size if num_batches is not None and isinstance(batch_size, int) else None


def _as_sequence(ids: Any, source: str) -> Sequence[ClientId]:
    if isinstance(ids, Sequence) and not isinstance(ids, str | bytes):
        return ids
    if isinstance(ids, KeysView):  # of a dictionary, in its order
        return list(ids)
    raise MisconfigurationException(
        f"Expected {source}.client_ids() to return a sequence of strings or integers, got {type(ids).__name__}. "
        "Return a list or a range (sorted(ids) for a set, ids.tolist() for an array)."
    )


def _check_ids(ids: Sequence[ClientId]) -> None:
    seen = set()
    for client_id in ids:
        if isinstance(client_id, bool) or not isinstance(client_id, str | int):
            raise MisconfigurationException(
                f"Expected client ids that are strings or integers, got {client_id!r} of type "
                f"{type(client_id).__name__}. Return str(id) or int(id) from client_ids()."
            )
        if client_id in seen:
            raise MisconfigurationException(
                f"Expected every client id once, got {client_id!r} twice. Give each client an id of its own."
            )
        seen.add(client_id)


def _unknown(client_id: ClientId, known: Sequence[ClientId]) -> str:
    shown = ", ".join(map(repr, known[:5])) + (", …" if len(known) > 5 else "")
    return f"Expected the id of one of {len(known)} clients ({shown}), got {client_id!r}. Take ids from client_ids()."


def _is_datamodule(value: Any) -> bool:
    return lightning_base(value, "LightningDataModule") is not None


def _accepts_batch_size(source: Any) -> bool:
    parameters = inspect.signature(source.client_dataloader).parameters.values()
    return any(p.name == "batch_size" or p.kind is p.VAR_KEYWORD for p in parameters)
