"""Local training without a Trainer, for plain modules: the same bits at a fraction of the cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.errors import EmptyClientError
from fl_lightning.local.job import ClientData, Job, Outcome
from fl_lightning.local.lean_client import Facts, Fit
from fl_lightning.local.lean_data import batches_of
from fl_lightning.local.lean_grouping import cannot_group, group_size
from fl_lightning.local.lean_plain import not_plain, strange_callback
from fl_lightning.local.lean_together import Together
from fl_lightning.local.lean_trainer import NeedsResults, NotPlain, NotThisClient, Progress
from fl_lightning.local.lightning_loop import ClientRun, LightningLoop
from fl_lightning.local.quiet import as_rank_zero
from fl_lightning.local.recorder import ClientLogger, Record
from fl_lightning.local.settings import LocalSettings
from fl_lightning.metrics import alone
from fl_lightning.seeding import forked_rng
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

        self.together = Together(
            self,
            group_size(module, settings),
            self.reason or cannot_group(module, self.facts, settings, callbacks, self.trainer._accumulate),
        )
        self._lasting = self.reason
        self._said = False

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Run the clients of a lane one after the other or in groups, in this loop as long as it is exact."""
        self.reason = self._lasting  # what clients of another lane made of it has no say here
        self.together.begin()
        queue = iter(jobs)
        while chunk := list(islice(queue, self.together.size if self.groups else 1)):
            outcomes = self.together.run(chunk) if len(chunk) > 1 else {}
            for position, job in enumerate(chunk):
                yield outcomes.pop(position) if position in outcomes else self.run_one(job)

    @property
    def groups(self) -> bool:
        """Whether clients train in groups."""
        return self.together.size > 1 and self.together.reason is None and self.reason is None

    # ---- one client ---------------------------------------------------------------------------------------------

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
        outcome = self.outcome(job)
        if why is not None and self.reason is None and outcome.error is None:
            self.reason = why
            if not self._said:
                self._said = True
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
            for context in (forked_rng(task.seed), as_rank_zero(), alone(), torch.enable_grad()):
                stack.enter_context(context)
            update = _LeanRun(self, task, data, memory, logger).phases()
        return update, logger.take() if logger is not None else []

    def personalize(self, task: ClientTask, data: ClientData, memory: Memory) -> Tree:
        if self.reason is None:
            try:
                try:
                    return self._personalize_lean(task, data, memory)
                except NeedsResults:
                    self.any_log = True
                    return self._personalize_lean(task, data, memory)
            except EmptyClientError:
                raise
            except (Exception, NotPlain):
                pass  # LightningLoop does it, or decides whose fault it is
        return super().personalize(task, data, memory)

    def _personalize_lean(self, task: ClientTask, data: ClientData, memory: Memory) -> Tree:
        with forked_rng(task.seed), as_rank_zero(), alone(), torch.enable_grad():
            return _LeanRun(self, task, data, memory, None).personal()


class _Observed:
    """The numbers of a fit, as an update reports them."""

    def __init__(self, fit: Fit) -> None:
        self.num_steps = self.num_gradients = fit.progress.global_step  # a step without a loss is not plain
        self.num_examples = fit.num_examples
        self.metrics = fit.log.sums()


class _LeanRun(ClientRun):
    """One client's round, phase by phase."""

    loop: LeanLoop

    def phase(self, phase: Phase, previous: Tree | None) -> tuple[ClientUpdate, Tree]:
        loop, task = self.loop, self.task
        if self.data.validates:
            raise NotThisClient("it validates")
        start = self.start(phase, previous)
        module = loop.worker.module
        loop.worker.restore()
        done = self._fit(phase)
        done.run(
            lambda model: self.load(model, start, phase),
            lambda optimizers, configs: self.optimizers(optimizers, configs, phase),
        )
        if done.progress.epoch == 0:
            raise EmptyClientError(task.client_id, task.round, "it has no batch to train on")
        observed: Any = _Observed(done)
        self.check_corrections(done.callbacks, observed)
        # where LightningLoop's own code looks for them
        loop.trainer.strategy.optimizers = done.progress.optimizers
        loop.trainer.strategy.lr_scheduler_configs = done.progress.schedulers
        update = self.update(module, observed, done.callbacks, phase)
        return update, self.now(module, phase)

    def _fit(self, phase: Phase) -> Fit:
        loop, work, trainer = self.loop, self.task.work, self.loop.trainer
        epochs, steps = work.epochs, work.steps
        if phase.epochs is not None:
            epochs, steps = phase.epochs, None
        return Fit(
            loop.facts,
            batches=lambda: batches_of(self.data.train, trainer.limit_train_batches),
            callbacks=self.callbacks(phase),
            progress=Progress(epochs, steps, trainer._accumulate, trainer._log_every),
            logger=self._logger(phase),
            offset=work.step_offset,
            num_examples=self.data.num_examples,
            any_log=loop.any_log,
            loader=self.data.train,
        )
