"""What a transform is: a pure change of contributions on their way from client to server, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.seeding import seed_for
from fl_lightning.transforms.draws import Draws
from fl_lightning.types import ClientId, Contribution, Memory, Tree

__all__ = [
    "Broadcast",
    "Exchange",
    "Payload",
    "State",
    "Template",
    "Transform",
    "TreeTransform",
    "common_dtype",
    "num_elements",
    "template_of",
]

State: TypeAlias = dict[str, Any]
Template: TypeAlias = Mapping[str, Tree]
"""Trees of meta tensors: the names, shapes and types of a contribution without its values."""


def template_of(trees: Mapping[str, Tree]) -> dict[str, dict[str, torch.Tensor]]:
    """Return names, shapes and types of trees."""
    return {key: {name: torch.empty_like(t, device="meta") for name, t in tree.items()} for key, tree in trees.items()}


def num_elements(tree: Tree) -> int:
    """Return the number of elements in a tree."""
    return sum(tensor.numel() for tensor in tree.values())


def common_dtype(tree: Tree) -> torch.dtype:
    """Return the type that holds the values of all tensors of a tree."""
    dtype = next(iter(tree.values())).dtype
    for tensor in tree.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True, slots=True)
class Exchange:
    """One client's delivery in one round, as both sides know it: the address of every random number in it.

    Args:
        seed: of the federation's transforms; both sides have it.
        round: 0-based round.
        client_id: the client; ``None`` stands for the whole cohort.
        dispatch_id: unique in the federation.
        path: which part of a chain.
        public: what the client downloaded: the named trees of its task, with those that transforms add.
    """

    seed: int
    round: int
    client_id: ClientId | None = None
    dispatch_id: int = 0
    path: str = ""
    public: Mapping[str, Tree] = field(default_factory=dict, compare=False)

    @property
    def public_key(self) -> str:
        """The name of the tree that a transform at this place adds to the broadcast."""
        return f"transforms{self.path}"

    def public_tree(self) -> Tree:
        """Return that tree as this client downloaded it; nothing before there was one."""
        return self.public.get(self.public_key, {})

    def at(self, step: str | int) -> Exchange:
        """Return the exchange of a part, which draws other numbers."""
        return replace(self, path=f"{self.path}/{step}")

    def draws(self, shared: bool = False) -> Draws:
        """Return a source of random numbers; ``shared`` ones are the same for all clients of the round."""
        client_id, purpose = (None, "") if shared else (self.client_id, str(self.dispatch_id))
        return Draws(seed_for(self.seed, self.round, client_id, f"transform{self.path} {purpose}"))


@dataclass(slots=True)
class Payload:
    """A contribution half way to bytes.

    Args:
        contribution: what later parts of a chain may still encode.
        sealed: what the parts so far have encoded: nested dictionaries and lists of tensors and primitives.
    """

    contribution: Contribution
    sealed: Any = field(default_factory=dict)


@dataclass(slots=True)
class Broadcast:
    """The model on its way to a cohort.

    Args:
        model: as the clients get it.
        state: the transform's next state.
        num_bytes: what each client of the cohort downloads for it; ``None`` when it travels as it is.
        public: a tree that travels beside it, for the client half of the transform.
        extra: the trees of several transforms, by :attr:`Exchange.public_key`.
    """

    model: Tree
    state: State
    num_bytes: list[int] | None = None
    public: Tree = field(default_factory=dict)
    extra: dict[str, Tree] = field(default_factory=dict)

    def trees(self, exchange: Exchange) -> dict[str, Tree]:
        """Return what a transform at this place adds to the broadcast."""
        return {**self.extra, exchange.public_key: self.public} if self.public else self.extra


class Transform:
    """Base of all transforms; by itself it changes nothing.

    The client half is :meth:`encode`, the server half is :meth:`decode` (for each client, or once for their sum when
    :attr:`on_sum` holds) and :meth:`finish`. All are pure: what the server remembers goes through ``state``, what a
    client keeps goes through ``memory``. Only the trees that look like the model pass through transforms; running
    statistics and scalars travel exactly.
    """

    on_sum: bool = False
    """Whether decoding is linear and the same for all clients of a round, so that their sum can be decoded at once."""
    unbiased: bool = False
    """Whether the decoded value is the original one in expectation."""
    keeps_shapes: bool = False
    """Whether what comes out has the names and shapes of what went in, at every round."""
    remembers_values: bool = False
    """Whether clients keep values of what they encoded, so that a place must mean the same in every round."""

    def init(self, template: Template, seed: int) -> State:
        """Check that contributions of this shape can be encoded, and return the server's first state.

        Raises:
            MisconfigurationException: when they cannot.
        """
        return {}

    def output(self, template: Template) -> Template:
        """Return the template of what :meth:`encode` leaves open, given that of its input."""
        return template

    def encode(self, contribution: Contribution, exchange: Exchange, memory: Memory) -> tuple[Payload, Memory | None]:
        """Encode one client's contribution; the second value is its next memory, ``None`` for none."""
        return Payload(contribution), None

    def decode(self, payload: Payload, exchange: Exchange, template: Template) -> Contribution:
        """Undo :meth:`encode`; ``template`` is that of its input.

        Raises:
            PayloadError: for a payload that :meth:`encode` cannot have made.
        """
        return payload.contribution

    def finish(self, total: Contribution, state: State) -> tuple[Contribution, State]:
        """Change the sum of a round before the algorithm sees it."""
        return total, state

    def broadcast(self, model: Tree, cohort: Sequence[ClientId], exchange: Exchange, state: State) -> Broadcast:
        """Return the model as the clients of a round get it."""
        return Broadcast(model, state)

    def contraction(self) -> Transform:
        r"""Return the version for error feedback, with :math:`\lVert x - C(x) \rVert < \lVert x \rVert`.

        Unbiased transforms enlarge what they send, and error feedback would amplify that without bound.
        """
        return self

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()) if not name.startswith("_"))
        return f"{type(self).__name__}({own})"

    def _refuse_empty(self, template: Template) -> None:
        if not any(num_elements(tree) for tree in template.values()):
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to encode: what stands before it in the chain has already turned "
                "all values into codes. Sparsify first and quantise last, as in chain(TopK(0.01), Quantize(bits=8))."
            )


