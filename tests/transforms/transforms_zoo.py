"""Every transform, and what passes through them in the tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fl_lightning import FedAvg
from fl_lightning.transforms import (
    Cast,
    Codec,
    CompressedBroadcast,
    DeadZone,
    Eden,
    Eigenbasis,
    ErrorFeedback,
    PowerSGD,
    Quantize,
    RandomK,
    Sign,
    TopK,
    Transform,
    chain,
)
from fl_lightning.types import ClientTask, Contribution, Tree

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "broadcast": lambda: CompressedBroadcast(TopK(0.3)),
    "broadcast and update": lambda: chain(CompressedBroadcast(Quantize(8)), TopK(0.3)),
    "cast bf16": partial(Cast, "bfloat16"),
    "cast fp16": partial(Cast, "float16"),
    "cast fp8": partial(Cast, "float8_e4m3fn"),
    "cast fp8 wide": partial(Cast, "float8_e5m2"),
    "dead zone": partial(DeadZone, 1.0),
    "eden 1": partial(Eden, 1),
    "eden 3": partial(Eden, 3),
    "eigenbasis": lambda: chain(Eigenbasis(), DeadZone(1.0)),
    "eigenbasis alone": Eigenbasis,
    "feedback": lambda: ErrorFeedback(chain(TopK(0.2), Quantize(4))),
    "feedback eigenbasis": lambda: ErrorFeedback(chain(Eigenbasis(), DeadZone(2.0))),
    "feedback low rank": lambda: ErrorFeedback(PowerSGD(1)),
    "feedback random": lambda: ErrorFeedback(RandomK(0.2)),
    "feedback sign": lambda: ErrorFeedback(Sign()),
    "low rank": partial(PowerSGD, 1),
    "low rank quantised": lambda: chain(PowerSGD(1), Quantize(8)),
    "quantize 1": partial(Quantize, 1),
    "quantize 2 blocks": partial(Quantize, 2, block=16),
    "quantize 8": partial(Quantize, 8),
    "quantize 11 nearest": partial(Quantize, 11, stochastic=False),
    "quantize qsgd": partial(Quantize, 4, norm="2"),
    "random": partial(RandomK, 0.3),
    "random shared": partial(RandomK, k=7, shared=True),
    "random shared quantised": lambda: chain(RandomK(0.5, shared=True), Quantize(8)),
    "sign": Sign,
    "top": partial(TopK, 0.1),
    "top per tensor": partial(TopK, 0.1, per_tensor=True),
    "top quantised": lambda: chain(TopK(0.2), Quantize(4)),
}


def tree(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a small update with a matrix, a vector, a scalar and an empty tensor."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"w": (12, 9), "b": (12,), "temperature": (), "none": (0, 3), "v": (5, 2, 3)}
    return {name: torch.randn(shape, generator=draw, dtype=dtype) * scale for name, shape in shapes.items()}


def task(client_id: Any = "a", round: int = 3, dispatch_id: int = 17) -> ClientTask:
    return ClientTask(client_id, round, dispatch_id, {}, seed=0)


def decoded(transform: Transform, delta: Tree, seed: int = 0, client_id: Any = "a") -> dict[str, Tensor]:
    """Send an update through bytes and return what the server reads."""
    codec = Codec([transform], seed, delta)
    codec.init()
    data, _ = codec.encode(Contribution({"delta": delta}, {"weight": 1.0}), task(client_id), {})
    total = codec.decode(data, task(client_id))
    finished, _ = codec.finish(total, task().round, {})
    return dict(finished.trees["delta"])


def vector(transform: Transform, x: Tensor, seed: int = 0) -> Tensor:
    return decoded(transform, {"x": x}, seed)["x"]


class Tampered(FedAvg):
    """Client s1 makes a weight that no float32 holds."""

    def contribute(self, update: Any, task: Any, memory: Any) -> Any:
        contribution, kept = super().contribute(update, task, memory)
        if task.client_id == "s1":
            contribution.trees["delta"] = {n: t * float("inf") for n, t in contribution.trees["delta"].items()}
        return contribution, kept
