"""Gradient corrections of a group of clients: one pure function under ``vmap``, each client's own trees stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fl_lightning.callbacks.base import GradientCorrection
from fl_lightning.local.lean_group_data import Member
from fl_lightning.local.lean_stack import CannotGroup, Rows, take
from fl_lightning.types import Tree

__all__ = ["Corrections"]


@dataclass(slots=True)
class Corrections:
    """The members' gradient corrections, each one's own trees stacked."""

    templates: list[tuple[GradientCorrection, dict[str, tuple[list[str], list[Tensor]]]]]

    @classmethod
    def of(cls, members: Sequence[Member], module: nn.Module) -> Corrections:
        templates = []
        for position, first in enumerate(members[0].callbacks):
            if not isinstance(first, GradientCorrection):
                continue
            alike = [member.callbacks[position] for member in members]
            for other in alike[1:]:
                _require_alike(first, other)
            stacked = {}
            for tree, tensors in first.own.items():
                names = list(tensors)
                stacked[tree] = names, [torch.stack([c.own[tree][n] for c in alike]) for n in names]  # type: ignore[attr-defined]
            templates.append((first, stacked))
        return cls(templates)

    def apply(self, rows: Rows, params: Tree, grads: Tree) -> Tree:
        for template, trees in self.templates:
            own: dict[str, Tree] = {t: dict(zip(n, take(s, rows), strict=True)) for t, (n, s) in trees.items()}
            grads = vmap(_corrector(template), randomness="different")(grads, dict(params), own)
        return grads


def _corrector(template: GradientCorrection) -> Callable[[Tree, Tree, dict[str, Tree]], dict[str, Tensor]]:
    task, kept = template.task, template.own
    assert task is not None

    def correct(grads: Tree, params: Tree, own: dict[str, Tree]) -> dict[str, Tensor]:
        template.own = own
        try:
            return template.correct(grads, params, task)
        finally:
            template.own = kept

    return correct


def _require_alike(first: GradientCorrection, other: Any) -> None:
    for name, value in vars(first).items():
        theirs = vars(other).get(name)
        if name in ("own", "task", "num_corrections") or value is theirs:
            continue
        tensors = isinstance(value, Tensor) and isinstance(theirs, Tensor)
        alike = torch.equal(value, theirs) if tensors else value == theirs
        if alike is not True:
            raise CannotGroup(f"{type(first).__name__}.{name} differs from client to client and is not in its `own`")
