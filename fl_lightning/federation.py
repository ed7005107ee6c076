"""One federation at work: what a round is, from the cohort to the pseudo-gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fl_lightning.aggregation import PartialSum, TreeSum, gather_cohort, gather_objects, reduce_over_processes
from fl_lightning.algorithms.base import Algorithm, State
from fl_lightning.data import ClientPopulation
from fl_lightning.engines import Engine
from fl_lightning.errors import (
    BadUpdateError,
    ClientError,
    EmptyClientError,
    MisconfigurationException,
)
from fl_lightning.local.client import ClientResult, Failure, reseed
from fl_lightning.local.job import ClientData, Job
from fl_lightning.local.recorder import Record
from fl_lightning.local.settings import LocalSettings
from fl_lightning.schedules import Sampler, assign_lanes, cohort_size, lanes_of_rank, require_delivered, require_enough
from fl_lightning.schedules.lanes import sort_key
from fl_lightning.seeding import seed_everywhere, seed_for
from fl_lightning.store import ClientStore
from fl_lightning.transforms import TRANSFORMS, Codec, PayloadError, ServerCodec, Transform
from fl_lightning.traveling import BatchNormPolicy, Traveling
from fl_lightning.types import ClientId, ClientTask, Contribution, RoundReport, Tree, Work

__all__ = ["Federation", "FederationSettings", "RoundOutcome", "rehearsal"]


@dataclass(slots=True)
class FederationSettings:
    """The user's choices, as the arguments of ``FederatedTrainer`` say them."""

    algorithm: Algorithm
    clients_per_round: int | float | None = None
    local_epochs: int = 1
    local_steps: int | None = None
    min_clients: int = 1
    on_bad_update: Literal["raise", "skip"] = "raise"
    client_overrides: Mapping[ClientId, Mapping[str, Any]] = field(default_factory=dict)
    client_lr_schedule: Callable[[int], float] | None = None
    batch_norm: BatchNormPolicy = "average"
    transforms: Sequence[Transform] = ()
    evaluate_clients: bool | int | float = False
    evaluate_every_n_rounds: int = 1
    num_lanes: int = 8
    seed: int = 0


def rehearsal(settings: FederationSettings) -> FederationSettings:
    """Return the settings of ``fast_dev_run``: each client passes once over its few batches."""
    overrides = {
        client_id: {name: value for name, value in override.items() if name not in ("epochs", "steps")}
        for client_id, override in settings.client_overrides.items()
    }
    return replace(settings, local_epochs=1, local_steps=None, client_overrides=overrides)


@dataclass(slots=True)
class RoundOutcome:
    """What a round leaves behind before it is committed."""

    report: RoundReport
    gradient: Tree
    state: State
    buffers: dict[str, Tensor]
    results: list[ClientResult]


