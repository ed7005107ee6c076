"""The states of NormalizedRootMeanSquaredError over more than two clients, which torchmetrics aggregates wrongly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["pooled_moments"]


def pooled_moments(stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Return what one metric that saw all clients' targets would hold.

    torchmetrics 1.9 reads the third client from a variable that it overwrote with the first two (an ``IndexError``).
    With :math:`n_k` targets of mean :math:`m_k` and squared deviations :math:`s_k` at client :math:`k`, this is
    :math:`m = \sum_k n_k m_k / \sum_k n_k` and :math:`s = \sum_k s_k + n_k (m_k - m)^2`.

    Args:
        stacks: the metric's declared states that have no reduction.

    Shape:
        Each of ``stacks``: ``(clients, *state.shape)``; each result: ``(*state.shape)``.

    Example:
        >>> names = ("min_val", "max_val", "target_squared")
        >>> stacks = {name: torch.zeros(2) for name in names}
        >>> stacks |= {"total": torch.tensor([1.0, 3.0]), "mean_val": torch.tensor([4.0, 0.0])}
        >>> stacks |= {"var_val": torch.zeros(2)}
        >>> pooled = pooled_moments(stacks)
        >>> pooled["mean_val"].item(), pooled["var_val"].item()
        (1.0, 12.0)
    """
    total, means = stacks["total"].double(), stacks["mean_val"].double()
    mean = (total * means).sum(0) / total.sum(0)
    pooled = {
        "total": total.sum(0),
        "mean_val": mean,
        "var_val": (stacks["var_val"].double() + total * (means - mean) ** 2).sum(0),
        "target_squared": stacks["target_squared"].double().sum(0),
        "min_val": stacks["min_val"].amin(0),
        "max_val": stacks["max_val"].amax(0),
    }
    return {name: torch.as_tensor(value, dtype=stacks[name].dtype) for name, value in pooled.items()}
