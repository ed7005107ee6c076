"""The proximal term: a pull towards the model that the server sent."""

from __future__ import annotations

from torch import Tensor

from fl_lightning.callbacks.base import GradientCorrection
from fl_lightning.callbacks.checks import non_negative
from fl_lightning.types import ClientTask, Tree

__all__ = ["ProximalTerm", "pulled"]


class ProximalTerm(GradientCorrection):
    r"""Adds the gradient of :math:`\frac{\mu}{2} \lVert w - w_t \rVert^2` to every gradient.

    .. math:: g \leftarrow g + \mu\,(w - w_t)

    The gradient is exact and needs no second backward pass. Parameters that the server did not send (personal layers)
    are left alone. In a plain ``lightning.Trainer`` the weights at the start of the fit stand for :math:`w_t`; they are
    part of its checkpoints, so that a fit resumed with ``ckpt_path`` is still pulled to where the first one started.

    Args:
        mu: strength of the pull, >= 0; 0 changes no bit.

    Raises:
        MisconfigurationException: for ``mu < 0``.

    Example:
        >>> import torch
        >>> task = ClientTask("a", 0, 0, {"model": {"w": torch.tensor([1.0])}}, seed=0)
        >>> term = ProximalTerm(mu=0.5)
        >>> term.correct({"w": torch.tensor([2.0])}, {"w": torch.tensor([3.0])}, task)["w"].tolist()
        [3.0]

    References:
        Li et al., *Federated Optimization in Heterogeneous Networks*, 2020, equation 2.
    """

    def __init__(self, mu: float = 0.01) -> None:
        super().__init__()
        self.mu = non_negative("ProximalTerm", "mu", mu, "mu=0 switches the term off")

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        if self.mu == 0:
            return dict(grads)
        return pulled(grads, params, task.broadcast["model"], self.mu)


def pulled(grads: Tree, params: Tree, start: Tree, strength: float) -> dict[str, Tensor]:
    """Return ``grads + strength * (params - start)`` where the server sent the parameter, and other grads unchanged."""
    return {
        name: grad + strength * (params[name] - start[name].to(params[name].dtype)) if name in start else grad
        for name, grad in grads.items()
    }
