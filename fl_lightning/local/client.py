"""The client half of a federation: everything between a task and the contribution that answers it.

It holds no reference to the server, so it runs in this process, in another one, or at a site.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import lightning.pytorch as pl
import torch

from fl_lightning.algorithms.base import PERSONAL, Algorithm
from fl_lightning.data import ClientPopulation
from fl_lightning.errors import BadUpdateError, ClientError, EmptyClientError, MisconfigurationException, NoLossError
from fl_lightning.local.choice import choose_loop
from fl_lightning.local.job import ClientData, Job, Loop, Outcome
from fl_lightning.local.recalibration import statistics_contribution
from fl_lightning.local.recorder import Record
from fl_lightning.local.settings import LocalSettings
from fl_lightning.metrics import MetricSums
from fl_lightning.store import ClientStore
from fl_lightning.transforms import TRANSFORMS
from fl_lightning.tree import non_finite, norm
from fl_lightning.types import ClientId, ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["ClientHalf", "ClientResult", "Failure"]


@dataclass(slots=True)
class Failure:
    """Why a client did not deliver; ``details`` is its traceback, ``bad_update`` tells a bad update from an error."""

    reason: str
    details: str = ""
    bad_update: bool = False
    exception: BaseException | None = None


@dataclass(slots=True)
class ClientResult:
    """What comes back from a client: its contribution, or the reason why there is none."""

    client_id: ClientId
    dispatch_id: int
    contribution: Contribution | None = None
    payload: bytes | None = None  # what transforms made of the contribution; the server decodes it before it adds
    num_examples: int = 0
    num_steps: int = 0
    num_bytes_up: int = 0
    update_norm: float = 0.0
    has_memory: bool = False
    metrics: MetricSums | None = None
    records: list[Record] = field(default_factory=list)
    failure: Failure | None = None


class ClientHalf:
    """Runs the tasks of this process.

    Args:
        module: a copy of the user's module, in which the clients train.
        algorithm: gives callbacks, phases and contributions.
        settings: how clients train.
        population: where the clients' data comes from.
        store: where the clients' memory is.
        wants_curve: whether a client's curve is kept.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        algorithm: Algorithm,
        settings: LocalSettings,
        population: ClientPopulation,
        store: ClientStore,
        wants_curve: Callable[[ClientId], bool],
    ) -> None:
        self.algorithm = algorithm
        self.settings = settings
        self.population = population
        self.store = store
        self.wants_curve = wants_curve
        self.lightning_loop = choose_loop(module, algorithm, settings)
        self.loop: Loop = self.lightning_loop

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Run tasks in their order and yield a result for each."""
        for outcome in self.loop.run(self._job(task) for task in tasks):
            result = self._result(outcome)
            outcome.update = None  # or it would live as long as the next client trains
            yield result

    def evaluate(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientId, MetricSums | Failure | None]]:
        """Evaluate the broadcast model on the clients' own validation data; ``None`` for a client without any.

        Values of personal models stand beside them under ``personal/<name>``.
        """
        for task in tasks:
            try:
                yield task.client_id, self._evaluated(task)
            except Exception as error:
                yield task.client_id, _failure(error)

    def _evaluated(self, task: ClientTask) -> MetricSums | None:
        loader = self.validation_loader(task.client_id)
        if loader is None:
            return None
        loop, memory = self.lightning_loop, self.store.get(task.client_id)
        sums = loop.validate(task, loader, memory)
        personal = self._personal(task, memory)
        if personal is None:
            return sums
        mine = {**memory, "local": {**memory.get("local", {}), **personal}}
        own = loop.validate(task, self.validation_loader(task.client_id), mine)
        return MetricSums({**sums, **{f"{PERSONAL}/{name}": part for name, part in own.items()}})

    def _personal(self, task: ClientTask, memory: Memory) -> Tree | None:
        """Return the client's personal model; a client that has not taken part yet has the global one."""
        own: Tree = memory.get(PERSONAL, {})
        if self.settings.personalize_epochs:
            try:
                return self.lightning_loop.personalize(task, self.open_data(task, validates=False), memory)
            except EmptyClientError:  # it has data to evaluate on, and none to train on
                return own
        keeps = any(phase.keep == PERSONAL for phase in self.algorithm.phases(task))
        return own if keeps else None

    def recalibrate(self, tasks: Iterable[ClientTask], names: Sequence[str]) -> Iterator[tuple[ClientId, Contribution]]:
        """Measure running statistics of the broadcast model on the clients' training data."""
        for task in tasks:
            buffers, size = self.lightning_loop.recalibrate(task, self.open_data(task), names)
            yield task.client_id, statistics_contribution(buffers, size)

    def start_losses(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientId, float | Failure]]:
        """Measure the loss of the broadcast model on the clients' training data; -inf for a client without a loss."""
        for task in tasks:
            try:
                data, memory = self.open_data(task, validates=False), self.store.get(task.client_id)
                yield task.client_id, self.lightning_loop.start_loss(task, data, memory)
            except (EmptyClientError, NoLossError):
                yield task.client_id, -math.inf
            except Exception as error:
                yield task.client_id, _failure(error)

    def validation_loader(self, client_id: ClientId) -> Any:
        """Return the client's validation loader, or the share of the server's data that a partition gives it."""
        loader = self.population.client_val_dataloader(client_id)
        return loader if loader is not None else self.population.client_eval_dataloader(client_id)

    def _job(self, task: ClientTask) -> Job:
        client_id = task.client_id
        return Job(
            task,
            data=lambda: self.open_data(task),
            memory=lambda: self.store.get(client_id, task.round),
            logged=self.wants_curve(client_id),
        )

    def open_data(self, task: ClientTask, validates: bool = True) -> ClientData:
        """Open what a client trains on, and what it validates on while it trains."""
        population, client_id = self.population, task.client_id
        datamodule = population.client_datamodule(client_id)
        if datamodule is not None:
            own_size = callable(getattr(population.source, "client_size", None))
            return ClientData(
                datamodule=datamodule, num_examples=population.client_size(client_id) if own_size else None
            )
        train = population.client_dataloader(client_id, task.work.batch_size)
        reseed(train, task.seed)
        val = population.client_val_dataloader(client_id) if validates else None
        return ClientData(train, val, num_examples=population.client_size(client_id))

    def _result(self, outcome: Outcome) -> ClientResult:
        task = outcome.job.task
        result = ClientResult(task.client_id, task.dispatch_id)
        if outcome.error is not None:
            result.failure = _failure(outcome.error)
            return result
        update = outcome.update
        assert update is not None
        result.update_norm = norm(update.delta) if update.norm is None else update.norm
        # a finite norm has no NaN or infinity in it; only the norm of large numbers is infinite without one
        bad = (None if isfinite(result.update_norm) else non_finite(update.delta)) or non_finite(update.buffers)
        if bad is not None:
            result.failure = Failure(f"its update has NaN or infinite values in {bad!r}", bad_update=True)
            return result
        try:
            memory = self._contribute(update, task, outcome.job.memory, result)
        except MisconfigurationException:
            raise  # wrong for every client, not a fault of this one
        except Exception as error:
            result.failure = _failure(error)
            return result
        if memory is not None:
            self.store.put(task.client_id, task.round, memory)
            result.has_memory = True
        result.num_examples, result.num_steps = update.num_examples, update.num_steps
        result.metrics, result.records = update.metrics, outcome.records
        return result

    def _contribute(
        self, update: ClientUpdate, task: ClientTask, memory: Callable[[], Memory], result: ClientResult
    ) -> Memory | None:
        old = memory()
        contribution, own = self.algorithm.contribute(update, task, old)
        if self.settings.buffer_names:
            weight = float(update.num_examples)
            # integers are summed as doubles: exact, and rounded once at the end
            contribution.trees["buffers"] = {
                name: (b if b.is_floating_point() else b.double()) * weight for name, b in update.buffers.items()
            }
            contribution.scalars["buffers"] = weight
        kept = self._send(contribution, task, old.get(TRANSFORMS, {}), result)
        if own is None and kept is None and not update.memory:
            return None
        return {**old, **(own or {}), **update.memory, **({} if kept is None else {TRANSFORMS: kept})}

    def _send(
        self, contribution: Contribution, task: ClientTask, memory: Memory, result: ClientResult
    ) -> Memory | None:
        codec = self.settings.codec
        if codec.is_identity:
            result.contribution = contribution
            result.num_bytes_up = codec.size(contribution, task)
            return None
        for key, tree in contribution.trees.items():  # the weight may have made finite numbers infinite
            bad = non_finite(tree)
            if bad is not None:
                reason = f"its contribution has NaN or infinite values in {key}/{bad}"
                raise BadUpdateError(task.client_id, task.round, reason)
        result.payload, kept = codec.encode(contribution, task, memory)
        result.num_bytes_up = len(result.payload)
        return kept


def reseed(loader: Any, seed: int) -> None:
    """Seed the generators that a user gave to a loader or its sampler: their state would outlive the client."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def _failure(error: Exception) -> Failure:
    if isinstance(error, ClientError):
        return Failure(error.reason, bad_update=isinstance(error, BadUpdateError), exception=error)
    details = "".join(traceback.format_exception(error))
    return Failure(f"{type(error).__name__}: {error}", details, exception=error)
