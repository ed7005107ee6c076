"""Compression as a client callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.callbacks.base import ClientCallback
from fl_lightning.transforms import Codec, Transform
from fl_lightning.transforms.base import State
from fl_lightning.tree import difference
from fl_lightning.types import ClientTask, Contribution, Memory

__all__ = ["Compression"]


class Compression(ClientCallback):
    r"""Lets the update of a training pass through a transform.

    In a federation, ``client_callbacks=[Compression(transform)]`` is ``transforms=[transform]``: the contribution
    travels as the transform's bytes, whichever loop trains. In a plain ``lightning.Trainer`` the callback shows what
    compression does to a model without a server: at the end of the fit the weights become

    .. math:: w \leftarrow w_0 + C(w - w_0)

    with :math:`w_0` the trainable weights at its start. ``num_bytes`` then is the length of the encoded update, and the
    residual of error feedback is kept for the next fit and in checkpoints.

    Args:
        transform: what encodes the update; ``chain(...)`` for several.

    Raises:
        MisconfigurationException: for something that is no transform.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from fl_lightning.transforms import TopK
        >>> module, compression = BoringModel(), Compression(TopK(k=3))
        >>> start = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
        >>> Trainer(max_steps=2, accelerator="cpu", callbacks=[compression], logger=False, barebones=True).fit(module)
        >>> end = torch.cat([p.detach().flatten() for p in module.parameters()])
        >>> int((end != start).sum()), compression.num_bytes < 66 * 4 + 600
        (3, True)
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise MisconfigurationException(
                f"Compression expected a transform, got {transform!r}. Write Compression(TopK(0.01))."
            )
        self.transform = transform
        self.num_bytes = 0
        self._federated = False
        self._num_fits = 0
        self._memory: Memory = {}
        self._state: State = {}
        self._start: dict[str, Tensor] = {}

    @property
    def transforms(self) -> list[Transform]:
        """What a federation lets the contributions of all clients pass through."""
        return [self.transform]

    def begin(self, task: ClientTask, memory: Memory) -> None:
        self._federated = True  # the client's contribution is encoded on its way to the server, weight included

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._federated:
            self._start = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
            self._codec = Codec(self.transforms, 0, self._start)
            self._codec.init()

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._federated:
            return
        own = {name: p for name, p in pl_module.named_parameters() if name in self._start}
        round = self._num_fits
        sent, _, state = self._codec.broadcast({"model": self._start}, ["plain"], round, self._state)
        task = ClientTask("plain", round, 0, sent, seed=0)
        delta = difference({name: p.detach() for name, p in own.items()}, self._start)
        data, kept = self._codec.encode(Contribution({"delta": delta}), task, self._memory)
        total, self._state = self._codec.finish(self._codec.decode(data, task), round, state)
        for name, change in total.trees["delta"].items():
            own[name].copy_(self._start[name] + change.to(self._start[name]))
        self.num_bytes, self._memory = len(data), kept or {}
        self._num_fits += 1
        self._start = {}

    def state_dict(self) -> dict[str, Any]:
        kept = {"memory": self._memory, "state": self._state}
        return {"num_fits": self._num_fits, "num_bytes": self.num_bytes, **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_fits, self.num_bytes = state_dict["num_fits"], state_dict["num_bytes"]
        self._memory, self._state = state_dict["memory"], state_dict["state"]
