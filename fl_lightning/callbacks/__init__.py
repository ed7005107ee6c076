"""Callbacks of local training; each is an ordinary Lightning callback."""

from fl_lightning.callbacks.base import ClientCallback, GradientCorrection
from fl_lightning.callbacks.clipping import GradientClip
from fl_lightning.callbacks.compression import Compression
from fl_lightning.callbacks.noise import GradientNoise
from fl_lightning.callbacks.proximal import ProximalTerm
from fl_lightning.callbacks.step_counter import StepCounter

__all__ = [
    "ClientCallback",
    "Compression",
    "GradientClip",
    "GradientCorrection",
    "GradientNoise",
    "ProximalTerm",
    "StepCounter",
]
