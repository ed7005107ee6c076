"""Gradient clipping, before the optimizer's step."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.callbacks.base import GradientCorrection
from fl_lightning.callbacks.checks import positive
from fl_lightning.types import ClientTask, Tree

__all__ = ["GradientClip"]


class GradientClip(GradientCorrection):
    r"""Bounds gradients by their common norm, or element by element.

    .. math:: g \leftarrow g \cdot \min\!\left(1, \frac{C}{\lVert g \rVert_2 + 10^{-6}}\right)
        \qquad\text{or}\qquad g \leftarrow \max(-c, \min(c, g))

    The norm is taken over all parameters of the optimizer that steps, as ``torch.nn.utils.clip_grad_norm_`` does.
    This bounds the step of a whole batch; it is not the per-record clipping of differential privacy.

    Args:
        max_norm: largest 2-norm :math:`C`, > 0.
        value: largest absolute value :math:`c` of an element, > 0.

    Raises:
        MisconfigurationException: unless exactly one of the two is given.

    Example:
        >>> task = ClientTask("a", 0, 0, {}, seed=0)
        >>> grads = {"w": torch.tensor([3.0, -4.0])}
        >>> GradientClip(max_norm=1.0).correct(grads, {}, task)["w"]
        tensor([ 0.6000, -0.8000])
        >>> GradientClip(value=2.0).correct(grads, {}, task)["w"]
        tensor([ 2., -2.])
    """

    needs_start = False

    def __init__(self, max_norm: float | None = None, value: float | None = None) -> None:
        super().__init__()
        if (max_norm is None) == (value is None):
            raise MisconfigurationException(
                f"GradientClip expected one of max_norm and value, got max_norm={max_norm!r} and value={value!r}. "
                "Write GradientClip(max_norm=1.0) or GradientClip(value=0.5)."
            )
        self.max_norm = None if max_norm is None else positive("GradientClip", "max_norm", max_norm)
        self.value = None if value is None else positive("GradientClip", "value", value)

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        if self.value is not None:
            return {name: grad.clamp(-self.value, self.value) for name, grad in grads.items()}
        assert self.max_norm is not None
        norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()])
        # torch's own constant: a gradient of zero stays zero instead of turning into NaN
        factor = torch.clamp(self.max_norm / (torch.linalg.vector_norm(norms) + 1e-6), max=1.0)
        return {name: grad * factor.to(grad.dtype) for name, grad in grads.items()}
