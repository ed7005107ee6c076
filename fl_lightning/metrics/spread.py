"""How a value differs over clients: a mean over clients hides whom the model fails."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from statistics import median

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.types import ClientId

__all__ = ["higher_is_better", "spread"]

_LOW_ENDINGS = ("loss", "losses", "error", "errors", "err", "distance", "divergence", "perplexity", "deviance")
_LOW_WORDS = frozenset(
    ["mse", "rmse", "msle", "mae", "mape", "smape", "wmape", "nll", "ce", "bce", "ppl", "kl", "js", "wer", "cer", "mer",
     "fid", "kid", "lpips", "brier", "ece", "fpr", "fnr", "eer", "hinge", "hamming", "latency", "seconds", "time"]
)  # fmt: skip


def higher_is_better(name: str) -> bool:
    """Return whether a larger value of this name is the better one: a rule on the name, nothing else.

    Lower is better when a word of the name (words end at anything but a letter, and before a capital) ends in
    "loss", "error", "err", "distance", "divergence", "perplexity" or "deviance", or is the abbreviation of such a
    metric ("mse", "mae", "nll", "wer", "fid", ...). Otherwise higher is better.

    Example:
        >>> higher_is_better("val/accuracy"), higher_is_better("val_loss_epoch"), higher_is_better("MeanSquaredError")
        (True, False, False)
    """
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    return not any(word in _LOW_WORDS or word.endswith(_LOW_ENDINGS) for word in words)


def spread(
    values: Mapping[ClientId, float], weights: Mapping[ClientId, float] | None = None, higher_is_better: bool = True
) -> dict[str, float]:
    r"""Return ``min``, ``median``, ``max``, ``mean``, ``worst_decile`` and ``std`` of one value over clients.

    Clients with NaN do not count; without any other client everything is NaN. With weights :math:`w_k`, the mean is
    :math:`\bar v = \sum_k w_k v_k / \sum_k w_k` and the standard deviation is
    :math:`\sqrt{\sum_k w_k (v_k - \bar v)^2 / \sum_k w_k}`; the other numbers count every client once.

    Args:
        values: each client's value.
        weights: each client's weight, 0 or more (number of examples, say); ``None`` counts every client once.
        higher_is_better: which end is the worst. ``worst_decile`` is the mean of the worst tenth of the clients,
            rounded down, at least one client.

    Raises:
        MisconfigurationException: when a client has no weight, or a negative one.

    Example:
        >>> spread({"a": 0.5, "b": 1.0, "c": 0.75, "d": float("nan")})["worst_decile"]
        0.5
        >>> spread({"a": 1.0, "b": 4.0}, weights={"a": 2.0, "b": 1.0})["mean"]
        2.0
    """
    clients = [client for client, value in values.items() if not math.isnan(value)]
    shares = [_weight(client, weights) for client in clients]
    ordered = sorted((values[client] for client in clients), reverse=not higher_is_better)
    if not ordered:
        return dict.fromkeys(("min", "median", "max", "mean", "worst_decile", "std"), math.nan)
    mean = std = math.nan
    if total := math.fsum(shares):
        mean = _sum(w * values[client] for client, w in zip(clients, shares, strict=True)) / total
        variance = _sum(w * (values[client] - mean) ** 2 for client, w in zip(clients, shares, strict=True)) / total
        std = math.sqrt(variance)
    worst = ordered[: max(1, len(ordered) // 10)]
    return {
        "min": min(ordered),
        "median": median(ordered),
        "max": max(ordered),
        "mean": mean,
        "worst_decile": _sum(worst) / len(worst),
        "std": std,
    }


def _weight(client: ClientId, weights: Mapping[ClientId, float] | None) -> float:
    weight = 1.0 if weights is None else weights.get(client, -1.0)
    if not weight >= 0:
        raise MisconfigurationException(
            f"Expected a weight of 0 or more for client {client!r}, got {(weights or {}).get(client)}. Give every "
            "client of `values` its number of examples, or pass weights=None to count each once."
        )
    return weight


def _sum(numbers: Iterable[float]) -> float:
    numbers = list(numbers)
    # fsum refuses infinities of both signs, which a diverged client may bring
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)
