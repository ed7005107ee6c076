"""Gaussian noise on gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_lightning.callbacks.base import GradientCorrection
from fl_lightning.callbacks.checks import non_negative
from fl_lightning.types import ClientTask, Tree

__all__ = ["GradientNoise"]


class GradientNoise(GradientCorrection):
    r"""Adds independent Gaussian noise to every element of every gradient.

    .. math:: g \leftarrow g + \sigma z, \qquad z \sim \mathcal N(0, I)

    **Noise alone is no privacy guarantee.** Differential privacy needs a bound on what one record (or one client) can
    change, so that the noise can be measured against it, and an accountant that adds up the rounds. This callback has
    neither. It is for regularisation and for experiments on robustness.

    The numbers come from torch's global generator, which the federation seeds for each client and round.

    Args:
        std: standard deviation :math:`\sigma` in units of the gradient, >= 0; 0 changes no bit and draws no number.

    Raises:
        MisconfigurationException: for ``std < 0``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> task = ClientTask("a", 0, 0, {}, seed=0)
        >>> noisy = GradientNoise(std=2.0).correct({"w": torch.zeros(10_000)}, {}, task)["w"]
        >>> round(float(noisy.std()), 1)
        2.0

    References:
        Neelakantan et al., *Adding Gradient Noise Improves Learning for Very Deep Networks*, 2015, without its decay.
    """

    needs_start = False

    def __init__(self, std: float = 0.01) -> None:
        super().__init__()
        self.std = non_negative("GradientNoise", "std", std, "it is a standard deviation, and 0 switches it off")

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        if self.std == 0:
            return dict(grads)
        return {name: grad + self.std * torch.randn_like(grad) for name, grad in grads.items()}
