"""Where clients run."""

from fl_lightning.engines.in_process import Engine, InProcessEngine
from fl_lightning.engines.spawned import SpawnedEngine

__all__ = ["Engine", "InProcessEngine", "SpawnedEngine"]
