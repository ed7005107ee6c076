"""What the client half needs to know beside the task: plain values, fixed for the whole federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback

from fl_lightning.transforms import Codec
from fl_lightning.types import Tree

__all__ = ["LocalSettings"]


@dataclass(slots=True)
class LocalSettings:
    """How clients train, whichever loop runs them.

    Args:
        trainer_arguments: Lightning's Trainer arguments that describe local training.
        callbacks: the user's client callbacks; copied per client.
        client_state: "reset" starts optimizers anew each round, "keep" goes on where the client's last round ended.
        personalize_epochs: epochs of local training before a client's personal model is evaluated; 0 for none.
        local_loop: which loop runs a client.
        group_size: clients trained at once by vmap in the lean loop.
        memory_format: layout of the weights of convolutions while clients train.
        parameter_names: trainable parameters that travel.
        buffer_names: buffers that travel.
        local_names: parameters and buffers that stay with their client.
        static: values that neither travel nor change: frozen parameters and the server's other buffers.
        codec: turns contributions into bytes; the default leaves them as they are.
        device: where this process trains.
        save_dir: the federation's log folder.
        has_loggers: whether the federation logs at all; clients find ``self.logger`` exactly then.
    """

    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    client_state: Literal["reset", "keep"] = "reset"
    personalize_epochs: int = 0
    local_loop: Literal["auto", "lightning", "lean"] = "auto"
    group_size: int | Literal["auto"] = "auto"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    parameter_names: Sequence[str] = ()
    buffer_names: Sequence[str] = ()
    local_names: Sequence[str] = ()
    static: Tree = field(default_factory=dict)
    codec: Codec = field(default_factory=lambda: Codec([], 0, {}))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    save_dir: str | None = None
    has_loggers: bool = False
