"""The server's side of the wire: what goes out to a cohort, and what comes back from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fl_lightning.transforms.base import State
from fl_lightning.transforms.codec import Codec
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.types import ClientId, ClientTask, Contribution, Tree

__all__ = ["TRANSFORMS", "ServerCodec"]

TRANSFORMS = "transforms"
"""Where a client's memory, and the server's state, keep what transforms remember."""


class ServerCodec:
    """Compresses broadcasts, opens payloads and finishes sums, one round after the other.

    An algorithm's contributions all have the same trees. A payload with others would be added to nothing, and its
    weight would count without its update: the first one of a federation says what is right.

    Args:
        codec: both halves of the transforms.
        device: where the sum is.

    Example:
        >>> codec = Codec([], 0, {"w": torch.zeros(2)})
        >>> server, task = ServerCodec(codec, torch.device("cpu")), ClientTask("a", 0, 0, {}, seed=0)
        >>> good, _ = codec.encode(Contribution({"delta": {"w": torch.ones(2)}}, {"weight": 1.0}), task, {})
        >>> server.open(good, task).trees["delta"]["w"].tolist()
        [1.0, 1.0]
        >>> other, _ = codec.encode(Contribution({}, {"weight": 9.0}), task, {})
        >>> server.open(other, task)
        Traceback (most recent call last):
        fl_lightning.transforms.errors.PayloadError: its payload holds other tensors than those of clients before it
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.codec = codec
        self.device = device
        self.num_bytes_down = 0
        self.downloads: list[tuple[ClientId, int]] = []
        self._round = 0
        self._state: State = {}
        self._kind: Any = None

    def start(self, state: State) -> State:
        """Return the server's first state with that of the transforms in it.

        Args:
            state: of the algorithm.

        Raises:
            MisconfigurationException: when the transforms cannot serve this model.
        """
        self._state = self.codec.init()
        return self.with_state(state)

    def with_state(self, state: State) -> State:
        """Return the algorithm's next state with that of the transforms in it."""
        return {**state, TRANSFORMS: self._state} if self._state else state

    def first_upload(self, trees: Mapping[str, Tree], scalars: Mapping[str, float]) -> int | None:
        """Return how long a contribution is once it is encoded, before any client has encoded one.

        Args:
            trees: like those of a contribution; with transforms whose length depends on the values it is an estimate.
            scalars: like its scalars.

        Returns:
            Bytes, or ``None`` when they cannot be encoded: a client that fails to do so names what is wrong.
        """
        task = ClientTask("", 0, 0, {}, seed=self.codec.seed)
        try:
            return len(self.codec.encode(Contribution({**trees}, dict(scalars)), task, {})[0])
        except Exception:
            return None

    def open_round(self, round: int, state: State) -> None:
        """Begin a round, with the server's state in which that of the transforms is."""
        self._round, self._state, self.num_bytes_down = round, state.get(TRANSFORMS, {}), 0
        self.downloads = []

    def send(self, trees: Mapping[str, Tree], cohort: Sequence[ClientId]) -> dict[str, Tree]:
        """Return the trees as clients get them in this round.

        ``downloads`` then has each client with the bytes that it downloads, and ``num_bytes_down`` is their sum.
        """
        sent, sizes, self._state = self.codec.broadcast(trees, cohort, self._round, self._state)
        self.downloads, self.num_bytes_down = list(zip(cohort, sizes, strict=True)), sum(sizes)
        return sent

    def open(self, data: bytes, task: ClientTask) -> Contribution:
        """Return the contribution in a payload.

        Raises:
            PayloadError: for a payload that cannot be decoded, or is of another kind than those before it.
        """
        contribution = self.codec.decode(data, task)
        kind = {key: {n: (t.shape, t.dtype) for n, t in tree.items()} for key, tree in contribution.trees.items()}
        if self._kind is None:
            self._kind = kind
        if kind != self._kind:
            raise PayloadError("its payload holds other tensors than those of clients before it")
        trees = {key: {n: t.to(self.device) for n, t in tree.items()} for key, tree in contribution.trees.items()}
        return Contribution({**trees}, contribution.scalars)

    def finish(self, total: Contribution) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
        """Return trees and scalars of the sum of the round, as the algorithm reads them."""
        finished, self._state = self.codec.finish(total, self._round, self._state)
        trees = {key: {n: t.to(self.device) for n, t in tree.items()} for key, tree in finished.trees.items()}
        return trees, finished.scalars
