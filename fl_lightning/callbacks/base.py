"""Client callbacks that know their task, and gradient corrections with a pure core.

Both are ordinary Lightning callbacks: they also run in a plain ``lightning.Trainer``.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from fl_lightning.types import ClientTask, Memory, Tree

__all__ = ["ClientCallback", "GradientCorrection", "dense_gradient"]


class ClientCallback(Callback):
    """A callback of local training that may read the task and the client's memory, and report to the algorithm.

    A loop calls :meth:`begin` before local training and :meth:`report` after it. In a plain Trainer neither is
    called: the callback then stands on its own.
    """

    def begin(self, task: ClientTask, memory: Memory) -> None:
        """Take what this round needs from the task and from the client's memory."""

    def on_start_pass_batch(self, batch: Any) -> None:
        """Change a batch of the pass before training (``StartPass``) as ``on_train_batch_start`` does in training."""

    def report(self) -> dict[str, Any]:
        """Return what the algorithm's ``contribute`` finds in ``update.extra``: tensors and primitives."""
        return {}


def dense_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient, made dense in place: what corrections add is dense, and ``Embedding(sparse=True)`` is not.

    Example:
        >>> table = torch.nn.Embedding(3, 1, sparse=True)
        >>> table(torch.tensor([1])).sum().backward()
        >>> dense_gradient(table.weight).flatten().tolist(), table.weight.grad.is_sparse
        ([0.0, 1.0, 0.0], False)
    """
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        rows, values = parameter.grad._indices(), parameter.grad._values()
        # not `to_dense`: of one row with one column, expanded from a scalar, it makes zeros (torch 2.13)
        parameter.grad = torch.zeros_like(parameter).index_put_(tuple(rows), values, accumulate=True)
    return parameter.grad


class GradientCorrection(ClientCallback):
    """Changes the gradients of an optimizer step, by a pure function.

    Lightning calls the correction in ``on_before_optimizer_step``, for the parameters of that optimizer; the lean
    loop calls :meth:`correct` directly, for one client or for a group under ``torch.func.vmap``.

    Attributes:
        own: named trees of this client alone (a control variate, say), set by :meth:`begin`. Everything else that
            :meth:`correct` reads is the same for the whole cohort, so a loop that trains a group stacks ``own`` along a
            client axis and puts a client's slices there while it calls :meth:`correct` under vmap.
        needs_start: whether :meth:`correct` reads ``task.broadcast["model"]``. In a plain Trainer that is what the fit
            started from; its checkpoints then keep it, so that a resumed fit goes on with the same start.
    """

    needs_start: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.task: ClientTask | None = None
        self._plain = True  # no loop has called `begin`
        self._resumed: Tree | None = None
        self.num_corrections = 0
        self.own: dict[str, Tree] = {}

    def begin(self, task: ClientTask, memory: Memory) -> None:
        self.task = task
        self._plain = False

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        """Return the corrected gradients.

        Args:
            grads: gradient by parameter name.
            params: parameter by name, before the step.
            task: the task, with the broadcast model in ``task.broadcast["model"]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define correct(grads, params, task).")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a correction that is there twice.

        Raises:
            MisconfigurationException: when another callback of this kind runs beside this one.
        """
        others = [c for c in trainer.callbacks if c is not self and isinstance(c, GradientCorrection)]  # type: ignore[attr-defined]
        if any(isinstance(other, type(self)) or isinstance(self, type(other)) for other in others):
            raise MisconfigurationException(
                f"{type(self).__name__} would correct every gradient twice: two callbacks of its kind run in this "
                "training. Leave out the one in client_callbacks (or callbacks) when the algorithm brings its own, or "
                "give the sum of both to a single one."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._plain or self.task is None:
            # a plain Trainer: what each of its fits starts from stands for the global model
            start = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
            if self._resumed is not None:
                own = dict(pl_module.named_parameters())
                start = {n: kept.to(own[n].device) for n, kept in self._resumed.items() if n in own}
                self._resumed = None  # the next fit is another one
            self.begin(ClientTask("plain", 0, 0, {"model": start}, seed=0), {})
            self._plain = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the start of a plain Trainer's fit as the callback's state; in a federation the task has it."""
        if self._plain and self.task is not None and self.needs_start:
            # not by `state_dict`: Lightning would refuse two callbacks of a kind before `setup` can say what to do
            checkpoint["callbacks"][self.state_key] = {"start": dict(self.task.broadcast["model"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["start"]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.task is None:
            raise MisconfigurationException(f"{type(self).__name__} was not begun; call trainer.fit to run it.")
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        params = {n: p for n, p in pl_module.named_parameters() if id(p) in mine and p.grad is not None}
        if not params:
            return
        with torch.no_grad():
            grads = {name: dense_gradient(p) for name, p in params.items()}
            corrected = self.correct(grads, {name: p.detach() for name, p in params.items()}, self.task)
            for name, p in params.items():
                if p.grad is not None and corrected[name] is not p.grad:
                    p.grad.copy_(corrected[name])
        self.num_corrections += 1
