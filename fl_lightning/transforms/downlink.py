"""Compression of what the server sends: the change of the model since the version that a client has."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Broadcast, Exchange, Payload, State, Template, Transform, template_of
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.feedback import has_feedback
from fl_lightning.tree import add_, difference
from fl_lightning.types import ClientId, Contribution, Tree
from fl_lightning.wire import pack, unpack

__all__ = ["CompressedBroadcast"]

_KEY = "model"


class CompressedBroadcast(Transform):
    r"""Sends the model as compressed steps of a public reference that all clients can follow.

    .. math:: r_0 = w_0, \qquad r_t = r_{t-1} + C(w_t - r_{t-1})

    Clients train from :math:`r_t`, and the server steps its own :math:`w_t` with their updates. What a step leaves out
    is in the next difference, so nothing is lost. A client that was away downloads the steps that it missed, or the
    whole reference where that is shorter; a client's first download is the whole. Updates themselves are not changed:
    put another transform beside this one for them.

    Args:
        transform: encodes the step; its contractive version runs, as under error feedback.

    Raises:
        MisconfigurationException: for something that is no transform, or that keeps memory with each client.

    Example:
        >>> import torch
        >>> from fl_lightning.transforms import TopK
        >>> transform, state = CompressedBroadcast(TopK(k=1)), {}
        >>> for round, model in enumerate(([1.0, 1.0], [2.0, 4.0], [2.0, 4.0])):
        ...     sent = transform.broadcast({"w": torch.tensor(model)}, ["a"], Exchange(0, round), state)
        ...     state = sent.state
        ...     print(sent.model["w"].tolist())
        [1.0, 1.0]
        [1.0, 4.0]
        [2.0, 4.0]

    References:
        Tang et al., *DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-Pass Error-Compensated
        Compression*, 2019. There the server compresses its gradient with error feedback; the reference is the same sum.
    """

    unbiased = True
    keeps_shapes = True

    def __init__(self, transform: Transform) -> None:
        if not isinstance(transform, Transform):
            raise MisconfigurationException(
                f"CompressedBroadcast expected a transform, got {transform!r}. Write CompressedBroadcast(TopK(0.1))."
            )
        if has_feedback(transform):
            raise MisconfigurationException(
                "CompressedBroadcast compresses a difference that holds every earlier error; leave ErrorFeedback out."
            )
        self.transform = transform.contraction()

    def init(self, template: Template, seed: int) -> State:
        self.transform.init({_KEY: next(iter(template.values()))}, seed)
        return {}

    def broadcast(self, model: Tree, cohort: Sequence[ClientId], exchange: Exchange, state: State) -> Broadcast:
        if state:
            reference: Tree = state["reference"]
            step = self.step(model, reference, exchange)
            reference = self.follow(reference, step, exchange)
            whole, count, versions = state["whole"], state["count"] + 1, dict(state["versions"])
            steps = _recent([*state["steps"], len(step)], whole)
        else:
            reference = {name: tensor.detach().clone() for name, tensor in model.items()}
            whole, count, versions, steps = len(pack({_KEY: reference})), 0, {}, []
        sizes = []
        for client_id in cohort:
            missed = count - versions.get(repr(client_id), -1)  # 1 and "1" are different clients
            sizes.append(whole if missed > len(steps) else min(whole, sum(steps[len(steps) - missed :])))
            versions[repr(client_id)] = count
        # who is further behind than the steps that are kept downloads the whole, like somebody new
        versions = {client: version for client, version in versions.items() if count - version <= len(steps)}
        kept = {"reference": reference, "whole": whole, "count": count, "steps": steps, "versions": versions}
        return Broadcast(reference, kept, sizes)

    def step(self, model: Tree, reference: Tree, exchange: Exchange) -> bytes:
        """Return the message that takes a client from the last reference towards the model.

        Args:
            model: the server's.
            reference: what clients have that took part in the last round.
            exchange: its seed and round; both sides draw from them.
        """
        change = Contribution({_KEY: difference(model, reference)})
        payload, _ = self.transform.encode(change, exchange.at("broadcast"), {})
        return pack([exchange.round, payload.contribution.trees, payload.sealed])

    def follow(self, reference: Tree, step: bytes, exchange: Exchange) -> dict[str, Tensor]:
        """Return the reference after a step, from its bytes; server and clients get the same bits.

        Args:
            reference: the one before.
            step: from :meth:`step`.
            exchange: its seed and round.

        Raises:
            PayloadError: for a step of another round.
        """
        round, trees, sealed = unpack(step)
        if round != exchange.round:
            raise PayloadError(f"expected the step of round {exchange.round}, got that of round {round}")
        template = template_of({_KEY: reference})
        payload = Payload(Contribution(trees), sealed)
        decoded = self.transform.decode(payload, exchange.at("broadcast"), template).trees[_KEY]
        moved = {name: tensor.clone() for name, tensor in reference.items()}
        add_(moved, {name: decoded[name].to(tensor) for name, tensor in moved.items()})
        return moved


def _recent(steps: list[int], whole: int) -> list[int]:
    """Return the last steps that are together no shorter than the whole model: more of them nobody downloads."""
    total = 0
    for kept, length in enumerate(reversed(steps), start=1):
        total += length
        if total >= whole:
            return steps[len(steps) - kept :]
    return steps
