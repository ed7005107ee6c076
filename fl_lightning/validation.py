"""Checks of ``FederatedTrainer``'s arguments: what was expected, what came, what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.algorithms.robust.little import ALittleIsEnough
from fl_lightning.callbacks.attacks import Attack
from fl_lightning.federation_settings import FederationSettings, Overrides, check_override
from fl_lightning.packages import lightning_base
from fl_lightning.transforms.chaining import Chain
from fl_lightning.types import ClientId

__all__ = [
    "check_arguments",
    "check_overrides",
    "check_parts",
    "require_sum",
    "warn_of_averaging",
    "warn_of_strangers",
]

_SHARDING = ("fsdp", "deepspeed", "modelparallel", "model_parallel")
_CHOICES = {
    "local_loop": ("auto", "lightning", "lean"),
    "client_state": ("reset", "keep"),
    "memory_format": ("contiguous", "channels_last"),
}
# by argument: the method that makes it one, and the part of the package that has such classes
_PARTS = {"sampler": ("cohort", "schedules"), "engine": ("session", "engines")}


def check_arguments(
    settings: FederationSettings,
    max_rounds: int | None,
    lightning: Mapping[str, Any],
    local: Mapping[str, Any],
    local_epochs: int | None = None,
) -> None:
    """Raise for arguments that are out of range or exclude each other.

    Raises:
        MisconfigurationException: says what to write instead.
    """
    if not isinstance(settings.algorithm, Algorithm):
        raise MisconfigurationException(
            f"Expected algorithm to be a federated algorithm such as FedAvg(), got {settings.algorithm!r}."
        )
    _check_rounds(max_rounds, lightning, settings)
    _check_strategy(lightning.get("strategy"))
    for name, allowed in _CHOICES.items():
        _one_of(name, local[name], allowed)
    _one_of("on_bad_update", settings.on_bad_update, ("raise", "skip"))
    _one_of("batch_norm", settings.batch_norm, ("average", "local", "recalibrate"))
    if local["group_size"] != "auto":
        _at_least_one("group_size", local["group_size"])
    _at_least_one("min_clients", settings.min_clients)
    _at_least_one("local_epochs", settings.local_epochs)
    if settings.local_steps is not None:
        _at_least_one("local_steps", settings.local_steps)
        if local_epochs is not None:
            raise MisconfigurationException(
                f"local_epochs={local_epochs} and local_steps={settings.local_steps} both say when a client's round "
                "ends. Give one of them; the other is None (null on the command line)."
            )
    _check_transforms(settings)
    _at_least_one("evaluate_every_n_rounds", settings.evaluate_every_n_rounds)
    _check_personalize(settings)
    _count_or_fraction("clients_per_round", settings.clients_per_round)
    if settings.evaluate_clients is not True and settings.evaluate_clients is not False:
        _count_or_fraction("evaluate_clients", settings.evaluate_clients)
    if not callable(settings.client_overrides):
        for client_id, override in settings.client_overrides.items():
            check_override(client_id, override)


def require_sum(algorithm: Algorithm, what: str, instead: str) -> None:
    """Raise when something works on the sum of a round and the algorithm needs to see every client's own update.

    Whatever decodes sums, hides what they are made of or adds noise to them asks here, and nowhere else.

    Args:
        algorithm: of the federation.
        what: what works on the sum, as the beginning of a sentence.
        instead: what to write instead.

    Raises:
        MisconfigurationException: for an algorithm that is not ``linear``, or that looks at when updates arrive.

    Example:
        >>> from fl_lightning.algorithms import FedAvg
        >>> require_sum(FedAvg(), "RandomK(shared=True) is decoded on the sum of a round", "Write shared=False.")
    """
    if algorithm.linear and not algorithm.asynchronous:
        return
    why = (
        "combines every client's own update (linear = False)" if not algorithm.linear else "looks at when each arrived"
    )
    raise MisconfigurationException(f"{what}, and {type(algorithm).__name__} {why}. {instead}")


def _check_transforms(settings: FederationSettings) -> None:
    parts = Chain(settings.transforms).parts
    if parts and parts[0].on_sum:
        require_sum(settings.algorithm, f"{parts[0]!r} is decoded on the sum of a round", "Write shared=False.")


def check_parts(given: Mapping[str, Any], client_callbacks: Any) -> None:
    """Raise for an argument that is not the kind of part that its name says.

    Args:
        given: by argument, what was passed; ``None`` stands for the default.
        client_callbacks: a callback, a list of them, or ``None``.

    Raises:
        MisconfigurationException: says what was expected.
    """
    for name, (method, home) in _PARTS.items():
        value = given.get(name)
        if value is not None and (isinstance(value, type) or not callable(getattr(value, method, None))):
            raise MisconfigurationException(
                f"Expected {name} to be an object with a method {method}(), got {value!r}. Pass an instance of a class "
                f"of fl_lightning.{home}, or of your own subclass, or None for the default."
            )
    callbacks = client_callbacks if isinstance(client_callbacks, list | tuple) else [client_callbacks]
    for callback in callbacks:
        if callback is not None and lightning_base(callback, "Callback") is None:
            raise MisconfigurationException(
                f"Expected client_callbacks to be Lightning callbacks, got {callback!r}. Pass instances, for example "
                "client_callbacks=[GradientClip(1.0)]."
            )
    schedule = given.get("client_lr_schedule")
    if schedule is not None and not callable(schedule):
        raise MisconfigurationException(
            f"Expected client_lr_schedule to be a function of the round that returns a factor, got {schedule!r}. "
            "Write for example client_lr_schedule=lambda round: 0.99**round."
        )


def check_overrides(overrides: Overrides, client_ids: Sequence[ClientId]) -> None:
    """Raise for an override of a client that does not exist: it would never be used, and nobody would notice.

    Raises:
        MisconfigurationException: names the client.
    """
    if callable(overrides):
        return  # it is asked for those who take part
    known = client_ids if isinstance(client_ids, range) or not overrides else set(client_ids)
    for client_id in overrides:
        if client_id not in known:
            shown = ", ".join(map(repr, client_ids[:5])) + (", …" if len(client_ids) > 5 else "")
            raise MisconfigurationException(
                f"client_overrides names {client_id!r}, which is none of the {len(client_ids)} clients ({shown}). Use "
                "the ids as client_ids() gives them: 1 and '1' are different clients. For clients that join later, "
                "give a function: client_overrides=lambda client_id: {'epochs': 2} if client_id == ... else None."
            )


def warn_of_strangers(parts: Iterable[Any], client_ids: Sequence[ClientId]) -> None:
    """Warn of an attack by clients that do not exist: it would never happen, and the rule would look robust.

    Args:
        parts: client callbacks and the algorithm; those with a list ``clients`` attack.
        client_ids: the clients that exist now; others may join later, so that this is no error.
    """
    attacks = [part for part in parts if isinstance(part, Attack | ALittleIsEnough)]
    known = client_ids if isinstance(client_ids, range) or not attacks else set(client_ids)
    for part in attacks:
        strangers = [client_id for client_id in part.clients if client_id not in known]
        if strangers:
            rank_zero_warn(
                f"{type(part).__name__} names the attackers {strangers[:5]}, which are none of the {len(client_ids)} "
                f"clients; the first is {client_ids[0]!r}. Use the ids as client_ids() gives them: 1 and '1' are "
                "different clients."
            )


def _check_personalize(settings: FederationSettings) -> None:
    epochs = settings.personalize_epochs
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise MisconfigurationException(
            f"Expected personalize_epochs to be an integer >= 0 (0 evaluates models as they are), got {epochs!r}."
        )
    if epochs and settings.evaluate_clients is False:
        raise MisconfigurationException(
            f"personalize_epochs={epochs} trains models that only the evaluation on clients shows. Set "
            "evaluate_clients=True, a count or a fraction, or leave it out."
        )


def _check_strategy(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if any(word in name.lower() for word in _SHARDING):
        raise MisconfigurationException(
            f"strategy={name!r} shards the model, and a federation's server needs it whole. Use strategy='auto' or "
            "strategy='ddp' with devices=1, 2, 4 or 8: the cohort is split over the processes."
        )


def _check_rounds(max_rounds: int | None, lightning: Mapping[str, Any], settings: FederationSettings) -> None:
    max_epochs = lightning.get("max_epochs")
    if max_epochs is not None and max_rounds is not None:
        raise MisconfigurationException(
            f"max_rounds={max_rounds} and max_epochs={max_epochs} are two names of one thing. Pass max_rounds only; "
            "the clients' epochs in a round are local_epochs."
        )
    if max_epochs is not None:
        raise MisconfigurationException(
            f"max_epochs={max_epochs} is ambiguous in a federation. Use max_rounds={max_epochs} for rounds, or "
            f"local_epochs={max_epochs} for the epochs of a client in each round."
        )
    if max_rounds is not None and (isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < -1):
        raise MisconfigurationException(
            f"Expected max_rounds to be an integer >= 0, or -1 for no limit, got {max_rounds!r}."
        )


def warn_of_averaging(callbacks: Iterable[Any]) -> None:
    """Warn of a callback that makes rounds something else than means."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        rank_zero_warn("StochasticWeightAveraging changes the server's learning rate: rounds are then no plain means.")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MisconfigurationException(f"Expected {name} to be one of {list(allowed)}, got {value!r}.")


def _at_least_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationException(f"Expected {name} to be an integer >= 1, got {value!r}.")


def _count_or_fraction(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise MisconfigurationException(f"Expected {name} as a fraction in (0, 1] or as a count >= 1, got {value!r}.")
    if not isinstance(value, float):
        _at_least_one(name, value)
