"""Local training by a real ``lightning.Trainer``: any module runs, and every other loop is measured against it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch.optim import Optimizer

from fl_lightning.algorithms.base import PERSONAL, Algorithm
from fl_lightning.callbacks.base import ClientCallback, GradientCorrection
from fl_lightning.callbacks.learning_rates import scale_learning_rates
from fl_lightning.callbacks.start_pass import StartPass
from fl_lightning.errors import EmptyClientError, MisconfigurationException
from fl_lightning.local.client_state import load_optimizers, save_optimizers
from fl_lightning.local.client_trainer import ClientTrainer
from fl_lightning.local.job import ClientData, Job, Outcome
from fl_lightning.local.observers import EvaluationObserver, Observer, plain_optimizers
from fl_lightning.local.quiet import as_rank_zero, quiet
from fl_lightning.local.recalibration import reset_statistics
from fl_lightning.local.recorder import ClientLogger, Record
from fl_lightning.local.settings import LocalSettings
from fl_lightning.local.worker import Worker, load_tensors, moved, read_tensors
from fl_lightning.metrics import MetricSums, alone
from fl_lightning.seeding import forked_rng, seed_for
from fl_lightning.types import ClientTask, ClientUpdate, Memory, Phase, Tree

__all__ = ["ClientRun", "LightningLoop"]


class LightningLoop:
    """Runs clients one after the other, each in a real ``lightning.Trainer``.

    Args:
        module: a copy of the user's module, which is the loop's from now on.
        algorithm: gives the client callbacks and the phases.
        settings: how clients train.
    """

    def __init__(self, module: pl.LightningModule, algorithm: Algorithm, settings: LocalSettings) -> None:
        self.algorithm = algorithm
        self.settings = settings
        self.worker = Worker(module, settings.device, settings.memory_format)
        with quiet(), as_rank_zero():
            self.trainer = ClientTrainer(settings.device, **settings.trainer_arguments)

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Run clients one after the other; a client that fails is an outcome, not an end."""
        for job in jobs:
            yield self.outcome(job)  # no name here holds the update while the next client trains

    def outcome(self, job: Job) -> Outcome:
        """Run one client, whatever becomes of it."""
        try:
            return Outcome(job, *self.train(job.task, job.data(), job.memory(), job.logged))
        except Exception as error:  # a user's module may raise anything
            return Outcome(job, error=error)

    def train(
        self, task: ClientTask, data: ClientData, memory: Memory, logged: bool
    ) -> tuple[ClientUpdate, list[Record]]:
        """Run one client.

        Args:
            task: what to do, with the broadcast.
            data: the client's loaders.
            memory: what the client kept from its last round.
            logged: whether the client's curve is kept.

        Returns:
            The update, and the records of the client's curve.

        Raises:
            EmptyClientError: when the client's loader gave no batch.
        """
        settings = self.settings
        logger = None
        if settings.has_loggers:  # a client whose curve nobody keeps still finds a logger, which swallows every call
            logger = ClientLogger(logged, settings.save_dir, step_offset=task.work.step_offset)
        with ExitStack() as stack:
            for context in (forked_rng(task.seed), quiet(), as_rank_zero(), alone()):
                stack.enter_context(context)
            run = ClientRun(self, task, data, memory, logger)
            update = run.phases()
        return update, logger.take() if logger is not None else []

    def recalibrate(self, task: ClientTask, data: ClientData, names: Sequence[str]) -> tuple[Tree, int]:
        """Return the running statistics that the broadcast model sees on a client's training data, and its size."""
        with forked_rng(task.seed), quiet(), as_rank_zero(), alone():
            self.worker.restore()
            observer = Observer(data.num_examples, self.trainer._log_every)
            self.trainer.renew(1, None, [observer], None, 0)

            def prepare(module: torch.nn.Module) -> None:
                load_tensors(module, _starting_trees(self.settings, task, {}))
                reset_statistics(module)

            strategy = self.trainer.client_strategy
            strategy.before_setup = prepare
            # the pass moves no weight: only the statistics are wanted
            strategy.after_optimizers = lambda optimizers, configs: scale_learning_rates(optimizers, configs, 0.0)
            self.trainer.fit_client(self.worker.module, False, train_dataloaders=data.train, datamodule=data.datamodule)
            return read_tensors(self.worker.module, names), observer.num_examples

    def personalize(self, task: ClientTask, data: ClientData, memory: Memory) -> Tree:
        """Return the client's personal model: its own one, or the broadcast model, after plain local training.

        Args:
            task: with the broadcast, and how long to train.
            data: the client's training data.
            memory: what the client keeps; ``"personal"`` is its own model if the algorithm gives it one.

        Raises:
            EmptyClientError: when the client's loader gave no batch.
        """
        with forked_rng(task.seed), quiet(), as_rank_zero(), alone():
            return ClientRun(self, task, data, memory, None).personal()

    def start_loss(self, task: ClientTask, data: ClientData, memory: Memory) -> float:
        """Return the loss of the broadcast model on a client's training data, as :class:`StartPass` defines it.

        Raises:
            EmptyClientError: when the client's loader gave no batch.
        """
        with forked_rng(task.seed), quiet(), as_rank_zero(), alone():
            return ClientRun(self, task, data, memory, None, only=[StartPass()]).start_loss()

    def validate(self, task: ClientTask, dataloaders: Any, memory: Memory) -> MetricSums:
        """Evaluate the broadcast model on a client's own data and return the mergeable sums."""
        with forked_rng(task.seed), quiet(), as_rank_zero(), alone():
            self.worker.restore()
            observer = EvaluationObserver()
            self.trainer.renew(1, None, [observer], None, 0)
            self.trainer.client_strategy.before_setup = lambda module: load_tensors(
                module, _starting_trees(self.settings, task, memory)
            )
            self.trainer.client_strategy.after_optimizers = None
            self.trainer.validate_client(self.worker.module, dataloaders)
        return observer.metrics if observer.metrics is not None else MetricSums()


