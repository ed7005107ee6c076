"""From a contribution to the byte string that travels, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fl_lightning.transforms.base import Exchange, Payload, State, Transform, template_of
from fl_lightning.transforms.chaining import Chain
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.tree import non_finite, num_bytes
from fl_lightning.types import ClientId, ClientTask, Contribution, Memory, Tree
from fl_lightning.wire import WireError, pack, text_length, unpack

__all__ = ["Codec", "PackedSize"]

_FORMAT = 3
_EXACT = frozenset({"buffers"})
"""Trees that no transform sees: a mean of running statistics that lost elements is no statistic."""
_SLACK = 1 << 20


class Codec:
    """Both halves of a federation's transforms; it holds nothing but their settings and the model's shapes.

    Trees with the names of the model's parameters pass through the transforms; running statistics, other trees and
    scalars travel as they are. A payload names its round and client and carries a digest of transforms and shapes, so
    that one made for something else is refused.

    Args:
        transforms: in the client's order; none leaves every bit as it is.
        seed: of the random numbers that both sides draw.
        model: the parameters that travel.
        buffers: the buffers that travel.

    Example:
        >>> import torch
        >>> from fl_lightning.transforms import TopK
        >>> model = {"w": torch.zeros(3)}
        >>> codec, task = Codec([TopK(k=1)], 0, model), ClientTask("a", 0, 0, {}, seed=0)
        >>> contribution = Contribution({"delta": {"w": torch.tensor([1.0, -4.0, 2.0])}}, {"weight": 2.0})
        >>> data, memory = codec.encode(contribution, task, {})
        >>> type(data).__name__, codec.decode(data, task)
        ('bytes', Contribution(trees={'delta': {'w': tensor([ 0., -4.,  0.])}}, scalars={'weight': 2.0}))
    """

    def __init__(self, transforms: Sequence[Transform], seed: int, model: Tree, buffers: Tree | None = None) -> None:
        self.transform = Chain(transforms)
        self.seed = seed
        specs = template_of({"model": model, "buffers": buffers or {}})
        self._model, self._buffers = specs["model"], specs["buffers"]
        # decoded once, on the sum of a round: the leading parts whose decoding is linear
        self._linear = 0
        while self._linear < len(self.transform.parts) and self.transform.parts[self._linear].on_sum:
            self._linear += 1
        shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._model.items()]
        self._digest = hashlib.blake2b(repr((self.transform, shapes)).encode(), digest_size=4).hexdigest()
        self._largest = 4 * (num_bytes([self._model]) + num_bytes([self._buffers])) + _SLACK
        self._size = PackedSize()

    @property
    def is_identity(self) -> bool:
        """Whether contributions travel as they are."""
        return not self.transform.parts

    def init(self) -> State:
        """Check that the model's updates can be encoded, and return the server's state of the transforms.

        Raises:
            MisconfigurationException: when a transform cannot encode them.
        """
        return self.transform.init({"delta": self._model}, self.seed)

    # ---- client half -------------------------------------------------------------------------------------------

    def encode(self, contribution: Contribution, task: ClientTask, memory: Memory) -> tuple[bytes, Memory | None]:
        """Return a contribution as bytes, and the transforms' next memory of this client (``None`` for none)."""
        coded = {key: tree for key, tree in contribution.trees.items() if self._is_coded(key, tree)}
        payload, kept = self.transform.encode(
            Contribution(coded, dict(contribution.scalars)), self._exchange(task), memory
        )
        return pack(self._message(contribution, task, payload)), kept

    def size(self, contribution: Contribution, task: ClientTask) -> int:
        """Return the length of what :meth:`encode` returns without transforms, and write no byte."""
        scalars = contribution.scalars

        def message() -> list[Any]:
            coded = {key: tree for key, tree in contribution.trees.items() if self._is_coded(key, tree)}
            return self._message(contribution, task, Payload(Contribution(coded, scalars), []))

        return self._size(message, [*_address(task), *scalars.values()], contribution.trees, tuple(scalars))

    def _message(self, contribution: Contribution, task: ClientTask, payload: Payload) -> list[Any]:
        exact = {key: tree for key, tree in contribution.trees.items() if not self._is_coded(key, tree)}
        coded = [key for key in contribution.trees if key not in exact]
        opened = payload.contribution
        return [_FORMAT, self._digest, _address(task), coded, opened.scalars, opened.trees, payload.sealed, exact]

    def _is_coded(self, key: str, tree: Tree) -> bool:
        return key not in _EXACT and tree.keys() == self._model.keys()

    # ---- server half -------------------------------------------------------------------------------------------

    def decode(self, data: bytes, task: ClientTask) -> Contribution:
        """Return the contribution of a client, as far as it is decoded before the sum.

        Raises:
            PayloadError: for anything but what :meth:`encode` returned for this task and this model.
        """
        if len(data) > self._largest:
            raise PayloadError(f"expected at most {self._largest} bytes, got {len(data)}")
        try:
            return self._decoded(unpack(data), task)
        except PayloadError as error:
            raise PayloadError(f"its payload cannot be used: {error}") from error
        except WireError as error:
            raise PayloadError(f"its payload cannot be read: {error}") from error
        except Exception as error:  # bytes from outside: what they provoke is the client's fault, not the server's end
            raise PayloadError(f"its payload is malformed: {type(error).__name__}: {error}") from error

    def _decoded(self, message: Any, task: ClientTask) -> Contribution:
        version, digest, address, coded, scalars, opened, sealed, exact = message
        if version != _FORMAT:
            raise PayloadError(f"expected format {_FORMAT}, got {version!r}")
        if address != _address(task):
            raise PayloadError(f"expected [client, round, dispatch] {_address(task)}, got {address}")
        if digest != self._digest:
            raise PayloadError("it was encoded for a model of other shapes, or by other transforms")
        template = dict.fromkeys(coded, self._model)
        parts = range(self._linear, len(self.transform.parts))
        own = Contribution(opened, scalars)
        decoded = self.transform.decode_parts(Payload(own, sealed), self._exchange(task), template, parts)
        trees = {**decoded.trees, **exact}
        _check(trees, self._sum_template(coded) | {"buffers": self._buffers}, exact)
        return Contribution(trees, _finite(decoded.scalars))

    def broadcast(
        self, trees: Mapping[str, Tree], cohort: Sequence[ClientId], round: int, state: State
    ) -> tuple[dict[str, Tree], list[int], State]:
        """Return the trees as a cohort gets them, the bytes that each of it downloads, and the next state."""
        exchange = Exchange(self.seed, round)
        sent = self.transform.broadcast(trees["model"], cohort, exchange, state)
        received = {**trees, "model": sent.model, **sent.trees(exchange)}
        if sent.num_bytes is None:
            return received, [self._size(lambda: received, [], received)] * len(cohort), sent.state
        rest = {key: tree for key, tree in received.items() if key != "model"}
        beside = self._size(lambda: rest, [], rest)
        # steps and what stands beside them are two messages; where one with the whole model is shorter, that goes out
        whole = self._size(lambda: received, [], received)
        return received, [min(whole, beside + own) for own in sent.num_bytes], sent.state

    def finish(self, total: Contribution, round: int, state: State) -> tuple[Contribution, State]:
        """Decode what is linear on the sum of a round, and let the transforms change it; returns their next state."""
        if self._linear:
            shapes = self._sum_template(["sum"])["sum"]
            coded = {key: tree for key, tree in total.trees.items() if _same_shapes(tree, shapes)}
            sealed: list[Any] = [{} for _ in self.transform.parts]
            decoded = self.transform.decode_parts(
                Payload(Contribution(coded, total.scalars), sealed),
                Exchange(self.seed, round),
                dict.fromkeys(coded, self._model),
                range(self._linear),
            )
            total = Contribution({**total.trees, **decoded.trees}, total.scalars)
        coded = {key: tree for key, tree in total.trees.items() if self._is_coded(key, tree)}
        finished, state = self.transform.finish(Contribution(coded, total.scalars), state)
        return Contribution({**total.trees, **finished.trees}, finished.scalars), state

    def _sum_template(self, keys: Sequence[str]) -> dict[str, Tree]:
        template: Mapping[str, Tree] = dict.fromkeys(keys, self._model)
        for part in self.transform.parts[: self._linear]:
            template = part.output(template)
        return dict(template)

    def _exchange(self, task: ClientTask) -> Exchange:
        return Exchange(self.seed, task.round, task.client_id, task.dispatch_id, public=task.broadcast)


