"""How a property is spread over devices: quantile functions, so that one uniform number is one device's value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from fl_lightning.errors import MisconfigurationException

__all__ = ["Choice", "Distribution", "LogNormal", "LogUniform", "Normal", "Uniform", "parse"]

Floats = NDArray[np.float64]


class Distribution:
    """A quantile function: what a device's uniform number in ``(0, 1)`` becomes."""

    def quantile(self, u: Floats) -> Floats:
        """Return the values of uniform numbers.

        Shape:
            ``(clients,)`` to ``(clients,)``
        """
        raise NotImplementedError(f"{type(self).__name__} must define quantile(u).")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{value:g}' for value in vars(self).values())})"


class Uniform(Distribution):
    """Every value between two bounds is as likely as any other.

    Args:
        low, high: the bounds.

    Example:
        >>> Uniform(2, 6).quantile(np.array([0.25])).item()
        3.0
    """

    def __init__(self, low: float, high: float) -> None:
        _ordered(self, low, high)
        self.low, self.high = float(low), float(high)

    def quantile(self, u: Floats) -> Floats:
        return self.low + u * (self.high - self.low)


class LogUniform(Distribution):
    """Every order of magnitude between two bounds is as likely as any other.

    Args:
        low, high: the bounds, above 0.

    Example:
        >>> round(LogUniform(1, 100).quantile(np.array([0.5])).item(), 9)
        10.0
    """

    def __init__(self, low: float, high: float) -> None:
        _ordered(self, low, high)
        _positive(self, "low", low)
        self.low, self.high = float(low), float(high)

    def quantile(self, u: Floats) -> Floats:
        return np.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))


class LogNormal(Distribution):
    """Speeds and bandwidths: half of the devices are below the median, some are many times above it.

    Args:
        median: above 0.
        sigma: standard deviation of the logarithm, at least 0; 0.7 puts the 95th percentile at ten times the fifth.

    Example:
        >>> values = LogNormal(20, 0.7).quantile(np.array([0.05, 0.5, 0.95]))
        >>> round(values[1].item(), 9), round(values[2].item() / values[0].item())
        (20.0, 10)
    """

    def __init__(self, median: float, sigma: float) -> None:
        _positive(self, "median", median)
        _not_negative(self, "sigma", sigma)
        self.median, self.sigma = float(median), float(sigma)

    def quantile(self, u: Floats) -> Floats:
        return self.median * np.exp(self.sigma * _normal_quantile(u))


class Normal(Distribution):
    """A bell around a mean; the fleet cuts it at the property's own bounds.

    Args:
        mean: of the bell.
        deviation: standard deviation, at least 0.

    Example:
        >>> round(Normal(22, 1.5).quantile(np.array([0.5])).item(), 9)
        22.0
    """

    def __init__(self, mean: float, deviation: float) -> None:
        _not_negative(self, "deviation", deviation)
        self.mean, self.deviation = float(mean), float(deviation)

    def quantile(self, u: Floats) -> Floats:
        return self.mean + self.deviation * _normal_quantile(u)


class Choice(Distribution):
    """One of some values, each as likely as any other; a value given twice is twice as likely.

    Args:
        values: at least one number.

    Example:
        >>> Choice([-5, 0, 0, 8]).quantile(np.array([0.1, 0.3, 0.7, 0.9])).tolist()
        [-5.0, 0.0, 0.0, 8.0]
    """

    def __init__(self, values: list[float]) -> None:
        if not values:
            raise MisconfigurationException("Choice expected at least one value, got none. Write Choice([1.0, 2.0]).")
        self.values = [float(value) for value in values]

    def quantile(self, u: Floats) -> Floats:
        index = np.minimum((u * len(self.values)).astype(np.int64), len(self.values) - 1)
        return np.asarray(self.values)[index]

    def __repr__(self) -> str:
        return f"Choice([{', '.join(f'{value:g}' for value in self.values)}])"


_NAMES: dict[str, Callable[..., Distribution]] = {
    "uniform": Uniform,
    "loguniform": LogUniform,
    "lognormal": LogNormal,
    "normal": Normal,
    "choice": lambda *values: Choice(list(values)),
}


def parse(text: str) -> Distribution:
    """Read a distribution as a configuration file writes it.

    Args:
        text: ``"lognormal(20, 0.7)"``; one of ``uniform(low, high)``, ``loguniform(low, high)``,
            ``lognormal(median, sigma)``, ``normal(mean, deviation)`` and ``choice(value, ...)``.

    Raises:
        MisconfigurationException: for a name or numbers that are not those.

    Example:
        >>> parse("lognormal(20, 0.7)"), parse("choice(1, 2, 2)")
        (LogNormal(20, 0.7), Choice([1, 2, 2]))
    """
    found = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", text)
    if found is not None and found[1].lower() in _NAMES:
        try:
            numbers = [float(number) for number in found[2].split(",")]
            return _NAMES[found[1].lower()](*numbers)
        except (TypeError, ValueError):
            pass  # the message below says what is expected
    raise MisconfigurationException(
        f"Expected a distribution such as uniform(1, 5), loguniform(1, 5), lognormal(20, 0.7), normal(22, 1.5) or "
        f"choice(1, 2, 4), got {text!r}."
    )


def _normal_quantile(u: Floats) -> Floats:
    # NumPy has no inverse of the normal distribution function
    values: Floats = torch.special.ndtri(torch.from_numpy(np.ascontiguousarray(u))).numpy()
    return values


def _ordered(of: Distribution, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise MisconfigurationException(
            f"{type(of).__name__} expected low <= high, both finite, got low={low!r} and high={high!r}."
        )


def _positive(of: Distribution, name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise MisconfigurationException(f"{type(of).__name__} expected {name} to be finite and > 0, got {value!r}.")


def _not_negative(of: Distribution, name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise MisconfigurationException(f"{type(of).__name__} expected {name} to be finite and >= 0, got {value!r}.")
