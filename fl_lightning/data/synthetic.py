"""The synthetic federation of the FedProx paper: how unlike its devices are is two numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fl_lightning.data.tensors import NaturalTensors, Split, check_fractions
from fl_lightning.errors import MisconfigurationException
from fl_lightning.seeding import seed_for
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
        seed: root of everything drawn.

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
        draw = np.random.default_rng(seed_for(self.seed, -1, None, "synthetic"))
        sizes = draw.lognormal(_LOG_MEAN, _LOG_SPREAD, self.num_clients).astype(int) + _FEWEST
        rule = _rule(0.0, draw)
        clients: dict[ClientId, Split] = {}
        for client_id, size in enumerate(sizes):
            means = np.zeros(_FEATURES)
            if not self.iid:
                rule = _rule(draw.normal(0.0, self.alpha), draw)
                means = draw.normal(draw.normal(0.0, self.beta), 1.0, _FEATURES)
            features = draw.normal(means, np.sqrt(_variances()), (size, _FEATURES))
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


def _rule(mean: float, draw: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a device's weights and biases."""
    return draw.normal(mean, 1.0, (_FEATURES, _CLASSES)), draw.normal(mean, 1.0, _CLASSES)
