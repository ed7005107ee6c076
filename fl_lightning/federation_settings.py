"""The user's choices for a federation, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.transforms import Transform
from fl_lightning.traveling import BatchNormPolicy
from fl_lightning.types import ClientId

__all__ = ["FederationSettings", "rehearsal"]


@dataclass(slots=True)
class FederationSettings:
    """The user's choices, as the arguments of ``FederatedTrainer`` say them."""

    algorithm: Algorithm
    clients_per_round: int | float | None = None
    local_epochs: int = 1
    local_steps: int | None = None
    min_clients: int = 1
    on_bad_update: Literal["raise", "skip"] = "raise"
    client_overrides: Mapping[ClientId, Mapping[str, Any]] = field(default_factory=dict)
    client_lr_schedule: Callable[[int], float] | None = None
    batch_norm: BatchNormPolicy = "average"
    transforms: Sequence[Transform] = ()
    evaluate_clients: bool | int | float = False
    evaluate_every_n_rounds: int = 1
    num_lanes: int = 8
    seed: int = 0


def rehearsal(settings: FederationSettings) -> FederationSettings:
    """Return the settings of ``fast_dev_run``: each client passes once over its few batches."""
    overrides = {
        client_id: {name: value for name, value in override.items() if name not in ("epochs", "steps")}
        for client_id, override in settings.client_overrides.items()
    }
    return replace(settings, local_epochs=1, local_steps=None, client_overrides=overrides)