def _address(task: ClientTask) -> list[Any]:
    return [task.client_id, task.round, task.dispatch_id]


class PackedSize:
    """Computes ``len(pack(message))`` without writing the tensors.

    The header of a safetensors file depends on names, shapes and types alone, so for each set of them one message is
    packed for real; from client to client only a few names and numbers change.

    Example:
        >>> import torch
        >>> trees = {"delta": {"w": torch.zeros(5)}}
        >>> size = PackedSize()
        >>> [size(lambda: [n, trees], [n], trees) == len(pack([n, trees])) for n in (1, 1000, 0.25)]
        [True, True, True]
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, int]] = {}

    def __call__(
        self,
        message: Callable[[], Any],
        changing: list[Any],
        trees: Mapping[str, Tree],
        names: tuple[str, ...] = (),
    ) -> int:
        """Return the length of a packed message.

        Args:
            message: returns what would be packed.
            changing: the primitives in it that are not the same in every message with such trees.
            trees: its tensors.
            names: keys of the primitives.
        """
        key = names, *trees, *[(k, n, t.dtype, t.shape) for k, tree in trees.items() for n, t in tree.items()]
        changes = text_length(changing)
        if key not in self._known:
            self._known[key] = _header_length(pack(message())) - changes, num_bytes(trees.values())
        header, body = self._known[key]
        return 8 + -(-(header + changes) // 8) * 8 + body


def _header_length(data: bytes) -> int:
    length = int.from_bytes(data[:8], "little")
    return len(data[8 : 8 + length].rstrip(b" "))  # safetensors fills up to a multiple of eight


def _same_shapes(tree: Tree, template: Tree) -> bool:
    return tree.keys() == template.keys() and all(tree[name].shape == template[name].shape for name in template)


def _check(trees: Mapping[str, Tree], templates: Mapping[str, Tree], exact: Mapping[str, Tree]) -> None:
    for key, tree in trees.items():
        template = templates.get(key)
        if template is not None and not _same_shapes(tree, template):
            raise PayloadError(f"the tensors of {key!r} have other names or shapes than the model's")
        if key in exact and not all(isinstance(tensor, Tensor) for tensor in tree.values()):
            raise PayloadError(f"{key!r} holds something else than tensors")
        if any(tensor.is_complex() for tensor in tree.values()):
            raise PayloadError(f"expected real numbers in {key!r}, got complex ones")
        bad = non_finite(tree)
        if bad is not None:
            raise PayloadError(f"it has NaN or infinite values in {key}/{bad or 'values'}")


def _finite(scalars: Mapping[str, Any]) -> dict[str, float]:
    for name, value in scalars.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not float("-inf") < value < float("inf"):
            raise PayloadError(f"expected a finite number as {name!r}, got {value!r}")
    return dict(scalars)
