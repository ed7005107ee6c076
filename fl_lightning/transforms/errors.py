"""What is wrong with a payload."""

from __future__ import annotations

__all__ = ["PayloadError"]


class PayloadError(ValueError):
    """A payload cannot be decoded: cut off, changed, or made for another model, round or client."""
