"""The errors of the federation. Each says what was expected, what came, and what to do instead."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.types import ClientId

__all__ = [
    "BadUpdateError",
    "ClientError",
    "EmptyClientError",
    "MisconfigurationException",
    "NoLossError",
    "NotEnoughClientsError",
]


class ClientError(RuntimeError):
    """The training of one client failed; ``client_id`` names it and ``__cause__`` keeps the original error."""

    def __init__(self, client_id: ClientId, round: int, reason: str) -> None:
        stop = "" if reason.rstrip().endswith((".", "!", "?")) else "."
        super().__init__(
            f"Client {client_id!r} failed in round {round}: {reason.rstrip()}{stop}\n"
            "Mend the client, or pass on_bad_update='skip' to go on without it (the round's report names it)."
        )
        self.client_id = client_id
        self.round = round
        self.reason = reason

    def __reduce__(self) -> tuple[type[ClientError], tuple[ClientId, int, str]]:
        return type(self), (self.client_id, self.round, self.reason)  # the text alone would not rebuild it


class BadUpdateError(ClientError):
    """The update of a client cannot be used: a NaN, an infinity, or shapes of another model."""


class EmptyClientError(ClientError):
    """A client has no batch to train on."""


class NoLossError(ClientError):
    """A client has batches and no loss: its ``training_step`` skipped every one."""


class NotEnoughClientsError(RuntimeError):
    """Fewer clients are available, or delivered, than ``min_clients``."""
