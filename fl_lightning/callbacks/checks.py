"""Checks of hyperparameters: what was expected, what came, what to do instead."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Optimizer

__all__ = [
    "epochs_or_none",
    "finite",
    "flag",
    "has_gradient",
    "in_unit_interval",
    "is_number",
    "non_negative",
    "positive",
    "sgd_only",
]


def non_negative(owner: str, name: str, value: float, hint: str = "") -> float:
    """Return the value as a float.

    Raises:
        MisconfigurationException: unless it is a finite number >= 0.

    Example:
        >>> non_negative("FedProx", "mu", 1)
        1.0
    """
    return _checked(owner, name, value, is_number(value) and value >= 0, "a finite number >= 0", hint)


def positive(owner: str, name: str, value: float, hint: str = "") -> float:
    """Return the value as a float.

    Raises:
        MisconfigurationException: unless it is a finite number > 0.

    Example:
        >>> positive("FedDyn", "alpha", 0.1)
        0.1
    """
    return _checked(owner, name, value, is_number(value) and value > 0, "a finite number > 0", hint)


def in_unit_interval(owner: str, name: str, value: float, hint: str = "") -> float:
    """Return the value as a float.

    Raises:
        MisconfigurationException: unless it is in ``[0, 1)``.

    Example:
        >>> in_unit_interval("FedAvgM", "momentum", 0.9)
        0.9
    """
    return _checked(owner, name, value, is_number(value) and 0 <= value < 1, "a number in [0, 1)", hint)


def epochs_or_none(owner: str, name: str, value: int | None, like: str, hint: str = "") -> int | None:
    """Return a number of epochs, or ``None`` for what ``like`` says.

    Raises:
        MisconfigurationException: unless it is an integer >= 1 or ``None``.

    Example:
        >>> epochs_or_none("Ditto", "personal_epochs", 2, "as many as the global model gets")
        2
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise MisconfigurationException(
            f"{owner} expected {name} to be an integer >= 1, or None for {like}, got {value!r}.{hint}"
        )
    return value


def finite(owner: str, name: str, value: float, hint: str = "") -> float:
    """Return the value as a float.

    Raises:
        MisconfigurationException: unless it is a finite number.

    Example:
        >>> finite("ALittleIsEnough", "z", -1)
        -1.0
    """
    return _checked(owner, name, value, is_number(value), "a finite number", hint)


def flag(owner: str, name: str, value: bool) -> bool:
    """Return the value.

    Raises:
        MisconfigurationException: unless it is ``True`` or ``False``: a text such as ``"no"`` would count as true.

    Example:
        >>> flag("FedProx", "adaptive", False)
        False
    """
    if not isinstance(value, bool):
        raise MisconfigurationException(f"{owner} expected {name} to be True or False, got {value!r}.")
    return value


def has_gradient(optimizer: Optimizer) -> bool:
    """Return whether a step of the optimizer changes anything: torch's skip parameters without a gradient.

    Example:
        >>> import torch
        >>> has_gradient(SGD([torch.zeros(1)], lr=0.1))
        False
    """
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def sgd_only(owner: str, optimizers: Iterable[Optimizer], hint: str) -> None:
    """Refuse an optimizer whose step is not proportional to the gradient.

    Raises:
        MisconfigurationException: unless every optimizer is ``torch.optim.SGD``.

    Example:
        >>> import torch
        >>> sgd_only("MimeLite", [SGD([torch.zeros(1)], lr=0.1)], "use FedAvg()")
    """
    for optimizer in optimizers:
        own = getattr(optimizer, "_optimizer", optimizer)
        if not isinstance(own, SGD):
            raise MisconfigurationException(
                f"{owner} is defined for torch.optim.SGD, and configure_optimizers returns {type(own).__name__}, whose "
                f"step does not follow the size of the gradient. Use SGD there, or {hint}."
            )


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, and no bool.

    Example:
        >>> is_number(0.5), is_number(True), is_number("a"), is_number(float("nan"))
        (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked(owner: str, name: str, value: float, good: bool, expected: str, hint: str) -> float:
    if not good:
        advice = f"; {hint}." if hint else "."
        raise MisconfigurationException(f"{owner} expected {name} to be {expected}, got {value!r}{advice}")
    return float(value)
