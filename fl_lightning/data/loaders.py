"""One user's DataLoader becomes the loader of each client: same settings, the client's examples only."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
from lightning.fabric.utilities.data import (
    _reinstantiate_wrapped_cls,
    _replace_dunder_methods,
    _replace_value_in_saved_args,
    sized_len,
)
from lightning.pytorch.utilities.data import _get_dataloader_init_args_and_kwargs
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler, SubsetRandomSampler

from fl_lightning.data.samplers import ClientSubset, client_sampler, rebuilt
from fl_lightning.errors import EmptyClientError, MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["ClientLoaders", "recorded_arguments", "require_batches"]

_INSTEAD = "Or give your data module client_ids() and client_dataloader(id), and pass it without FederatedDataModule."


class ClientLoaders:
    """Builds the loader of one client after the pattern of the user's loader for everyone.

    Kept: the class (a subclass is built again), batch size, collate function, workers, pinning, ``drop_last``, timeout,
    ``worker_init_fn``, multiprocessing context, prefetching, persistent workers, and attributes set afterwards.

    The sampler becomes its like over the client's examples: shuffled, sequential, weighted (with the client's weights;
    the number of draws is cut to the client's share) or distributed (its ``shuffle`` is kept; its division among
    processes is not, since a client is on one device). A ``SubsetRandomSampler`` says which examples are in use at
    all. Custom samplers and batch samplers are built again, per-example arguments cut to the client.

    A ``generator`` is not carried over: all clients would draw from the one, so that one client's order would depend on
    who trained before. Loaders draw from torch's global generator, which the federation seeds for each client.

    Args:
        loader: the loader for everyone.
        name: where it came from, for errors.

    Raises:
        MisconfigurationException: for anything but one ``DataLoader`` over one map-style data set.

    Example:
        >>> loaders = ClientLoaders(DataLoader(range(100, 110), batch_size=2))
        >>> [batch.tolist() for batch in loaders.build(np.array([0, 5, 9]))]
        [[100, 105], [109]]
    """

    def __init__(self, loader: Any, name: str = "train_dataloader()") -> None:
        self._loader = _one_loader(loader, name)
        self._whole: Any = self._loader.dataset
        self._used: NDArray[np.int64] | None = None
        sampler = getattr(self._loader.batch_sampler, "sampler", self._loader.sampler)
        if type(sampler) is SubsetRandomSampler:  # a common way to hold out validation data
            self._used = np.asarray(sampler.indices, dtype=np.int64)

    @property
    def dataset(self) -> Any:
        """The data that the loader for everyone really uses, which is what is to be cut into clients."""
        return self._whole if self._used is None else ClientSubset(self._whole, self._used)

    @property
    def batch_size(self) -> int | None:
        """Examples in a batch; ``None`` when the loader does not batch or its batch sampler does not say."""
        size = self._loader.batch_size or getattr(self._loader.batch_sampler, "batch_size", None)
        return size if isinstance(size, int) else None

    def build(
        self,
        indices: NDArray[np.int64],
        batch_size: int | None = None,
        order: Literal["train", "evaluation"] = "train",
    ) -> DataLoader[Any]:
        """Return the loader of the client with these examples.

        Args:
            indices: positions in ``self.dataset``.
            batch_size: replaces the batch size; ``None`` keeps it.
            order: ``"train"`` keeps the sampler's policy; ``"evaluation"`` goes once through all examples in order,
                an incomplete last batch included.

        Raises:
            MisconfigurationException: when the loader or its sampler cannot be built again.
        """
        data = ClientSubset(self._whole, indices if self._used is None else self._used[indices])
        try:
            arguments = self._evaluation(data) if order == "evaluation" else self._training(data)
            if batch_size is not None:
                self._set_batch_size(arguments, batch_size)
            built: DataLoader[Any] = _reinstantiate_wrapped_cls(self._loader, *arguments.args, **arguments.kwargs)
        except (TypeError, MisconfigurationException) as error:
            raise MisconfigurationException(
                f"{type(self._loader).__name__} could not be built again for one client: {error}\n"
                f"Build it in train_dataloader(), and keep its arguments as attributes of the same names. {_INSTEAD}"
            ) from error
        return built

    def _training(self, data: ClientSubset) -> _Arguments:
        batch_sampler = self._loader.batch_sampler
        if batch_sampler is None or type(batch_sampler) is BatchSampler:
            sampler = self._loader.sampler if batch_sampler is None else batch_sampler.sampler
            return self._arguments(data, client_sampler(sampler, self._whole, data))
        inner = getattr(batch_sampler, "sampler", None)
        ours = None if inner is None else client_sampler(inner, self._whole, data)
        arguments = self._arguments(data, SequentialSampler(data))
        for name, value in (("sampler", None), ("batch_size", 1), ("drop_last", False)):
            arguments.set(name, value)
        arguments.set("batch_sampler", rebuilt(batch_sampler, self._whole, data, ours))
        return arguments

    def _evaluation(self, data: ClientSubset) -> _Arguments:
        arguments = self._arguments(data, SequentialSampler(data))
        if self._loader.batch_sampler is not None:
            arguments.set("batch_size", self.batch_size or 1)
        arguments.set("drop_last", False)
        return arguments

    def _arguments(self, data: ClientSubset, sampler: Sampler[Any]) -> _Arguments:
        pattern = self._loader
        if pattern.batch_sampler is not None and type(pattern.batch_sampler) is not BatchSampler:
            # Lightning knows custom batch samplers only by their `sampler`; here they are set afterwards
            pattern = copy.copy(pattern)
            object.__setattr__(pattern, "batch_sampler", None)
        args, kwargs = _get_dataloader_init_args_and_kwargs(pattern, sampler)
        arguments = _Arguments(pattern, args, kwargs)
        if not arguments.set("dataset", data):
            raise MisconfigurationException(
                f"{type(pattern).__name__}.__init__ takes no argument 'dataset', so it cannot be given a part of the "
                "data."
            )
        arguments.set("generator", None)
        return arguments

    def _set_batch_size(self, arguments: _Arguments, batch_size: int) -> None:
        batch_sampler = arguments.get("batch_sampler")
        if batch_sampler is not None and hasattr(batch_sampler, "batch_size"):
            batch_sampler.batch_size = batch_size  # it was built for this client alone
            return
        batches = batch_sampler is None and self._loader.batch_sampler is not None
        if not batches or not arguments.set("batch_size", batch_size):
            raise MisconfigurationException(
                f"batch_size={batch_size} was asked for, but the loader sets its batches in a way that has no batch "
                "size to change. Leave the batch size of its clients alone."
            )


class _Arguments:
    """The arguments that a loader is built again from, by name."""

    def __init__(self, loader: DataLoader[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = dict(kwargs)  # Lightning hands out the loader's own record
        self._names: tuple[str, ...] = getattr(loader, "__pl_saved_arg_names", ())
        self._defaults = dict(getattr(loader, "__pl_saved_default_kwargs", {}))
        parameters = inspect.signature(type(loader).__init__).parameters
        self._open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._parameters = set(parameters)

    def get(self, name: str) -> Any:
        return self.args[self._names.index(name)] if name in self._names else self.kwargs.get(name)

    def set(self, name: str, value: Any) -> bool:
        found, self.args, self.kwargs = _replace_value_in_saved_args(
            name, value, self.args, self.kwargs, self._defaults, self._names
        )
        if not found and value is not None and (name in self._parameters or self._open):
            self.kwargs[name] = value
            return True
        return found


@contextmanager
def recorded_arguments() -> Iterator[None]:
    """Record the arguments of every ``DataLoader`` and ``BatchSampler`` built inside, as Lightning's own hooks do.

    Lightning's patch must not be nested: the outer exit would find nothing to restore and leave the patch for good. Nor
    may an error reach it, for it restores nothing then.
    """
    stack = ExitStack()
    if "__old__init__" not in DataLoader.__dict__:
        stack.enter_context(_replace_dunder_methods(DataLoader, "dataset"))
    if "__old__init__" not in BatchSampler.__dict__:
        stack.enter_context(_replace_dunder_methods(BatchSampler))
    try:
        yield
    finally:
        stack.close()


def require_batches(loader: Any, client_id: ClientId, round: int = 0) -> None:
    """Raise when a client is known to have no batch; a loader without a length passes.

    Args:
        loader: the client's loader.
        client_id: named in the error.
        round: 0-based round, named in the error.

    Raises:
        EmptyClientError: says why there is no batch and what to do.

    Example:
        >>> require_batches(DataLoader(range(4), batch_size=8, drop_last=True), "a")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        fl_lightning.errors.EmptyClientError: Client 'a' failed in round 0: its 4 examples do not fill one batch ...
    """
    if sized_len(loader) != 0:
        return
    size = sized_len(getattr(loader, "dataset", None))
    reason = "it has no examples. Leave it out of client_ids(), or set min_size in the partitioner."
    if size:
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", "unknown size")
        reason = (
            f"its {size} examples do not fill one batch of {batch_size}, and drop_last=True drops the rest. "
            f"Use drop_last=False, a smaller batch_size, or min_size={batch_size} in the partitioner."
        )
    raise EmptyClientError(client_id, round, reason)


def _one_loader(loader: Any, name: str) -> DataLoader[Any]:
    if isinstance(loader, list | tuple) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        got = type(loader).__name__
        if isinstance(loader, list | tuple | dict):
            got = f"a {got} of {len(loader)}"
        raise MisconfigurationException(
            f"FederatedDataModule expected {name} to return one torch DataLoader, got {got}, "
            "and cannot cut that into clients. Join the data sets in one DataLoader (torch.utils.data.ConcatDataset, "
            f"or a data set of tuples). {_INSTEAD}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            f"FederatedDataModule expected {name} to have a data set with an index, got the IterableDataset "
            f"{type(loader.dataset).__name__}, which cannot be cut into clients. Use a map-style data set. {_INSTEAD}"
        )
    return loader
