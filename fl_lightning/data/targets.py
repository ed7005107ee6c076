"""Where the label of an example stands: found by convention, through any nest of subsets and concatenations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from fl_lightning.errors import MisconfigurationException
from fl_lightning.seeding import forked_rng

__all__ = ["TARGET_NAMES", "find_targets", "num_examples", "read_samples", "stored_column"]

TARGET_NAMES = ("targets", "labels", "y", "target", "label")


def num_examples(dataset: object) -> int:
    """Return ``len(dataset)`` of a map-style data set.

    Raises:
        MisconfigurationException: for an ``IterableDataset`` or anything else that cannot be indexed.

    Example:
        >>> import torch
        >>> num_examples(TensorDataset(torch.zeros(3, 2)))
        3
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise MisconfigurationException(
            f"A partitioner expected a data set with __len__ and __getitem__, got {type(dataset).__name__}, which "
            "cannot be cut by index. Use a map-style data set, or give your data module client_ids() and "
            "client_dataloader(id) and pass it without FederatedDataModule."
        )
    return len(dataset)


def find_targets(
    dataset: Any, target_fn: Callable[[Any], Any] | None = None, iterate: bool = True
) -> NDArray[Any] | None:
    """Return one label for each example, or ``None`` when there is none to be found.

    ``target_fn(sample)`` decides if given. Otherwise the labels are ``dataset.targets``, ``.labels``, ``.y``,
    ``.target`` or ``.label``, a column of that name, or the last tensor of a ``TensorDataset``, also inside ``Subset``
    and ``ConcatDataset``. As a last resort every sample is read: the entry of such a name in a mapping or an object,
    else the last element of a tuple.

    Args:
        dataset: a map-style data set.
        target_fn: sample to label (an integer, a string or a 0-dimensional tensor).
        iterate: whether samples may be read, which can be slow, when the data set stores no labels and there is no
            ``target_fn``.

    Returns:
        An array of ``int64`` or of strings.

    Shape:
        ``(examples,)``

    Raises:
        MisconfigurationException: for labels that are no classes (continuous numbers, several labels an example).

    Example:
        >>> import torch
        >>> data = TensorDataset(torch.zeros(4, 2), torch.tensor([3, 1, 1, 0]))
        >>> find_targets(Subset(data, [2, 0])).tolist()
        [1, 3]
        >>> find_targets(data, target_fn=lambda sample: "odd" if sample[1] % 2 else "even").tolist()
        ['odd', 'odd', 'odd', 'even']
    """
    if target_fn is not None:
        return _as_classes(read_samples(dataset, target_fn), "target_fn")
    stored = stored_column(dataset, TARGET_NAMES, last_tensor=True)
    if stored is not None:
        return _as_classes(stored, f"the labels of {type(dataset).__name__}")
    if not iterate:
        return None
    read = read_samples(dataset, _sample_target)
    if not read or any(label is None for label in read):
        return None
    return _as_classes(read, f"the samples of {type(dataset).__name__}")


def read_samples(dataset: Any, read: Callable[[Any], Any]) -> list[Any]:
    """Return ``read(sample)`` of every sample, keeping no sample.

    The global random generators, from which augmentations draw, are left as they were.

    Example:
        >>> read_samples(["a", "bc"], len)
        [1, 2]
    """
    with forked_rng(0):
        return [read(dataset[index]) for index in range(num_examples(dataset))]


def stored_column(dataset: Any, names: Sequence[str], last_tensor: bool = False) -> Any | None:
    """Return a column that a data set keeps under one of ``names``, as long as the data set, or ``None``.

    Args:
        dataset: a map-style data set; ``Subset`` and ``ConcatDataset`` are looked through.
        names: attributes or columns, the first that fits is taken.
        last_tensor: whether the last of several tensors of a ``TensorDataset`` counts.

    Example:
        >>> import torch
        >>> class Visits(TensorDataset):
        ...     hospital = ["a", "b", "a"]
        >>> visits = Visits(torch.zeros(3, 2))
        >>> stored_column(ConcatDataset([visits, Subset(visits, [1])]), ["hospital"]).tolist()
        ['a', 'b', 'a', 'b']
    """
    length = num_examples(dataset)
    for name in names:
        column = getattr(dataset, name, None)
        if column is None and name in (getattr(dataset, "column_names", None) or ()):
            column = dataset[name]
        if _is_column(column, length):
            return column
    if isinstance(dataset, Subset):
        whole = stored_column(dataset.dataset, names, last_tensor)
        return None if whole is None else _as_array(whole)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [stored_column(part, names, last_tensor) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate([_as_array(part) for part in parts])
    if last_tensor and isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[-1]
    return None


def _is_column(value: Any, length: int) -> bool:
    if value is None or callable(value) or isinstance(value, str | bytes | Mapping) or not isinstance(value, Sized):
        return False
    return not (isinstance(value, Tensor | np.ndarray) and value.ndim == 0) and len(value) == length


def _as_array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, list | tuple) and any(isinstance(value, Tensor) for value in values):
        values = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values]
    try:
        return np.asarray(values)
    except ValueError as error:  # NumPy's word for labels of different lengths
        raise MisconfigurationException(_several_labels("the labels", "labels of different lengths")) from error


def _as_classes(values: Any, source: str) -> NDArray[Any]:
    array = _as_array(values)
    if array.ndim == 2 and array.shape[1] == 1:  # binary targets are often a column, as BCE wants them
        array = array[:, 0]
    if array.ndim != 1:
        raise MisconfigurationException(_several_labels(source, f"labels of shape {array.shape[1:]}"))
    if array.dtype.kind == "f":
        if not np.array_equal(array, np.round(array)):
            raise MisconfigurationException(
                f"Expected {source} to be classes, got continuous numbers such as {float(array[0])!r}. "
                "Pass target_fn=lambda sample: <a bin>, or use a partitioner that needs no labels (IID, Quantity)."
            )
        return array.astype(np.int64)
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    if array.dtype.kind in "OUS" and all(isinstance(value, str | bytes) for value in array.tolist()):
        return array.astype(np.str_)
    raise MisconfigurationException(
        f"Expected {source} to be integers or strings, got {type(array.tolist()[0]).__name__}. "
        "Pass target_fn=lambda sample: <an int or a str>."
    )


def _several_labels(source: str, got: str) -> str:
    return (
        f"Expected {source} to hold one class for each example, got {got}. "
        "Pass target_fn=lambda sample: <the one class to partition by>."
    )


def _sample_target(sample: Any) -> Any | None:
    if isinstance(sample, Mapping):
        return next((sample[name] for name in TARGET_NAMES if name in sample), None)
    if not isinstance(sample, Tensor | np.ndarray):
        named = next((getattr(sample, name) for name in TARGET_NAMES if hasattr(sample, name)), None)
        if named is not None:
            return named
    return sample[-1] if isinstance(sample, tuple | list) and len(sample) > 1 else None