class Federation:
    """The server half of a fit; a round runs the same on every process of the group.

    Args:
        settings: the user's choices.
        sampler: who takes part.
        engine: where clients run.
        population: the clients.
        module: the server's module, which is the user's.
        rank, world_size: of this process.
        device: of this process.
    """

    def __init__(
        self,
        settings: FederationSettings,
        sampler: Sampler,
        engine: Engine,
        population: ClientPopulation,
        module: pl.LightningModule,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.algorithm = settings.algorithm
        self.sampler = sampler
        self.engine = engine
        self.population = population
        self.module = module
        self.device = device
        self.lanes = lanes_of_rank(rank, world_size, settings.num_lanes)
        self.traveling = Traveling.of(module, self.algorithm, settings.batch_norm)
        seed = seed_for(settings.seed, -1, None, TRANSFORMS)
        self.wire = ServerCodec(Codec(settings.transforms, seed, self.model(), self.buffers()), device)
        self.state: State = self.wire.start(self.algorithm.init_state(self.model()), self.algorithm.linear)
        self.store: ClientStore | None = None
        self.num_dispatched = 0
        self.client_steps: dict[ClientId, int] = {}
        self.interrupted: Callable[[], bool] = lambda: False
        self.on_client_end: Callable[[ClientId, int, int, int], None] = lambda *_: None

    # ---- what the server holds ---------------------------------------------------------------------------------

    def model(self) -> dict[str, Tensor]:
        """Return the trainable parameters that travel, by name."""
        own = dict(self.module.named_parameters())
        return {name: own[name].detach() for name in self.traveling.parameters}

    def buffers(self) -> dict[str, Tensor]:
        own = dict(self.module.named_buffers())
        return {name: own[name].detach() for name in self.traveling.buffers}

    def local_settings(self, template: LocalSettings) -> LocalSettings:
        """Complete the clients' settings with what travels and what does not."""
        template.parameter_names = self.traveling.parameters
        template.buffer_names = self.traveling.buffers
        template.local_names = self.traveling.local
        template.static = self.traveling.static(self.module)
        template.device = self.device
        template.codec = self.wire.codec
        return template

    # ---- a round -----------------------------------------------------------------------------------------------

    def cohort(self, round: int, at_most: int | None = None) -> list[ClientId]:
        """Return who takes part, in an order that does not depend on the population's."""
        available = len(self.population.client_ids())
        require_enough(available, self.settings.min_clients, round)
        size = cohort_size(self.settings.clients_per_round, available)
        if at_most is not None:
            size = min(size, max(at_most, self.algorithm.fewest_clients))
        cohort = self.sampler.cohort(self.population, size, self.settings.seed, round)
        if len(set(cohort)) != len(cohort):
            twice = next(client_id for client_id in cohort if cohort.count(client_id) > 1)
            raise MisconfigurationException(
                f"{type(self.sampler).__name__} chose client {twice!r} twice in round {round}; a cohort has no doubles."
            )
        require_enough(len(cohort), self.settings.min_clients, round)
        self.algorithm.check_cohort(len(cohort))  # before anyone trains in vain
        return sorted(cohort, key=sort_key)

    def run_round(self, round: int, at_most: int | None = None) -> RoundOutcome:
        """Let the cohort of a round train and turn what comes back into the server's gradient."""
        begin = time.perf_counter()
        cohort = self.cohort(round, at_most)
        tasks = self._tasks(round, cohort)
        partial, single, results = self._run_lanes(tasks)
        results = self._gather(results, cohort, round)
        total = reduce_over_processes(partial, self.device)
        delivered = [result for result in results if result.failure is None]
        report = RoundReport(round, [result.client_id for result in delivered])
        report.skipped = {r.client_id: r.failure.reason for r in results if r.failure is not None}
        report.num_examples = sum(result.num_examples for result in delivered)
        report.num_steps = sum(result.num_steps for result in delivered)
        report.num_bytes_up = sum(result.num_bytes_up for result in delivered)
        report.num_bytes_down = self.wire.num_bytes_down
        require_delivered(report, self.settings.min_clients)
        if self.algorithm.linear:
            gradient, state, buffers = self._finish(total)
        else:
            gradient, state, buffers = self._combine(single, report.cohort, tasks[0])
        report.metrics = scalars(total.metrics.compute(self.module))
        report.seconds = time.perf_counter() - begin
        return RoundOutcome(report, gradient, self.wire.with_state(state), buffers, results)

    def _tasks(self, round: int, cohort: Sequence[ClientId]) -> list[ClientTask]:
        broadcast: dict[str, Tree] = {"model": self.model(), "buffers": self.buffers()}
        broadcast.update(self.algorithm.broadcast(self.state))
        broadcast = self.wire.send(broadcast, cohort, round, self.state)
        schedule = self.settings.client_lr_schedule
        factor = 1.0 if schedule is None else float(schedule(round))
        first = self.num_dispatched
        self.num_dispatched += len(cohort)
        return [
            ClientTask(
                client_id,
                round,
                first + position,
                broadcast,
                seed_for(self.settings.seed, round, client_id, "training"),
                self._work(client_id, factor),
            )
            for position, client_id in enumerate(cohort)
        ]

    def _work(self, client_id: ClientId, factor: float) -> Work:
        override = dict(self.settings.client_overrides.get(client_id, {}))
        steps = override.get("steps", None if "epochs" in override else self.settings.local_steps)
        epochs = None if steps is not None else override.get("epochs", self.settings.local_epochs)
        return Work(
            epochs,
            steps,
            factor,
            override.get("lr"),
            override.get("batch_size"),
            step_offset=self.client_steps.get(client_id, 0),
        )

    def _run_lanes(
        self, tasks: Sequence[ClientTask]
    ) -> tuple[PartialSum, dict[ClientId, Contribution], list[ClientResult]]:
        sizes = [self.estimated_work(task) for task in tasks]
        lanes = assign_lanes([task.client_id for task in tasks], sizes, self.settings.num_lanes)
        merged = TreeSum()
        single: dict[ClientId, Contribution] = {}
        results: list[ClientResult] = []
        mine = sum(len(lanes[lane]) for lane in self.lanes)
        for lane in self.lanes:
            partial = PartialSum()
            if not self._stop(results):
                for result in self.engine.session([tasks[position] for position in lanes[lane]]):
                    results.append(result)
                    self._open(result, tasks)
                    if result.failure is None and result.contribution is not None:
                        if self.algorithm.linear:
                            partial.add(result.contribution, result.metrics)
                        else:
                            single[result.client_id] = result.contribution
                            partial.add(Contribution(), result.metrics)
                    result.contribution = result.metrics = None  # only the sum stays
                    self.on_client_end(result.client_id, len(results), mine, result.num_examples)
                    if self._stop(results):
                        break
            merged.push(partial)
        return merged.total(), single, results

    def _open(self, result: ClientResult, tasks: Sequence[ClientTask]) -> None:
        """Decode a payload; one that cannot be is a bad update of its client, whose memory stays as it was."""
        if result.payload is not None:
            try:
                task = tasks[result.dispatch_id - tasks[0].dispatch_id]
                result.contribution = self.wire.open(result.payload, task)
            except PayloadError as error:
                result.failure, result.has_memory = Failure(str(error), bad_update=True), False
            result.payload = None

    def _stop(self, results: Sequence[ClientResult]) -> bool:
        if self.interrupted():
            raise SIGTERMException
        return self.settings.on_bad_update == "raise" and bool(results) and results[-1].failure is not None

    def estimated_work(self, task: ClientTask) -> float:
        if task.work.steps is not None:
            return float(task.work.steps)
        try:
            size = self.population.client_size(task.client_id) or 1
        except Exception:  # a loader that cannot be opened is the client's failure, and named when it trains
            size = 1
        return float(size * (task.work.epochs or 1))

    def _gather(self, results: list[ClientResult], cohort: Sequence[ClientId], round: int) -> list[ClientResult]:
        everyone = gather_objects([_portable(result) for result in results])
        by_id = {result.client_id: result for some in everyone for result in some}
        # this process's own results still hold the exception with its traceback
        by_id.update({result.client_id: result for result in results})
        ordered = [by_id[client_id] for client_id in cohort if client_id in by_id]
        if self.settings.on_bad_update == "raise":
            for result in ordered:
                if result.failure is not None:
                    raise_failure(result.client_id, round, result.failure)
        for result in ordered:
            if result.failure is not None:
                rank_zero_warn(
                    f"Client {result.client_id!r} is skipped in round {round}: {result.failure.reason}\n"
                    f"{result.failure.details}"
                )
        return ordered

    def _finish(self, total: PartialSum) -> tuple[Tree, State, dict[str, Tensor]]:
        buffers: dict[str, Tensor] = {}
        total.trees, total.scalars = self.wire.finish(total.as_contribution())
        summed = total.trees.pop("buffers", {})
        weight = total.scalars.pop("buffers", 0.0)
        if summed and weight > 0:
            buffers = self._as_buffers({name: value / weight for name, value in summed.items()})
        num_clients = len(self.population.client_ids())
        gradient, state = self.algorithm.apply(total.as_contribution(), self.state, num_clients)
        return gradient, state, buffers

    def _combine(
        self, single: Mapping[ClientId, Contribution], delivered: Sequence[ClientId], like: ClientTask
    ) -> tuple[Tree, State, dict[str, Tensor]]:
        """Do what :meth:`_finish` does for an algorithm that needs every contribution."""
        self.algorithm.check_cohort(len(delivered))
        cohort = gather_cohort(single, delivered, self._train_on_server(like), self.device)
        gradient, state = self.algorithm.combine(cohort, self.state, len(self.population.client_ids()))
        return gradient, state, self._as_buffers(cohort.median_of_buffers())

    def _train_on_server(self, like: ClientTask) -> Tree | None:
        """Train on the server's own data as a client of this round would; every process does, to the same bits."""
        data = self.algorithm.root_data()
        if data is None:
            return None
        seed = seed_for(self.settings.seed, like.round, None, "server training")
        steps = self.settings.local_steps
        work = Work(None if steps is not None else self.settings.local_epochs, steps, like.work.lr_factor)
        task = ClientTask("server", like.round, -1, like.broadcast, seed, work)
        reseed(data, seed)
        outcome = next(iter(self.engine.client_half.loop.run([Job(task, lambda: ClientData(data), dict)])))
        if outcome.error is not None:
            raise outcome.error
        assert outcome.update is not None
        return outcome.update.delta

    def _as_buffers(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now = self.buffers()
        return {
            name: value.to(now[name].dtype) if now[name].is_floating_point() else value.round().to(now[name].dtype)
            for name, value in values.items()
        }

    # ---- after a round -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def accept(self, outcome: RoundOutcome) -> None:
        """Make a round's state the federation's; the weights have been stepped by the server's optimizer."""
        self.state = outcome.state
        own = dict(self.module.named_buffers())
        for name, value in outcome.buffers.items():
            own[name].copy_(value)
        if self.store is not None:
            self.store.commit([r.client_id for r in outcome.results if r.has_memory], outcome.report.round)

    def count_steps(
        self, results: Iterable[ClientResult], logged: Callable[[ClientId], bool]
    ) -> dict[ClientId, list[Record]]:
        """Advance the logged clients' step counts and return their new records."""
        curves: dict[ClientId, list[Record]] = {}
        for result in results:
            if result.failure is None and logged(result.client_id):
                self.client_steps[result.client_id] = self.client_steps.get(result.client_id, 0) + result.num_steps
                curves[result.client_id] = result.records
        return curves

    def seed_server(self, round: int) -> None:
        """Seed what the server itself draws in a round, evaluation included: a resume then draws the same."""
        seed_everywhere(seed_for(self.settings.seed, round, None, "server"))


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are single numbers, as floats."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                continue
            value = value.item()
        found[name] = float(value)
    return found


def raise_failure(client_id: ClientId, round: int, failure: Failure) -> NoReturn:
    """Raise what stopped a client, named, with its own error as the cause."""
    cause = failure.exception
    if isinstance(cause, MisconfigurationException):
        raise cause
    if isinstance(cause, EmptyClientError):
        raise cause
    kind = BadUpdateError if failure.bad_update else ClientError
    details = "" if cause is not None or not failure.details else f"\n{failure.details}"
    raise kind(client_id, round, failure.reason + details) from cause


def _portable(result: ClientResult) -> ClientResult:
    if result.failure is None:
        return result
    return ClientResult(result.client_id, result.dispatch_id, failure=portable_failure(result.failure))


def portable_failure(failure: Failure) -> Failure:
    # a user's exception may not be picklable; its text travels, and the federation's own errors do
    own = failure.exception if isinstance(failure.exception, ClientError | MisconfigurationException) else None
    return Failure(failure.reason, failure.details, failure.bad_update, own)
