r"""BatchNorm's running statistics of the aggregated model, measured on the cohort's data (``"recalibrate"``).

The statistics of averaged weights are not the average of the clients' statistics. After the server's step every
client of the cohort passes once over its training data in train mode, with learning rates of zero, and reports the
mean and variance that its BatchNorm layers saw; the server combines them by the law of total variance,

.. math:: \mu = \sum_k p_k \mu_k, \qquad \sigma^2 = \sum_k p_k (\sigma_k^2 + \mu_k^2) - \mu^2 .
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fl_lightning.types import Contribution, Tree

__all__ = ["combined_statistics", "reset_statistics", "statistics_contribution"]


def statistics_contribution(buffers: Tree, num_examples: int) -> Contribution:
    """Return a client's summand: weighted means and second moments, in double precision."""
    moments: dict[str, Tensor] = {}
    for name, mean in buffers.items():
        if name.endswith("running_mean"):
            variance = buffers[name.removesuffix("running_mean") + "running_var"].double()
            moments[name] = mean.double() * num_examples
            moments[name.removesuffix("running_mean") + "running_var"] = (variance + mean.double() ** 2) * num_examples
    counts = {n: b.double() for n, b in buffers.items() if n.endswith("num_batches_tracked")}
    return Contribution({"moments": moments, "counts": counts}, {"weight": float(num_examples)})


def combined_statistics(total: Contribution, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the running statistics of all clients together, in the types of ``own``.

    Example:
        >>> import torch
        >>> a = statistics_contribution({"running_mean": torch.tensor([0.0]), "running_var": torch.tensor([1.0])}, 1)
        >>> a.trees["moments"]["running_mean"] += 2.0  # a second client with mean 2, variance 1 and one example
        >>> a.trees["moments"]["running_var"] += 5.0
        >>> both = Contribution(a.trees, {"weight": 2.0})
        >>> own = {"running_mean": torch.zeros(1), "running_var": torch.ones(1)}
        >>> {name: value.tolist() for name, value in combined_statistics(both, own).items()}
        {'running_mean': [1.0], 'running_var': [2.0]}
    """
    weight = total.scalars["weight"]
    moments = {name: value / weight for name, value in total.trees["moments"].items()}
    statistics: dict[str, Tensor] = {}
    for name, value in moments.items():
        if name.endswith("running_var"):
            value = (value - moments[name.removesuffix("running_var") + "running_mean"] ** 2).clamp_min(0.0)
        statistics[name] = value.to(own[name].dtype)
    for name, value in total.trees["counts"].items():
        statistics[name] = value.round().to(own[name].dtype)
    return statistics


def reset_statistics(module: nn.Module) -> None:
    """Let BatchNorm layers average over all batches instead of forgetting the first ones."""
    for part in module.modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            part.reset_running_stats()
            part.momentum = None  # torch's own word for the cumulative average
