"""What a number is, for arguments that come from a command line or a file as well."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

__all__ = ["is_integer", "is_number"]


def is_number(value: Any) -> bool:
    """Return whether a value is a real number: no text, no truth value, no NaN; infinity is one.

    Example:
        >>> [is_number(value) for value in (1, 0.5, float("inf"), "2", True, None, float("nan"))]
        [True, True, True, False, False, False, False]
    """
    return not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(float(value))


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, and no truth value.

    Example:
        >>> [is_integer(value) for value in (1, 1.0, True, "1")]
        [True, False, False, False]
    """
    return not isinstance(value, bool) and isinstance(value, Integral)
