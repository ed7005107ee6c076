"""Where clients run."""

from fl_lightning.engines.in_process import Engine, InProcessEngine

__all__ = ["Engine", "InProcessEngine"]
