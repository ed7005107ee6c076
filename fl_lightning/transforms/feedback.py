"""Error feedback: what compression left out of a round is sent in a later one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.transforms.base import Broadcast, Exchange, Payload, State, Template, Transform, template_of
from fl_lightning.transforms.chaining import Chain
from fl_lightning.tree import add_, difference
from fl_lightning.types import ClientId, Contribution, Memory, Tree

__all__ = ["ErrorFeedback", "has_feedback"]

_KEY = "residual"


class ErrorFeedback(Transform):
    r"""Adds what earlier rounds left out to what a transform encodes, and keeps what this one leaves out.

    .. math:: p = x + e_t, \qquad \text{send } C(p), \qquad e_{t+1} = p - C(p)

    The residual :math:`e_t` lives in the client's memory: it survives a resume, and a client whose contribution the
    server did not accept keeps its old one. It is in the units of the contribution, weight included, and waits
    unchanged while the client is not chosen.

    The transform inside must shrink its error, :math:`\lVert x - C(x) \rVert < \lVert x \rVert`. Unbiased ones enlarge
    what they send and would make the residual grow without bound, so their contractive versions run here: ``RandomK``
    and ``Eden`` without their factor, ``Quantize`` rounding to the nearest level.

    Args:
        transform: what encodes; ``chain(...)`` for several.

    Raises:
        MisconfigurationException: for something that is no transform, or that has error feedback already.

    Example:
        >>> from fl_lightning.transforms import TopK
        >>> feedback, exchange = ErrorFeedback(TopK(k=1)), Exchange(seed=0, round=0)
        >>> contribution = Contribution({"delta": {"w": torch.tensor([1.0, 3.0])}})
        >>> memory, sent, template = {}, [], template_of(contribution.trees)
        >>> for _ in range(4):
        ...     payload, memory = feedback.encode(contribution, exchange, memory)
        ...     sent.append(feedback.decode(payload, exchange, template).trees["delta"]["w"].tolist())
        >>> sent
        [[0.0, 3.0], [0.0, 3.0], [3.0, 0.0], [0.0, 6.0]]

    References:
        Karimireddy et al., *Error Feedback Fixes SignSGD and other Gradient Compression Schemes*, 2019, algorithm 2;
        Stich et al., *Sparsified SGD with Memory*, 2018, algorithm 1.
    """

    remembers_values = True

    def __init__(self, transform: Transform) -> None:
        if not isinstance(transform, Transform):
            raise MisconfigurationException(
                f"ErrorFeedback expected a transform, got {transform!r}. Write ErrorFeedback(TopK(0.01))."
            )
        if has_feedback(transform):
            raise MisconfigurationException("ErrorFeedback inside ErrorFeedback feeds back nothing; leave one out.")
        self.transform = transform.contraction()

    @property
    def on_sum(self) -> bool:  # type: ignore[override]
        return self.transform.on_sum

    @property
    def keeps_shapes(self) -> bool:  # type: ignore[override]
        return self.transform.keeps_shapes

    def init(self, template: Template, seed: int) -> State:
        return self.transform.init(template, seed)

    def output(self, template: Template) -> Template:
        return self.transform.output(template)

    def encode(self, contribution: Contribution, exchange: Exchange, memory: Memory) -> tuple[Payload, Memory | None]:
        residual = memory.get(_KEY, {})
        trees = {key: _corrected(tree, residual.get(key)) for key, tree in contribution.trees.items()}
        payload, inner = self.transform.encode(
            Contribution(trees, contribution.scalars), exchange.at("feedback"), memory.get("inner", {})
        )
        sent = self.decode(payload, exchange, template_of(trees))
        left = {
            key: difference(tree, {n: t.to(tree[n].device) for n, t in sent.trees[key].items()})
            for key, tree in trees.items()
        }
        return payload, {_KEY: left} if inner is None else {_KEY: left, "inner": inner}

    def decode(self, payload: Payload, exchange: Exchange, template: Template) -> Contribution:
        return self.transform.decode(payload, exchange.at("feedback"), template)

    def broadcast(self, model: Tree, cohort: Sequence[ClientId], exchange: Exchange, state: State) -> Broadcast:
        at = exchange.at("feedback")
        sent = self.transform.broadcast(model, cohort, at, state)
        return replace(sent, public={}, extra=sent.trees(at))

    def finish(self, total: Contribution, state: State) -> tuple[Contribution, State]:
        return self.transform.finish(total, state)


def has_feedback(transform: Transform) -> bool:
    """Return whether error feedback is anywhere in a transform: itself, a part of a chain, or what it wraps."""
    inside = transform.parts if isinstance(transform, Chain) else vars(transform).values()
    parts = [part for part in inside if isinstance(part, Transform)]
    return isinstance(transform, ErrorFeedback) or any(map(has_feedback, parts))


@torch.no_grad()
def _corrected(tree: Tree, residual: Tree | None) -> Tree:
    if residual is None:
        return tree
    corrected = {name: tensor.detach().clone() for name, tensor in tree.items()}
    add_(corrected, {name: residual[name].to(tensor) for name, tensor in tree.items()})
    return corrected