class TreeTransform(Transform):
    """A transform that encodes each tree of a contribution by itself."""

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        """Return what stays open of a tree, what is sealed, and the next memory."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_tree(tree, exchange, memory).")

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        """Undo :meth:`encode_tree`."""
        raise NotImplementedError(f"{type(self).__name__} must define decode_tree(opened, sealed, exchange, template).")

    def output_tree(self, template: Tree) -> Tree:
        """Return the template of what stays open of a tree: nothing, unless a subclass says otherwise."""
        return {}

    def init(self, template: Template, seed: int) -> State:
        self._refuse_empty(template)
        return {}

    def output(self, template: Template) -> Template:
        return {key: self.output_tree(tree) for key, tree in template.items()}

    def encode(self, contribution: Contribution, exchange: Exchange, memory: Memory) -> tuple[Payload, Memory | None]:
        opened, sealed, kept = Contribution({}, dict(contribution.scalars)), {}, {}
        for key, tree in contribution.trees.items():
            opened.trees[key], sealed[key], own = self.encode_tree(tree, exchange.at(key), memory.get(key, {}))
            if own is not None:
                kept[key] = own
        return Payload(opened, sealed), kept or None

    def decode(self, payload: Payload, exchange: Exchange, template: Template) -> Contribution:
        opened = payload.contribution
        trees = {
            key: self.decode_tree(opened.trees.get(key, {}), payload.sealed.get(key), exchange.at(key), tree)
            for key, tree in template.items()
        }
        return Contribution(trees, dict(opened.scalars))
