"""One federation at work: what a round is, from the cohort to the pseudo-gradient."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fl_lightning.aggregation import PartialSum, TreeSum, gather_cohort, gather_objects, reduce_over_processes
from fl_lightning.algorithms.base import State
from fl_lightning.dispatching import Dispatcher
from fl_lightning.engines import Engine
from fl_lightning.errors import (
    BadUpdateError,
    ClientError,
    EmptyClientError,
    MisconfigurationException,
    NoLossError,
)
from fl_lightning.federation_settings import FederationSettings
from fl_lightning.local.client import ClientResult, Failure, reseed
from fl_lightning.local.job import ClientData, Job
from fl_lightning.local.recorder import Record
from fl_lightning.local.settings import LocalSettings
from fl_lightning.schedules import Patience, assign_waves, lanes_of_rank, require_delivered
from fl_lightning.schedules.plan import Plan
from fl_lightning.seeding import seed_everywhere, seed_for
from fl_lightning.store import ClientStore
from fl_lightning.transforms import TRANSFORMS, Codec, PayloadError, ServerCodec
from fl_lightning.traveling import Traveling
from fl_lightning.tree import num_bytes
from fl_lightning.types import Arrival, ClientId, ClientTask, Contribution, RoundReport, Tree, Work

__all__ = ["Federation", "FederationSettings", "RoundOutcome"]


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
        dispatcher: turns rounds into tasks.
        engine: where clients run.
        module: the server's module, which is the user's.
        rank, world_size: of this process.
        device: of this process.
    """

    def __init__(
        self,
        settings: FederationSettings,
        dispatcher: Dispatcher,
        engine: Engine,
        module: pl.LightningModule,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.algorithm = settings.algorithm
        self.dispatcher = dispatcher
        self.engine = engine
        self.population = dispatcher.population
        self.module = module
        self.device = device
        self.lanes = lanes_of_rank(rank, world_size, settings.num_lanes)
        self.traveling = Traveling.of(module, self.algorithm, settings.batch_norm)
        seed = seed_for(settings.seed, -1, None, TRANSFORMS)
        self.wire = ServerCodec(Codec(settings.transforms, seed, self.model(), self.buffers()), device)
        dispatcher.module = module
        self.state: State = self.wire.start(self.algorithm.init_state(self.model()))
        dispatcher.bytes_down = dispatcher.bytes_up = num_bytes([self.model(), self.buffers()])
        if settings.transforms and dispatcher.timing is not None:  # the first round's time is that of what it will send
            trees = {"delta": self.model(), **({"buffers": self.buffers()} if self.buffers() else {})}
            dispatcher.bytes_up = self.wire.first_upload(trees, {"weight": 1.0}) or dispatcher.bytes_up
        self.store: ClientStore | None = None
        self.patience = Patience()
        self.bytes_asked: Counter[ClientId] = Counter()
        """Bytes that clients downloaded in this round to answer a question of the sampler."""
        self.bytes_answered: Counter[ClientId] = Counter()
        """Bytes of their answers."""
        self.interrupted: Callable[[], bool] = lambda: False
        self.on_cohort: Callable[[Sequence[ClientId]], None] = lambda cohort: None
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
        self.dispatcher.limits = template.trainer_arguments
        template.personalize_epochs = self.settings.personalize_epochs
        return template

    # ---- a round -----------------------------------------------------------------------------------------------

    def run_round(self, round: int, at_most: int | None = None) -> RoundOutcome:
        """Let the cohort of a round train and turn what comes back into the server's gradient."""
        begin = time.perf_counter()
        self.bytes_asked.clear()
        self.bytes_answered.clear()
        plan = self.dispatcher.plan(round, at_most)
        self.on_cohort([dispatch.client_id for dispatch in plan.dispatches])
        downloads = self._send(round, plan)
        tasks = self.dispatcher.tasks(plan, round)
        partial, single, results = self._run_lanes(tasks, plan)
        results = self._gather(results, tasks, round)
        total = reduce_over_processes(partial, self.device)
        report = self._report(round, plan, results)
        gradient, state, buffers = self._aggregated(total, single, report, tasks)
        learned = self.dispatcher.learn(results, self.wire.num_bytes_down, downloads)
        report.metrics = {**scalars(total.metrics.compute(self.module)), **plan.metrics, **learned}
        self.dispatcher.keep_versions(plan)
        report.seconds = time.perf_counter() - begin
        return RoundOutcome(report, gradient, self.wire.with_state(state), buffers, results)

    def _report(self, round: int, plan: Plan, results: Sequence[ClientResult]) -> RoundReport:
        delivered = [result for result in results if result.failure is None]
        self.bytes_answered.update(self.dispatcher.uploads_in_vain(delivered))
        report = RoundReport(round, [result.client_id for result in delivered])
        report.dropped = dict(plan.dropped)
        report.skipped = {r.client_id: r.failure.reason for r in results if r.failure is not None}
        report.num_examples = sum(result.num_examples for result in delivered)
        report.num_steps = sum(result.num_steps for result in delivered)
        report.num_bytes_up = sum(result.num_bytes_up for result in delivered) + self.bytes_answered.total()
        report.num_bytes_down = self.wire.num_bytes_down + self.bytes_asked.total()
        return report

    def _send(self, round: int, plan: Plan) -> int:
        """Make this round's broadcast for those who download it, and return how many they are."""
        clients = plan.downloads if plan.downloads is not None else [d.client_id for d in plan.dispatches]
        self.wire.open_round(round, self.state)
        if clients:
            broadcast: dict[str, Tree] = {"model": self.model(), "buffers": self.buffers()}
            broadcast.update(self.algorithm.broadcast(self.state))
            sent = self.wire.send(broadcast, clients)
            if any(dispatch.version == round for dispatch in plan.in_flight):
                # the server's step writes into its own tensors, and this version outlives the step
                sent = {key: {name: t.clone() for name, t in tree.items()} for key, tree in sent.items()}
            self.dispatcher.versions[round] = sent
        return len(clients)

    def _run_lanes(
        self, tasks: Sequence[ClientTask], plan: Plan
    ) -> tuple[PartialSum, dict[ClientId, Contribution], list[ClientResult]]:
        work = [self.dispatcher.estimated_work(task.client_id, task.work) for task in tasks]
        lanes = assign_waves([task.client_id for task in tasks], work, self.settings.num_lanes)
        by_id = {task.dispatch_id: task for task in tasks}
        arrivals = self._arrivals(tasks, plan)
        merged = TreeSum()
        single: dict[ClientId, Contribution] = {}
        results: list[ClientResult] = []
        mine = sum(len(wave) for lane in self.lanes for wave in lanes[lane])
        for lane in self.lanes:
            partial = PartialSum()
            for wave in lanes[lane]:
                if self._stop(results):
                    break
                for result in self.engine.session([tasks[position] for position in wave]):
                    results.append(result)
                    self._open(result, by_id[result.dispatch_id])
                    if result.contribution is not None and result.dispatch_id in arrivals:
                        result.contribution = self.algorithm.receive(result.contribution, arrivals[result.dispatch_id])
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

    def _arrivals(self, tasks: Sequence[ClientTask], plan: Plan) -> dict[int, Arrival]:
        if not self.algorithm.asynchronous:
            return {}
        now = {"model": self.model(), "buffers": self.buffers()}
        return {
            task.dispatch_id: Arrival(task.round - dispatch.version, task.broadcast, now, task.client_id)
            for task, dispatch in zip(tasks, plan.dispatches, strict=True)
        }

    def _open(self, result: ClientResult, task: ClientTask) -> None:
        """Decode a payload; one that cannot be is a bad update of its client, whose memory stays as it was."""
        if result.payload is not None:
            try:
                result.contribution = self.algorithm.opened(self.wire.open(result.payload, task), task)
            except PayloadError as error:
                result.failure, result.has_memory = Failure(str(error), bad_update=True), False
                if self.store is not None:
                    self.store.discard(result.client_id)
            result.payload = None

    def _stop(self, results: Sequence[ClientResult]) -> bool:
        if self.interrupted():
            raise SIGTERMException
        return self.settings.on_bad_update == "raise" and bool(results) and results[-1].failure is not None

    def _gather(self, results: list[ClientResult], tasks: Sequence[ClientTask], round: int) -> list[ClientResult]:
        everyone = gather_objects([_portable(result) for result in results])
        by_id = {result.dispatch_id: result for some in everyone for result in some}
        # this process's own results still hold the exception with its traceback
        by_id.update({result.dispatch_id: result for result in results})
        ordered = [by_id[task.dispatch_id] for task in tasks if task.dispatch_id in by_id]
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

    def _aggregated(
        self,
        total: PartialSum,
        single: Mapping[ClientId, Contribution],
        report: RoundReport,
        tasks: Sequence[ClientTask],
    ) -> tuple[Tree, State, dict[str, Tensor]]:
        """Return the server optimizer's gradient, the algorithm's next state and the next running statistics."""
        waits = self.algorithm.asynchronous and self.settings.min_clients == 1  # for those that are still at work
        if (self.dispatcher.drew_nobody and not tasks) or (waits and self.patience.lasts(report)):
            # no gradient at all, and not one of zeros: torch's optimizers then leave momentum and weights alone
            return {}, self.state, {}
        require_delivered(report, self.settings.min_clients, self.dispatcher.min_reports)
        if self.algorithm.linear:
            return self._finish(total)
        return self._combine(single, report.cohort, tasks[0])

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
    def accept(self, outcome: RoundOutcome) -> list[tuple[ClientId, str]]:
        """Make a round's state the federation's; the weights have been stepped by the server's optimizer.

        Returns:
            The versions of clients' memory that this round replaced.
        """
        self.state = outcome.state
        own = dict(self.module.named_buffers())
        for name, value in outcome.buffers.items():
            own[name].copy_(value)
        self.dispatcher.commit()
        if self.store is None:
            return []
        return self.store.commit([r.client_id for r in outcome.results if r.has_memory], outcome.report.round)

    def count_steps(
        self, results: Iterable[ClientResult], logged: Callable[[ClientId], bool]
    ) -> dict[ClientId, list[Record]]:
        """Advance the logged clients' step counts and return their new records, with the bytes up and down."""
        curves: dict[ClientId, list[Record]] = {}
        downloads = [*self.wire.downloads, *self.bytes_asked.items()]
        self.dispatcher.count_bytes("down", ((client_id, size) for client_id, size in downloads if logged(client_id)))
        answers = self.bytes_answered.items()
        self.dispatcher.count_bytes("up", ((client_id, size) for client_id, size in answers if logged(client_id)))
        for result in results:
            if result.failure is None and logged(result.client_id):
                self.dispatcher.count_steps([(result.client_id, result.num_steps)])
                last = max(self.dispatcher.client_steps[result.client_id] - 1, 0)
                up = self.dispatcher.client_uploads.pop(result.client_id, 0) + result.num_bytes_up
                down = self.dispatcher.client_downloads.pop(result.client_id, 0)
                own = curves.setdefault(result.client_id, [])
                own.extend(result.records)
                own.append(("add_scalar", ("num_bytes_up", float(up), last), {}))
                own.append(("add_scalar", ("num_bytes_down", float(down), last), {}))
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
    if isinstance(cause, MisconfigurationException | EmptyClientError | NoLossError):
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
