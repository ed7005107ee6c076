"""Callbacks of local training; each is an ordinary Lightning callback."""

from fl_lightning.callbacks.base import ClientCallback, GradientCorrection

__all__ = ["ClientCallback", "GradientCorrection"]
