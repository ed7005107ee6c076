"""The user's choices for a federation, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.errors import MisconfigurationException
from fl_lightning.transforms import Transform
from fl_lightning.traveling import BatchNormPolicy
from fl_lightning.types import ClientId

__all__ = ["FederationSettings", "Overrides", "check_override", "rehearsal"]

_OVERRIDES = {"batch_size", "epochs", "lr", "steps", "width"}


Override: TypeAlias = Mapping[str, Any]
Overrides: TypeAlias = Mapping[ClientId, Override] | Callable[[ClientId], Override | None]


@dataclass(slots=True)
class FederationSettings:
    """The user's choices, as the arguments of ``FederatedTrainer`` say them."""

    algorithm: Algorithm
    clients_per_round: int | float | None = None
    local_epochs: int = 1
    local_steps: int | None = None
    min_clients: int = 1
    on_bad_update: Literal["raise", "skip"] = "raise"
    client_overrides: Overrides = field(default_factory=dict)
    client_lr_schedule: Callable[[int], float] | None = None
    batch_norm: BatchNormPolicy = "average"
    transforms: Sequence[Transform] = ()
    evaluate_clients: bool | int | float = False
    evaluate_every_n_rounds: int = 1
    personalize_epochs: int = 0
    num_lanes: int = 8
    seed: int = 0

    def override_of(self, client_id: ClientId) -> Override:
        """Return what is different for one client.

        Raises:
            MisconfigurationException: for what a function of the client returns and no override may be.
        """
        if not callable(self.client_overrides):
            return self.client_overrides.get(client_id, {})
        override = self.client_overrides(client_id)
        if override is None:
            return {}
        check_override(client_id, override)
        return override


def rehearsal(settings: FederationSettings) -> FederationSettings:
    """Return the settings of ``fast_dev_run``: each client passes once over its few batches."""
    return replace(
        settings,
        local_epochs=1,
        local_steps=None,
        client_overrides=lambda client_id: {
            name: value for name, value in settings.override_of(client_id).items() if name not in ("epochs", "steps")
        },
    )


def check_override(client_id: ClientId, override: Any) -> None:
    """Raise for an override of what cannot be overridden, or by what makes no sense.

    Raises:
        MisconfigurationException: says what is expected.
    """
    unknown = sorted(set(override) - _OVERRIDES) if isinstance(override, Mapping) else [override]
    if unknown:
        raise MisconfigurationException(
            f"client_overrides[{client_id!r}] has {unknown}; expected any of {sorted(_OVERRIDES)}, for example "
            f"client_overrides={{{client_id!r}: {{'epochs': 2, 'lr': 0.05}}}}."
        )
    if "epochs" in override and "steps" in override:
        raise MisconfigurationException(f"client_overrides[{client_id!r}] has both epochs and steps; give one of them.")
    for name, value in override.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise MisconfigurationException(f"Expected client_overrides[{client_id!r}][{name!r}] > 0, got {value!r}.")
    if override.get("width", 1) > 1:
        raise MisconfigurationException(
            f"Expected client_overrides[{client_id!r}]['width'] in (0, 1], got {override['width']!r}."
        )
