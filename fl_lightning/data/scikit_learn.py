"""What the data sets take from scikit-learn, imported when used: a third of a second that most runs need not pay."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.optional import require

__all__ = ["load_digits", "train_test_indices"]


def load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the pixels ``(1797, 64)`` in ``[0, 16]`` and the labels ``(1797,)`` of the bundled digits.

    Raises:
        ModuleNotFoundError: when scikit-learn is missing.

    Example:
        >>> pixels, labels = load_digits()
        >>> pixels.shape, labels[:3].tolist()
        ((1797, 64), [0, 1, 2])
    """
    datasets: Any = require("sklearn.datasets", "DigitsDataModule", "scikit-learn")
    pixels, labels = datasets.load_digits(return_X_y=True)
    return pixels, labels


def train_test_indices(
    length: int, train_fraction: float, seed: int, stratify: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shuffled indices of a training and a test part, as ``train_test_split`` draws them.

    Another generator would give another split than the published one.

    Args:
        length: number of examples.
        train_fraction: part for training, in ``(0, 1)``.
        seed: ``random_state``.
        stratify: labels whose shares both parts keep, or ``None``.

    Raises:
        ModuleNotFoundError: when scikit-learn is missing.

    Example:
        >>> train, test = train_test_indices(10, 0.8, seed=0, stratify=None)
        >>> len(train), len(test)
        (8, 2)
    """
    selection: Any = require("sklearn.model_selection", "HeartDiseaseDataModule", "scikit-learn")
    train, test = selection.train_test_split(
        np.arange(length),
        test_size=1.0 - train_fraction,
        train_size=train_fraction,
        random_state=seed,
        stratify=stratify,
    )
    return train, test
