"""The places of the largest elements, exactly, in about one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_lightning.transforms.bits import Array
from fl_lightning.transforms.vectors import gathered, pieces

__all__ = ["largest"]

_SAMPLE = 1 << 15


def largest(arrays: Sequence[Array], num: int) -> Array:
    """Return the places of the ``num`` elements of largest absolute value, sorted; of equal ones the first.

    A sample guesses a threshold that a few more than ``num`` elements pass; only those are sorted. When fewer pass,
    everything is: the guess costs time, never exactness. Sorting ten million elements to find a hundred thousand takes
    ten times as long.

    Args:
        arrays: flat arrays; places count through them in order.
        num: how many, at most all.

    Example:
        >>> largest([np.array([1.0, -5.0]), np.array([3.0, -3.0, 3.0])], 3).tolist()
        [1, 2, 3]
    """
    total = sum(len(array) for array in arrays)
    if num >= total:
        return np.arange(total)
    threshold = _guess(arrays, num, total)
    candidates = np.arange(total) if threshold is None else _passing(arrays, threshold)
    if len(candidates) < num:
        candidates = np.arange(total)
    values: Array = np.abs(gathered(arrays, candidates))
    cut = np.partition(values, len(values) - num)[len(values) - num]
    above = values > cut
    equal = np.flatnonzero(values == cut)[: num - int(above.sum())]
    above[equal] = True
    chosen: Array = candidates[above]
    return chosen


def _guess(arrays: Sequence[Array], num: int, total: int) -> float | None:
    if total <= _SAMPLE or num * 4 > total:
        return None
    step = -(-total // _SAMPLE) | 1  # odd, so that rows of a power of two are sampled in every column
    sample = np.abs(np.concatenate([array[::step] for array in arrays]))
    expected = num / total * len(sample)
    rank = int(expected + 4 * expected**0.5) + 4
    if rank >= len(sample):
        return None
    return float(np.partition(sample, len(sample) - rank)[len(sample) - rank])


def _passing(arrays: Sequence[Array], threshold: float) -> Array:
    found = []
    for place, piece in pieces(arrays):
        passing = np.flatnonzero(np.abs(piece) >= threshold)
        if len(passing):
            found.append(passing + place)
    return np.concatenate(found) if found else np.zeros(0, np.int64)
