"""What is remembered of devices that took part, and of no others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fl_lightning.types import ClientId

__all__ = ["Participants"]


class Participants:
    """Battery level after the last work, when that was, and how often a device was sent work and delivered.

    A device that never took part has no entry: the size is that of the participants, whatever the population.

    Example:
        >>> known = Participants()
        >>> known.worked("a", level=0.5, at=60.0, delivered=True)
        >>> known.levels(["a", "b"])[0].tolist(), known.delivered(["a", "b"]).tolist()
        ([0.5, nan], [1, 0])
    """

    def __init__(self) -> None:
        self._rows: dict[ClientId, tuple[float, float, int, int]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, client_id: ClientId) -> bool:
        return client_id in self._rows

    def worked(self, client_id: ClientId, level: float, at: float, delivered: bool) -> None:
        """Remember one dispatch.

        Args:
            client_id: who worked.
            level: battery level afterwards.
            at: when it ended, in seconds on the clock.
            delivered: whether its report came in time.
        """
        _, _, sent, reported = self._rows.get(client_id, (0.0, 0.0, 0, 0))
        self._rows[client_id] = level, at, sent + 1, reported + int(delivered)

    def levels(self, client_ids: Sequence[ClientId]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the level after the last work (NaN for who never worked) and the seconds at which that was."""
        levels, times = np.full(len(client_ids), np.nan), np.zeros(len(client_ids))
        if self._rows:
            for index, client_id in enumerate(client_ids):
                row = self._rows.get(client_id)
                if row is not None:
                    levels[index], times[index] = row[0], row[1]
        return levels, times

    def delivered(self, client_ids: Iterable[ClientId]) -> NDArray[np.int64]:
        """Return how often each delivered."""
        return np.array([self._rows[c][3] if c in self._rows else 0 for c in client_ids], dtype=np.int64)

    def counts(self) -> Mapping[ClientId, int]:
        """Return how often every device that was ever sent work delivered."""
        return {client_id: row[3] for client_id, row in self._rows.items()}

    def state_dict(self) -> dict[str, Any]:
        rows = list(self._rows.values())
        return {
            "ids": list(self._rows),
            "levels": torch.tensor([row[0] for row in rows], dtype=torch.float64),
            "at": torch.tensor([row[1] for row in rows], dtype=torch.float64),
            "sent": torch.tensor([row[2] for row in rows], dtype=torch.int64),
            "delivered": torch.tensor([row[3] for row in rows], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        columns = [state[name].tolist() for name in ("levels", "at", "sent", "delivered")]
        self._rows = dict(zip(state["ids"], zip(*columns, strict=True), strict=True))
