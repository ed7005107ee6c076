"""The synthetic federation of the FedProx paper: how unlike its devices are is two numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fl_lightning.data.tensors import NaturalTensors, Split, check_fractions
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["SyntheticDataModule"]

_FEATURES, _CLASSES = 60, 10
_LOG_MEAN, _LOG_SPREAD, _FEWEST = 4.0, 2.0, 50
"""Sizes of the devices: int(lognormal(4, 2)) + 50 (the paper's released generator)."""


class SyntheticDataModule(NaturalTensors):
    r"""Devices whose labels follow linear rules of their own.

    .. math:: u_k \sim N(0, \alpha^2), \quad B_k \sim N(0, \beta^2), \quad
        W_k, b_k \sim N(u_k, 1), \quad v_k \sim N(B_k, 1), \quad x \sim N(v_k, \Sigma), \quad
        y = \arg\max(x W_k + b_k)

    with :math:`\Sigma_{jj} = j^{-1.2}`, 60 features and 10 classes. :math:`\alpha` says how much the rules of two
    devices differ, :math:`\beta` how much their inputs do. Sizes follow a power law,
    :math:`n_k = \lfloor \mathrm{lognormal}(4, 2) \rfloor + 50`.

    Args:
        alpha: standard deviation of :math:`u_k`, >= 0.
        beta: standard deviation of :math:`B_k`, >= 0.
        iid: one rule for all devices and :math:`v_k = 0`; ``alpha`` and ``beta`` then have no effect.
        num_clients: devices, at least 1; 30 in the paper.
        batch_size: examples in a batch of a device.
        val_fraction: part of each device's examples for validation, in ``[0, 1)``. The paper has none.
        test_fraction: part of each device's examples for testing, in ``[0, 1)``.
        seed: of numpy's legacy generator, which draws in the order of the program that the authors released: seed 0 is
            the federation that their program gives after ``np.random.seed(0)``, up to rounding and to which tenth of a
            device's examples is for testing (theirs shuffles without a seed).

    Shape:
        features ``(batch, 60)`` float32, labels ``(batch,)`` int64 in ``[0, 10)``

    Raises:
        MisconfigurationException: for a negative spread, no device, or fractions that leave nothing to train on.

    Example:
        >>> data = SyntheticDataModule(alpha=1.0, beta=1.0)
        >>> len(data.client_ids()), min(data.client_size(k) for k in data.client_ids()) >= 45
        (30, True)

    References:
        Li et al., *Federated Optimization in Heterogeneous Networks*, 2020, section 5.1, with the sizes and the
        standard deviations of the generator that its authors released.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        iid: bool = False,
        num_clients: int = 30,
        batch_size: int = 10,
        val_fraction: float = 0.0,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        check_fractions(val_fraction, test_fraction)
        if alpha < 0 or beta < 0:
            raise MisconfigurationException(
                f"SyntheticDataModule expected spreads alpha >= 0 and beta >= 0, got {alpha!r} and {beta!r}."
                " Use alpha=0, beta=0 for the mildest differences, or iid=True for none."
            )
        if num_clients < 1:
            raise MisconfigurationException(f"SyntheticDataModule expected num_clients >= 1, got {num_clients!r}.")
        self.save_hyperparameters()
        self.alpha, self.beta, self.iid = alpha, beta, iid
        self.num_clients = num_clients
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seed = seed

    def load(self) -> Mapping[ClientId, Split]:
        # the legacy generator and the order of the draws are the authors': seed 0 is the federation that their program
        # writes after np.random.seed(0), and how much FedProx gains differs much between federations
        draw = np.random.RandomState(self.seed % 2**32)
        sizes = draw.lognormal(_LOG_MEAN, _LOG_SPREAD, self.num_clients).astype(int) + _FEWEST
        centres = np.zeros(self.num_clients)
        means = np.zeros((self.num_clients, _FEATURES))
        if self.iid:
            shared = _rule(0.0, draw)
        else:
            centres = draw.normal(0.0, self.alpha, self.num_clients)
            offsets = draw.normal(0.0, self.beta, self.num_clients)
            means = draw.normal(offsets[:, None], 1.0, means.shape)
        clients: dict[ClientId, Split] = {}
        for client_id, (size, mean, centre) in enumerate(zip(sizes, means, centres, strict=True)):
            rule = shared if self.iid else _rule(centre, draw)
            features = draw.normal(mean, np.sqrt(_variances()), (size, _FEATURES))
            clients[client_id] = self._split(features, (features @ rule[0] + rule[1]).argmax(axis=1))
        return clients

    def _split(self, features: NDArray[np.float64], labels: NDArray[np.int64]) -> Split:
        # examples of a device are drawn independently, so the first ones are as good as any; train sizes round down
        num_train = int((1.0 - self.val_fraction - self.test_fraction) * len(labels) + 1e-9)
        num_test = round(self.test_fraction * len(labels)) if self.val_fraction else len(labels) - num_train
        inputs, targets = torch.tensor(features, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)
        parts = (slice(0, num_train), slice(num_train, len(labels) - num_test), slice(len(labels) - num_test, None))
        return Split(*(TensorDataset(inputs[part], targets[part]) for part in parts))


def _variances() -> NDArray[np.float64]:
    return np.arange(1, _FEATURES + 1, dtype=np.float64) ** -1.2


def _rule(mean: float, draw: np.random.RandomState) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a device's weights and biases."""
    return draw.normal(mean, 1.0, (_FEATURES, _CLASSES)), draw.normal(mean, 1.0, _CLASSES)
