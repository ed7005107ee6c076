"""``python -m benchmarks compression``: what encoding and decoding ten million parameters costs, in batches.

Every transform takes turns with one batch of an MLP of that size: forward, backward and an SGD step. Time is that of
the processor, so that a machine that others use as well changes little, and a ratio compares within one turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fl_lightning import ErrorFeedback, Quantize, RandomK, TopK, chain
from fl_lightning.transforms import Cast, Codec, DeadZone, Eden, Eigenbasis, PowerSGD, Sign, Transform
from fl_lightning.types import ClientTask, Contribution, Memory

__all__ = ["RECIPES", "SIZES", "Cost", "main", "measure", "mlp"]

RECIPES: dict[str, Callable[[], Transform]] = {
    "TopK(0.01)": lambda: TopK(0.01),
    "TopK(0.01, per_tensor=True)": lambda: TopK(0.01, per_tensor=True),
    "RandomK(0.01)": lambda: RandomK(0.01),
    "RandomK(0.01, shared=True)": lambda: RandomK(0.01, shared=True),
    "Quantize(bits=8)": lambda: Quantize(8),
    "Quantize(bits=4)": lambda: Quantize(4),
    "Quantize(bits=2, block=1024)": lambda: Quantize(2, block=1024),
    "Quantize(bits=8, stochastic=False)": lambda: Quantize(8, stochastic=False),
    "Sign()": Sign,
    "Cast('float16')": lambda: Cast("float16"),
    "Cast('float8_e4m3fn')": lambda: Cast("float8_e4m3fn"),
    "Eden(bits=1)": lambda: Eden(1),
    "DeadZone(step=4.0)": lambda: DeadZone(4.0),
    "chain(Eigenbasis(), DeadZone(step=4.0))": lambda: chain(Eigenbasis(), DeadZone(4.0)),
    "PowerSGD(rank=2)": lambda: PowerSGD(2),
    "chain(TopK(0.01), Quantize(bits=4))": lambda: chain(TopK(0.01), Quantize(4)),
    "ErrorFeedback(chain(TopK(0.01), Quantize(bits=4)))": lambda: ErrorFeedback(chain(TopK(0.01), Quantize(4))),
}


SIZES = {"chain(Eigenbasis(), DeadZone(step=4.0))": 800_000}
"""The most parameters at which a transform is measured unless it is asked for: matrices with sides below a thousand."""


@dataclass(frozen=True)
class Cost:
    """Medians over the turns.

    Args:
        encode: milliseconds from the update to bytes.
        decode: milliseconds from bytes to what the server adds up, for a client; what is decoded on the sum only is
            counted as if the cohort were one client.
        batch: milliseconds of one batch in the same turns.
        ratio: of encode and decode together to the batch of the same turn.
        num_bytes: length of the payload.
    """

    encode: float
    decode: float
    batch: float
    ratio: float
    num_bytes: int


def mlp(num_parameters: int) -> nn.Sequential:
    """Return an MLP of two hidden layers with about that many parameters, from 784 pixels to 10 classes.

    Args:
        num_parameters: at least 10,000.

    Example:
        >>> abs(sum(p.numel() for p in mlp(10_000_000).parameters()) / 10_000_000 - 1) < 0.01
        True
    """
    width = 8  # width**2 + (784 + 1 + 10 + 1) * width + 10 parameters
    while (width + 1) ** 2 + 796 * (width + 1) + 10 <= num_parameters:
        width += 1
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


def measure(transform: Transform, network: nn.Sequential, batch_size: int, turns: int) -> Cost:
    """Let a transform and a training step alternate.

    Args:
        transform: what is measured.
        network: its update is encoded, and a batch trains it.
        batch_size: examples of the batch.
        turns: counted ones; one more warms up.
    """
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    step = _step(network, batch_size)
    step()
    update: dict[str, Tensor] = {name: p.detach() - start[name] for name, p in network.named_parameters()}
    codec, memory, times, length = Codec([transform], 0, start), Memory(), [], 0
    state, public = codec.init(), dict[str, Any]()
    for turn in range(turns + 1):
        task = ClientTask("client", turn, turn, public, seed=0)
        first, (data, kept) = _timed(lambda task=task, memory=memory: codec.encode(_of(update), task, memory))
        second, total = _timed(lambda data=data, task=task: codec.decode(data, task))
        third, _ = _timed(lambda total=total, turn=turn: codec.finish(total, turn, {}))
        batch, _ = _timed(step)
        if not turn:  # what the server learns from a round and sends with the next model
            _, state = codec.finish(total, turn, state)
            public, _, _ = codec.broadcast({"model": start}, ["client"], turn, state)
        memory, length = kept or {}, len(data)
        if turn:
            times.append((first, second + third, batch))
    encode, decode, batch = (1000 * median(column) for column in zip(*times, strict=True))
    return Cost(encode, decode, batch, median((a + b) / c for a, b, c in times), length)


def _of(update: dict[str, Tensor]) -> Contribution:
    return Contribution({"delta": update}, {"weight": 1.0})


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def _step(network: nn.Sequential, batch_size: int) -> Callable[[], None]:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch_size, 784, generator=draw)
    labels = torch.randint(10, (batch_size,), generator=draw)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()

    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compression", description=__doc__)
    parser.add_argument("--parameters", type=int, default=10_000_000, help="of the MLP")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5, help="counted turns of encode, decode and a batch")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--transforms", nargs="+", choices=[*RECIPES], default=[*RECIPES])
    parser.add_argument("--whole", action="store_true", help="measure at --parameters also what is meant for less")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.parameters:,} parameters, batches of {options.batch_size}, {options.turns} turns, CPU time\n")
    print("| transform | encode, ms | decode, ms | a batch, ms | encode + decode in batches | bytes |")
    print("|---|---|---|---|---|---|")
    for name in options.transforms:
        torch.manual_seed(0)
        size = options.parameters if options.whole else min(options.parameters, SIZES.get(name, options.parameters))
        cost = measure(RECIPES[name](), mlp(size), options.batch_size, options.turns)
        times = f"{cost.encode:.0f} | {cost.decode:.0f} | {cost.batch:.0f} | {cost.ratio:.2f}"
        at = "" if size == options.parameters else f" at {size:,}"
        print(f"| `{name}`{at} | {times} | {cost.num_bytes:,} |", flush=True)
