"""Local training without a Trainer, for plain modules: the same bits at a fraction of the cost."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.errors import EmptyClientError
from fl_lightning.local.job import ClientData, Job, Outcome
from fl_lightning.local.lean_client import Facts, Fit
from fl_lightning.local.lean_data import batches_of
from fl_lightning.local.lean_plain import not_plain, strange_callback
from fl_lightning.local.lean_trainer import NeedsResults, NotPlain, NotThisClient, Progress
from fl_lightning.local.lightning_loop import LightningLoop, _Run
from fl_lightning.local.quiet import as_rank_zero
from fl_lightning.local.recorder import ClientLogger, Record
from fl_lightning.local.settings import LocalSettings
from fl_lightning.local.worker import read_tensors
from fl_lightning.metrics import alone
from fl_lightning.seeding import forked_rng, seed_everywhere
from fl_lightning.types import ClientTask, ClientUpdate, Memory, Phase, Tree

__all__ = ["LeanLoop"]


class LeanLoop(LightningLoop):
    """Calls the module's own ``training_step`` and ``configure_optimizers``, and no Trainer.

    What it cannot do exactly as ``lightning.Trainer`` does, it leaves to :class:`LightningLoop`, from that client's
    very beginning and with the same bits: for good when the module needs it, for one client when that client does (it
    brings validation data, say). ``reason`` says why.

    Args:
        module: a copy of the user's module, which is the loop's from now on.
        algorithm: gives the client callbacks and the phases.
        settings: how clients train.
    """

    def __init__(self, module: pl.LightningModule, algorithm: Algorithm, settings: LocalSettings) -> None:
        super().__init__(module, algorithm, settings)
        callbacks = [*settings.callbacks, *algorithm.client_callbacks()]
        self.reason = not_plain(module, settings, self.trainer.precision_plugin) or strange_callback(callbacks)
        self.facts = Facts.of(module, self.trainer, settings.device)
        self.any_log = False
        """Whether the module logs what plain lists cannot hold; known after its first client."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Run clients one after the other, in this loop as long as it is exact."""
        for job in jobs:
            yield self.run_one(job)

    def run_one(self, job: Job) -> Outcome:
        """Run one client."""
        why = self.reason
        if why is None:
            try:
                return self._lean_outcome(job)
            except NotThisClient:
                pass
            except NotPlain as refusal:
                why = str(refusal)
            except Exception as error:  # LightningLoop decides whether it is the client's fault or this loop's
                why = f"{type(error).__name__}: {error}"
        outcome = next(super().run([job]))
        if why is not None and self.reason is None and outcome.error is None:
            self.reason = why
            rank_zero_info(f"LightningLoop takes over the local training from LeanLoop: {why}.")
        return outcome

    def _lean_outcome(self, job: Job) -> Outcome:
        if not self.any_log:
            try:
                return Outcome(job, *self.train_lean(job.task, job.data(), job.memory(), job.logged))
            except NeedsResults:  # the first value that plain lists cannot hold: again, from the client's beginning
                self.any_log = True
        return Outcome(job, *self.train_lean(job.task, job.data(), job.memory(), job.logged))

    def train_lean(
        self, task: ClientTask, data: ClientData, memory: Memory, logged: bool
    ) -> tuple[ClientUpdate, list[Record]]:
        """Run one client without a Trainer.

        Returns:
            The update, and the records of the client's curve, as :meth:`LightningLoop.train` gives them.

        Raises:
            NotPlain: when the module asks for what this loop does not offer.
            EmptyClientError: when the client's loader gave no batch.
        """
        logger = None
        if self.settings.has_loggers:
            logger = ClientLogger(logged, self.settings.save_dir, step_offset=task.work.step_offset)
        with ExitStack() as stack:
            for context in (_forked(task.seed), as_rank_zero(), alone(), torch.enable_grad()):
                stack.enter_context(context)
            update = _LeanRun(self, task, data, memory, logger).phases()
        return update, logger.take() if logger is not None else []


@contextmanager
def _forked(seed: int) -> Iterator[None]:
    """Do what ``forked_rng`` does, at half its cost on a CPU: NumPy's state stays an array."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with forked_rng(seed):
            yield
        return
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (the global one)
    seed_everywhere(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


class _Observed:
    """The numbers of a fit, as an update reports them."""

    def __init__(self, fit: Fit) -> None:
        self.num_steps = fit.progress.global_step
        self.num_examples = fit.num_examples
        self.metrics = fit.log.sums()


class _LeanRun(_Run):
    """One client's round, phase by phase."""

    loop: LeanLoop

    def _phase(self, phase: Phase, previous: Tree | None) -> tuple[ClientUpdate, Tree]:
        loop, task, settings = self.loop, self.task, self.loop.settings
        if self.data.validates:
            raise NotThisClient("it validates")
        start = self._start(phase, previous)
        module = loop.worker.module
        loop.worker.restore()
        done = self._fit(phase)
        done.run(
            lambda model: self._load(model, start, phase),
            lambda optimizers, configs: self._optimizers(optimizers, configs, phase),
        )
        if done.progress.epoch == 0:
            raise EmptyClientError(task.client_id, task.round, "it has no batch to train on")
        observed: Any = _Observed(done)
        self._check_corrections(done.callbacks, observed)
        # where LightningLoop's own code looks for them
        loop.trainer.strategy.optimizers = done.progress.optimizers
        loop.trainer.strategy.lr_scheduler_configs = done.progress.schedulers
        update = self._update(module, observed, done.callbacks, phase)
        now = read_tensors(module, settings.parameter_names) if (phase.keep or not phase.report) else {}
        if phase.keep:
            self.extra[phase.keep] = now
        return update, now

    def _fit(self, phase: Phase) -> Fit:
        loop, work, trainer = self.loop, self.task.work, self.loop.trainer
        epochs, steps = work.epochs, work.steps
        if phase.epochs is not None:
            epochs, steps = phase.epochs, None
        return Fit(
            loop.facts,
            batches=lambda: batches_of(self.data.train, trainer.limit_train_batches),
            callbacks=self._callbacks(phase),
            progress=Progress(epochs, steps, trainer._accumulate, trainer._log_every),
            logger=self.logger if phase.report else None,
            offset=work.step_offset,
            num_examples=self.data.num_examples,
            any_log=loop.any_log,
        )
