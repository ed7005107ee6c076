"""The server's side of the wire: payloads come in as bytes, and contributions that can be added go out."""

from __future__ import annotations

from typing import Any

import torch

from fl_lightning.transforms.codec import Codec
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.types import ClientTask, Contribution

__all__ = ["Inbox"]


class Inbox:
    """Opens payloads, and lets only those of one kind into the sum.

    An algorithm's contributions all have the same trees. A payload with others would be added to nothing, and its
    weight would count without its update; the first one of a federation says what is right.

    Args:
        codec: decodes.
        device: where the sum is.

    Example:
        >>> codec = Codec([], 0, {"w": torch.zeros(2)})
        >>> inbox, task = Inbox(codec, torch.device("cpu")), ClientTask("a", 0, 0, {}, seed=0)
        >>> good, _ = codec.encode(Contribution({"delta": {"w": torch.ones(2)}}, {"weight": 1.0}), task, {})
        >>> inbox.open(good, task).trees["delta"]["w"].tolist()
        [1.0, 1.0]
        >>> other, _ = codec.encode(Contribution({}, {"weight": 9.0}), task, {})
        >>> inbox.open(other, task)
        Traceback (most recent call last):
        fl_lightning.transforms.errors.PayloadError: its payload holds other tensors than those of clients before it
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.codec = codec
        self.device = device
        self._kind: Any = None

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
        contribution.trees = {
            key: {name: tensor.to(self.device) for name, tensor in tree.items()}
            for key, tree in contribution.trees.items()
        }
        return contribution
