"""Who trains together: which modules can, how many clients at once, and which clients of a lane."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import lightning.pytorch as pl
from lightning.pytorch import Callback
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fl_lightning.callbacks import StepCounter
from fl_lightning.callbacks.base import GradientCorrection
from fl_lightning.local.lean_client import Facts
from fl_lightning.local.lean_group_attacks import attacks_in_groups
from fl_lightning.local.settings import LocalSettings

__all__ = ["cannot_group", "chunks", "group_size", "too_long"]

_CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.RNNBase)
_SMALL, _MEDIUM = 20_000, 300_000
"""Parameters of a module. Offline, on one CPU thread, against the lean loop with one client at a time: a logistic
regression with 610 parameters gains most with all clients of a lane at once, an MLP with 199,210 half as much again
with 16 at a time and nothing with 4, a CNN with 1,663,370 loses (its convolutions become grouped ones)."""
_TICK, _OPEN = 4, 8
"""In steps of a client alone, measured like the sizes above: what one step of a group takes, and what a client that
trains by itself takes more than one in a group before and after its steps."""
_MEMORY = 64 * 2**20
"""Bytes of examples in a group, and of what their steps keep for the backward pass."""


def cannot_group(
    module: pl.LightningModule, facts: Facts, settings: LocalSettings, callbacks: Iterable[Callback], accumulate: int
) -> str | None:
    """Return why clients of a module train one by one, or ``None``; some reasons show only in the first group."""
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            return f"LeanLoop cannot group {type(part).__name__} {name!r}: its running statistics update in place"
        if isinstance(part, nn.Embedding) and not (part.padding_idx is None and part.max_norm is None):
            return f"vmap does not know padding_idx and max_norm of Embedding {name!r}"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in module.parameters()):
        return "a hook on a parameter sees one client's gradient"
    if facts.hooks & _HOOKS:
        return f"{type(module).__name__} overrides {', '.join(sorted(facts.hooks & _HOOKS))}, which sees one client"
    if not facts.plain_precision:
        return f"precision {facts.precision.precision!r} is for one client at a time"
    if accumulate != 1:
        return "gradients accumulate over batches"
    if settings.client_state == "keep":
        return "client_state='keep' carries optimizers over"
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    for name in settings.local_names:
        if name not in trains:
            return f"{name!r} stays with its client and is not trained"
    if facts.device.type != "cpu":
        return "groups are measured on CPUs only"
    return _strange(callbacks)


_HOOKS = frozenset(
    f"on_{what}_{when}" for what in ("fit", "train", "train_epoch", "train_batch") for when in ("start", "end")
) | {"setup", "teardown"}


def _strange(callbacks: Iterable[Callback]) -> str | None:
    for callback in callbacks:
        if isinstance(callback, GradientCorrection):
            own = {name for name in _HOOKS if getattr(type(callback), name) is not getattr(GradientCorrection, name)}
            if not own and type(callback).on_before_optimizer_step is GradientCorrection.on_before_optimizer_step:
                continue
        elif type(callback) is StepCounter or attacks_in_groups(callback):
            continue
        return f"the callback {type(callback).__name__} sees one client"
    return None


def group_size(module: pl.LightningModule, settings: LocalSettings) -> int:
    """Return how many clients train at once: a pure function of the module and the configuration.

    ``"auto"`` groups only where a group gives what its clients give alone, to rounding: batched kernels add in another
    order, and in the tests an update differs by less than ``5e-5`` of its norm (``1e-4`` with Adam, which divides by
    small numbers): a few units in the last place of the weights. Dropout draws other masks in a group, which is the
    same only in distribution: such a module trains one by one unless ``group_size`` is given. ``group_size=1`` keeps
    the bits of LightningLoop for every module.

    Args:
        module: the clients' module.
        settings: ``group_size`` and ``local_loop``.

    Example:
        >>> group_size(pl.LightningModule(), LocalSettings(group_size=7))
        7
    """
    if settings.group_size != "auto":
        return settings.group_size
    parts = list(module.modules())
    if any(isinstance(part, (*_CONVOLUTIONS, _DropoutNd)) or _attends(part) for part in parts):
        return 1
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return 256 if parameters <= _SMALL else 16 if parameters <= _MEDIUM else 1


def _attends(part: nn.Module) -> bool:
    return isinstance(part, nn.MultiheadAttention)


def chunks(kinds: Sequence[object], num_bytes: Sequence[int], limit: int = _MEMORY) -> list[list[int]]:
    """Return positions of equal kinds together, in the order in which the kinds come first.

    Args:
        kinds: what clients of one group have in common.
        num_bytes: of the examples that a client brings, which a group holds a second time, and of what a step keeps.
        limit: how many bytes a group may hold; a client above it is alone.

    Example:
        >>> chunks(["a", "b", "a", "a"], [1, 1, 1, 1], limit=2)
        [[0, 2], [3], [1]]
    """
    found: dict[object, list[list[int]]] = {}
    held: dict[object, int] = {}
    for position, (kind, size) in enumerate(zip(kinds, num_bytes, strict=True)):
        if kind not in found or held[kind] + size > limit:
            found.setdefault(kind, []).append([])
            held[kind] = 0
        found[kind][-1].append(position)
        held[kind] += size
    return [chunk for some in found.values() for chunk in some]


def too_long(steps: Sequence[int]) -> int:
    r"""Return how many of the clients with the most steps train alone, so that the others need not wait for them.

    A group makes as many steps as its longest client, however few clients go on to the end. From the longest to the
    shortest, the first ``j`` alone and the others together take :math:`\sum_{i \le j} (s_i + o) + t\,s_{j+1}`, of
    which this is the smallest: a step of a group takes the time of ``t``, and a client alone ``o`` beside its steps.

    Args:
        steps: of the clients, all epochs together, in any order.

    Example:
        >>> too_long([10] * 8), too_long([10] * 8 + [500])
        (0, 1)
        >>> too_long([300, 200, 150])  # together they would take as long as four times 300 steps
        3
    """
    falling = sorted(steps, reverse=True)
    alone = list(accumulate((s + _OPEN for s in falling), initial=0))
    costs = {j: alone[j] + _TICK * longest for j, longest in enumerate(falling[:-1])}
    costs[len(falling)] = alone[-1]
    return min(costs, key=costs.__getitem__)
