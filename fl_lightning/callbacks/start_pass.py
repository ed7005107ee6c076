"""A pass over the client's data before it trains: loss and gradient at the model that the server sent."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader

from fl_lightning.callbacks.base import ClientCallback
from fl_lightning.errors import NoLossError
from fl_lightning.seeding import forked_rng, seed_for
from fl_lightning.types import ClientTask, Memory

__all__ = ["StartPass"]


class StartPass(ClientCallback):
    r"""Measures :math:`F_k(w_t)`, and :math:`\nabla F_k(w_t)` on request, before the first local step.

    .. math:: F_k(w_t) = \frac{\sum_b n_b\, \ell_b(w_t)}{\sum_b n_b}

    over the client's training batches :math:`b` of :math:`n_b` examples, with the loss that ``training_step`` returns.
    The pass costs one epoch of forward (and backward) work. It runs on a copy of the module with its own random
    numbers: weights, running statistics, metrics, logs and the numbers that training draws stay as they are.

    Args:
        gradient: whether the gradient is wanted too; it is reported as ``start_grad``, the loss as ``start_loss``.

    Raises:
        MisconfigurationException: with manual optimization, or for a loader that can be read only once.
        NoLossError: in a federation, for a client whose ``training_step`` returns None for every batch.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> start = StartPass(gradient=True)
        >>> Trainer(max_steps=1, accelerator="cpu", callbacks=[start], logger=False, barebones=True).fit(BoringModel())
        >>> sorted(start.report()), sorted(start.report()["start_grad"])
        (['start_grad', 'start_loss'], ['layer.bias', 'layer.weight'])
    """

    def __init__(self, gradient: bool = False) -> None:
        super().__init__()
        self.gradient = gradient
        self.loss: float | None = None
        self.grads: dict[str, Tensor] = {}
        self._seed = 0
        self._task: ClientTask | None = None

    def begin(self, task: ClientTask, memory: Memory) -> None:
        self._task = task
        self._seed = seed_for(task.seed, task.round, task.client_id, "start")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"The loss of {type(pl_module).__name__} at the start of a round is not defined: with manual "
                "optimization training_step steps by itself. Use automatic optimization, or an algorithm that needs no "
                "start loss or start gradient (Scaffold(option='II'), FedAvg, FedProx)."
            )
        with forked_rng(self._seed), torch.enable_grad():
            batches = self._measure(trainer, _probe(trainer, pl_module))
        if batches and self.loss is None and self._task is not None:
            raise NoLossError(
                self._task.client_id,
                self._task.round,
                f"{type(pl_module).__name__}.training_step returned None for each of its {batches} batches, so it has "
                "no loss at the start of the round, which this algorithm needs. Return a loss for some batch, or leave "
                "the client out of the population.",
            )

    def _measure(self, trainer: pl.Trainer, probe: pl.LightningModule) -> int:
        """Set loss and gradient, and return the number of batches; without examples there is neither."""
        parameters = {name: p for name, p in probe.named_parameters() if p.requires_grad} if self.gradient else {}
        losses, examples, index = 0.0, 0, -1
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        with _batches(trainer) as batches:
            for index, batch in enumerate(batches):
                loss = _loss(trainer, probe, batch, index)
                if loss is None:
                    continue  # the module skips this batch in training too
                size = extract_batch_size(batch)
                losses, examples = losses + size * float(loss.detach()), examples + size
                if parameters:
                    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    for name, grad in zip(parameters, grads, strict=True):
                        if grad is not None:
                            sums[name].add_(grad, alpha=size)
        if examples:
            self.loss = losses / examples
            self.grads = {name: total / examples for name, total in sums.items()}
        return index + 1

    def report(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {} if self.loss is None else {"start_loss": self.loss}
        if self.gradient and self.loss is not None:
            numbers["start_grad"] = self.grads
        return numbers


def _probe(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """Return a copy of the module whose ``training_step`` can be called without leaving a trace."""
    probe = copy.deepcopy(pl_module)
    probe.trainer = trainer
    for name in ("log", "log_dict"):
        # set on the instance: `self.log` outside of Lightning's loop would refuse or count twice
        probe.__dict__[name] = lambda *args, **kwargs: None
    return probe


def _loss(trainer: Any, probe: pl.LightningModule, batch: Any, index: int) -> Tensor | None:
    batch = trainer.precision_plugin.convert_input(batch)
    if isinstance(trainer, pl.Trainer):
        batch = probe._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = probe._apply_batch_transfer_handler(batch, device=trainer.strategy.root_device, dataloader_idx=0)
    else:  # the lean loop, whose modules have no hooks of their own there
        batch = move_data_to_device(batch, trainer.strategy.root_device)
    for callback in trainer.callbacks:
        if isinstance(callback, ClientCallback):
            callback.on_start_pass_batch(batch)
    with trainer.precision_plugin.train_step_context():
        takes_index = is_param_in_hook_signature(probe.training_step, "batch_idx", min_args=2)
        output = probe.training_step(*((batch, index) if takes_index else (batch,)))
    loss = output["loss"] if isinstance(output, dict) else output
    if loss is not None and not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"Expected training_step of {type(probe).__name__} to return a loss, a dict with 'loss' or None, got "
            f"{type(loss).__name__}."
        )
    return loss


@contextmanager
def _batches(trainer: pl.Trainer) -> Iterator[Iterator[Any]]:
    """Iterate over the batches of one epoch and leave the loaders as they were."""
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    states: list[tuple[torch.Generator, Tensor]] = []
    copies = []
    for loader in loaders.flattened:
        if isinstance(loader, Iterator):  # asking by iter(loader) would restart persistent workers and draw numbers
            raise MisconfigurationException(
                f"The start loss of a round needs a pass over the training data before training, and "
                f"{type(loader).__name__} can be read only once. Return a DataLoader or another iterable that starts "
                "anew at every iter()."
            )
        for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                states.append((generator, generator.get_state()))
        copies.append(_without_workers_of(loader))
    loaders.flattened = copies
    limit = trainer.num_training_batches
    try:
        iter(loaders)
        found = (batch for batch, _, _ in loaders)
        yield found if limit == float("inf") else islice(found, int(limit))
    finally:
        loaders.reset()
        for generator, state in states:
            generator.set_state(state)


def _without_workers_of(loader: Any) -> Any:
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        # persistent workers have one iterator, and the coming training has begun it already
        loader = copy.copy(loader)
        loader.__dict__["_iterator"] = None
    return loader