@dataclass(slots=True)
class ClientRun:
    """One client's round in the making."""

    loop: LightningLoop
    task: ClientTask
    data: ClientData
    memory: Memory
    logger: ClientLogger | None
    extra: dict[str, Any] = field(default_factory=dict)
    several: bool = False
    only: Sequence[Callback] | None = None
    """Callbacks that run instead of the user's and the algorithm's."""

    def phases(self) -> ClientUpdate:
        """Run the phases of the algorithm and return the update of the one that reports."""
        phases = self.loop.algorithm.phases(self.task)
        self.several = len(phases) > 1
        if sum(phase.report for phase in phases) != 1:
            raise MisconfigurationException(
                f"Expected exactly one reporting phase from {type(self.loop.algorithm).__name__}.phases, got "
                f"{[phase.name for phase in phases if phase.report]}. Set Phase(report=False) on the others."
            )
        update: ClientUpdate | None = None
        previous: Tree | None = None
        for position, phase in enumerate(phases):
            if position:
                torch.manual_seed(seed_for(self.task.seed, self.task.round, self.task.client_id, phase.name))
            done, previous = self.phase(phase, previous)
            if phase.report:
                update = done
        assert update is not None
        update.extra.update(self.extra)
        return update

    def personal(self) -> Tree:
        """Train the personal model and return it; nothing else comes of it."""
        phase = Phase(PERSONAL, callbacks="none", start="personal", report=False, keep=PERSONAL)
        self.phase(phase, None)
        personal: Tree = self.extra[PERSONAL]
        return personal

    def start_loss(self) -> float:
        """Measure the loss at the start; nothing else comes of it."""
        update, _ = self.phase(Phase("start loss", report=False), None)
        return float(update.extra["start_loss"])

    def phase(self, phase: Phase, previous: Tree | None) -> tuple[ClientUpdate, Tree]:
        """Train once; return the update, and the parameters where the next phase may start from."""
        loop, task = self.loop, self.task
        start = self.start(phase, previous)
        callbacks = self.callbacks(phase)
        observer = Observer(self.data.num_examples, loop.trainer._log_every)
        loop.worker.restore()
        module = loop.worker.module
        epochs, steps = task.work.epochs, task.work.steps
        if phase.epochs is not None:
            epochs, steps = phase.epochs, None
        loop.trainer.renew(epochs, steps, [*callbacks, observer], self._logger(phase), task.work.step_offset)
        strategy = loop.trainer.client_strategy
        strategy.before_setup = lambda model: self.load(model, start, phase)
        strategy.after_optimizers = lambda optimizers, configs: self.optimizers(optimizers, configs, phase)
        loop.trainer.fit_client(module, self.data.validates, **self.data.as_arguments())
        if observer.num_batches == 0:
            raise EmptyClientError(
                task.client_id,
                task.round,
                "it has no batch to train on (an empty loader, or fewer examples than one batch with drop_last=True)",
            )
        self.check_corrections(callbacks, observer)
        update = self.update(module, observer, callbacks, phase)
        return update, self.now(module, phase)

    def now(self, module: pl.LightningModule, phase: Phase) -> Tree:
        """Return the whole model after a phase that another one, or the client's next round, goes on from."""
        if not self.several and not phase.keep:
            return {}
        settings = self.loop.settings
        now = read_tensors(module, [*settings.parameter_names, *settings.buffer_names, *settings.local_names])
        if phase.keep:
            self.extra[phase.keep] = now
        return now

    def _logger(self, phase: Phase) -> ClientLogger | None:
        """Return what ``self.logger`` is: beside the phase that reports, one that swallows every call."""
        if phase.report or not self.loop.settings.has_loggers:
            return self.logger
        return ClientLogger(False, self.loop.settings.save_dir, step_offset=self.task.work.step_offset)

    def start(self, phase: Phase, previous: Tree | None) -> list[Tree]:
        """Return the trees that a phase starts from, in the order in which they are loaded."""
        trees = _starting_trees(self.loop.settings, self.task, self.memory)
        if phase.start == "previous" and previous is not None:
            trees.append(previous)
        if phase.start == PERSONAL and PERSONAL in self.memory:
            trees.append(self.memory[PERSONAL])
        return trees

    def callbacks(self, phase: Phase) -> list[Callback]:
        """Return this client's own copies of the callbacks."""
        mine = list(self.loop.settings.callbacks if self.only is None else self.only)
        if phase.callbacks == "algorithm" and self.only is None:
            mine += self.loop.algorithm.client_callbacks()
        copies = [copy.deepcopy(callback) for callback in mine]
        for callback in copies:
            if isinstance(callback, ClientCallback):
                callback.begin(self.task, self.memory)
        return copies

    def load(self, module: torch.nn.Module, trees: Sequence[Tree], phase: Phase) -> None:
        """Put the start into the module and freeze what the phase does not train."""
        load_tensors(module, trees)
        if phase.trainable is not None or phase.frozen:
            for name, parameter in module.named_parameters():
                chosen = phase.trainable is None or any(fnmatchcase(name, pattern) for pattern in phase.trainable)
                if not chosen or any(fnmatchcase(name, pattern) for pattern in phase.frozen):
                    parameter.requires_grad_(False)

    def optimizers(self, optimizers: list[Optimizer], configs: list[Any], phase: Phase) -> None:
        """Set the client's learning rates, and go on with kept optimizers."""
        work = self.task.work
        if not self.data.validates:
            for config in configs:
                config.strict = False  # what ReduceLROnPlateau monitors may exist on the server only
        scale_learning_rates(optimizers, configs, work.lr_factor, work.lr)
        if self.loop.settings.client_state == "keep" and phase.report:
            load_optimizers(optimizers, configs, self.memory.get("optimizers"), work.lr_factor)

    def check_corrections(self, callbacks: Iterable[Callback], observer: Observer) -> None:
        """Raise when a correction never ran although optimizers stepped."""
        for callback in callbacks:
            if isinstance(callback, GradientCorrection) and observer.num_gradients and not callback.num_corrections:
                raise MisconfigurationException(
                    f"{type(callback).__name__} corrected no gradient in {observer.num_gradients} optimizer steps of "
                    f"client {self.task.client_id!r}. With manual optimization, step with self.optimizers(), so that "
                    "Lightning calls on_before_optimizer_step."
                )

    def update(
        self, module: pl.LightningModule, observer: Observer, callbacks: Iterable[Callback], phase: Phase
    ) -> ClientUpdate:
        loop, task, settings = self.loop, self.task, self.loop.settings
        for parameter in module.parameters():
            parameter.grad = None  # its place is taken by the update
        memory: Memory = {}
        if settings.local_names:
            memory["local"] = read_tensors(module, settings.local_names)
        if settings.client_state == "keep" and phase.report:
            memory["optimizers"] = save_optimizers(
                plain_optimizers(loop.trainer.optimizers), loop.trainer.lr_scheduler_configs, task.work.lr_factor
            )
        extra: dict[str, Any] = {}
        for callback in callbacks:
            if isinstance(callback, ClientCallback):
                extra.update(callback.report())
        model = task.broadcast["model"]
        return ClientUpdate(
            task.client_id,
            delta=moved(module, {name: model[name] for name in settings.parameter_names}),
            buffers=read_tensors(module, settings.buffer_names),
            num_examples=observer.num_examples,
            num_steps=observer.num_steps,
            a_norm=extra.pop("a_norm", None),
            status="partial" if extra.pop("partial", task.work.partial) else "complete",
            metrics=observer.metrics,
            extra=extra,
            memory=memory,
        )


def _starting_trees(settings: LocalSettings, task: ClientTask, memory: Memory) -> list[Tree]:
    trees: list[Tree] = [settings.static, task.broadcast["model"], task.broadcast.get("buffers", {})]
    if "local" in memory:
        trees.append(memory["local"])
    return trees
