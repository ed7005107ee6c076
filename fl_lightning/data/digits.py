"""The embedded default: 1,797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch

from fl_lightning.data.scikit_learn import load_digits
from fl_lightning.data.tensors import PooledTensors, Split, check_fractions, split_randomly

__all__ = ["DigitsDataModule"]


class DigitsDataModule(PooledTensors):
    """8x8 images of ten digits, nothing to download.

    Args:
        batch_size: examples in a batch.
        val_fraction: part for validation, in ``[0, 1)``.
        test_fraction: part for testing, in ``[0, 1)``.
        seed: root of the split.

    Shape:
        images ``(batch, 1, 8, 8)`` float32 in ``[0, 1]``, labels ``(batch,)`` int64 in ``[0, 10)``

    Raises:
        MisconfigurationException: for fractions that leave nothing to train on.

    Example:
        >>> digits = DigitsDataModule(batch_size=32)
        >>> images, labels = next(iter(digits.val_dataloader()))
        >>> tuple(images.shape), len(digits.train_dataloader().dataset)
        ((180, 1, 8, 8), 1258)

    References:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
        (its test set).
    """

    def __init__(
        self, batch_size: int = 32, val_fraction: float = 0.1, test_fraction: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__(batch_size)
        check_fractions(val_fraction, test_fraction)
        self.save_hyperparameters()
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    def load(self) -> Split:
        pixels, labels = load_digits()
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0  # the pixels count to 16
        return split_randomly(
            images, torch.tensor(labels, dtype=torch.int64), self.val_fraction, self.test_fraction, self.seed, "digits"
        )
