"""Several transforms as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.transforms.base import Broadcast, Exchange, Payload, State, Template, Transform
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.types import ClientId, Contribution, Memory, Tree

__all__ = ["Chain", "all_transforms", "chain"]


class Chain(Transform):
    """Applies transforms in order on the client, and undoes them in reverse on the server.

    Each part encodes what the part before it left open: after ``TopK`` those are the chosen values, after ``Quantize``
    nothing is left. A chain without parts changes no bit.

    Args:
        parts: the transforms; chains among them are flattened.

    Raises:
        MisconfigurationException: for something that is no transform, or error feedback behind a part that chooses
            other values in each round.

    Example:
        >>> from fl_lightning.transforms import Quantize, TopK
        >>> [type(part).__name__ for part in chain(chain(TopK(0.01)), Quantize(8)).parts]
        ['TopK', 'Quantize']
    """

    def __init__(self, parts: Sequence[Transform] = ()) -> None:
        self.parts: list[Transform] = []
        for part in parts:
            if not isinstance(part, Transform):
                raise MisconfigurationException(
                    f"Expected transforms such as TopK(0.01), got {part!r}. Write transforms=[TopK(0.01), ...]."
                )
            self.parts += part.parts if isinstance(part, Chain) else [part]
        for before, part in zip(self.parts, self.parts[1:], strict=False):
            if part.remembers_values and not before.keeps_shapes:
                raise MisconfigurationException(
                    f"{type(part).__name__} stands behind {type(before).__name__}, which gives it other values in each "
                    f"round. Put all of it inside one: ErrorFeedback(chain({_shown(before)}, ...))."
                )

    @property
    def on_sum(self) -> bool:  # type: ignore[override]
        return bool(self.parts) and all(part.on_sum for part in self.parts)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return all(part.unbiased for part in self.parts)

    @property
    def keeps_shapes(self) -> bool:  # type: ignore[override]
        return all(part.keeps_shapes for part in self.parts)

    @property
    def remembers_values(self) -> bool:  # type: ignore[override]
        return bool(self.parts) and self.parts[0].remembers_values

    def init(self, template: Template, seed: int) -> State:
        state: State = {}
        for index, part in enumerate(self.parts):
            own = part.init(template, seed)
            if own:
                state[str(index)] = own
            template = part.output(template)
        return state

    def output(self, template: Template) -> Template:
        for part in self.parts:
            template = part.output(template)
        return template

    def encode(self, contribution: Contribution, exchange: Exchange, memory: Memory) -> tuple[Payload, Memory | None]:
        sealed: list[Any] = []
        kept: Memory = {}
        for index, part in enumerate(self.parts):
            payload, own = part.encode(contribution, exchange.at(index), memory.get(str(index), {}))
            contribution = payload.contribution
            sealed.append(payload.sealed)
            if own is not None:
                kept[str(index)] = own
        return Payload(contribution, sealed), kept or None

    def decode(self, payload: Payload, exchange: Exchange, template: Template) -> Contribution:
        return self.decode_parts(payload, exchange, template, range(len(self.parts)))

    def decode_parts(self, payload: Payload, exchange: Exchange, template: Template, which: range) -> Contribution:
        """Undo some of the parts; ``template`` is that of the first part's input."""
        if not isinstance(payload.sealed, list) or len(payload.sealed) != len(self.parts):
            raise PayloadError(f"expected codes of {len(self.parts)} transforms, got {type(payload.sealed).__name__}")
        templates = [template]
        for part in self.parts:
            templates.append(part.output(templates[-1]))
        contribution = payload.contribution
        for index in reversed(which):
            step = Payload(contribution, payload.sealed[index])
            contribution = self.parts[index].decode(step, exchange.at(index), templates[index])
        return contribution

    def finish(self, total: Contribution, state: State) -> tuple[Contribution, State]:
        state = dict(state)
        for index in reversed(range(len(self.parts))):
            total, own = self.parts[index].finish(total, state.get(str(index), {}))
            if own:
                state[str(index)] = own
        return total, state

    def broadcast(self, model: Tree, cohort: Sequence[ClientId], exchange: Exchange, state: State) -> Broadcast:
        sent = Broadcast(model, dict(state))
        for index, part in enumerate(self.parts):
            at = exchange.at(index)
            own = part.broadcast(sent.model, cohort, at, state.get(str(index), {}))
            sent.model = own.model
            sent.extra.update(own.trees(at))
            sent.num_bytes = own.num_bytes if own.num_bytes is not None else sent.num_bytes
            if own.state:
                sent.state[str(index)] = own.state
        return sent

    def contraction(self) -> Transform:
        return Chain([part.contraction() for part in self.parts])


def _shown(part: Transform) -> str:
    """Return a part as it stands inside of error feedback, which must not be there twice."""
    inner = getattr(part, "transform", part) if part.remembers_values else part
    return ", ".join(f"{type(p).__name__}(...)" for p in (inner.parts if isinstance(inner, Chain) else [inner]))


def chain(*parts: Transform) -> Chain:
    """Return transforms as one; see :class:`Chain`. Without parts it is the identity, bit for bit.

    Args:
        parts: the transforms, in the client's order.

    Raises:
        MisconfigurationException: for something that is no transform.

    Example:
        >>> from fl_lightning.transforms import Quantize, TopK
        >>> chain(TopK(0.01), Quantize(bits=4)).unbiased, chain().unbiased
        (False, True)
    """
    return Chain(parts)


def all_transforms(transforms: Transform | Sequence[Transform] | None, callbacks: Any) -> list[Transform]:
    """Return what the client callbacks bring (``Compression`` does), and then the transforms themselves.

    Args:
        transforms: one, several or none.
        callbacks: one client callback, several or none.

    Raises:
        MisconfigurationException: for something that is no transform.
    """
    given = [callbacks] if not isinstance(callbacks, list | tuple) else callbacks
    brought = [transform for callback in given for transform in getattr(callback, "transforms", ())]
    if isinstance(transforms, Transform):
        transforms = [transforms]
    if transforms is not None and not isinstance(transforms, list | tuple):
        raise MisconfigurationException(f"Expected transforms=[TopK(0.01), ...], got {transforms!r}.")
    return Chain([*brought, *(transforms or ())]).parts
