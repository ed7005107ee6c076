"""From a round to the tasks of its clients: who works, on which version of the model, with which random numbers."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.fabric.utilities.data import sized_len
from torch import nn

from fl_lightning.data import ClientPopulation
from fl_lightning.devices import DeviceBuffer, DeviceFleet, DeviceRounds
from fl_lightning.errors import MisconfigurationException
from fl_lightning.federation_settings import FederationSettings
from fl_lightning.schedules import (
    BufferedSchedule,
    Delivery,
    Dispatch,
    Occasion,
    Plan,
    Sampler,
    Schedule,
    SynchronousSchedule,
    Timing,
    cohort_size,
    require_enough,
)
from fl_lightning.schedules.lanes import sort_key
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, ClientTask, Tree, Work

__all__ = ["Dispatcher", "check_schedule", "schedule_of"]


def schedule_of(trainer: Any) -> Schedule:
    """Return the schedule of a fit, new and without history: the algorithm's, the trainer's, or rounds in step."""
    own: Schedule | None = trainer.algorithm.schedule()
    if own is not None:
        if isinstance(own, BufferedSchedule) and isinstance(trainer.fleet, DeviceFleet):
            return (trainer.schedule or DeviceBuffer()).bound(own)
        return own
    if trainer.schedule is not None:
        schedule: Schedule = copy.deepcopy(trainer.schedule)
        return schedule
    # devices have conditions, and rounds in step would not ask for them
    return DeviceRounds() if isinstance(trainer.fleet, DeviceFleet) else SynchronousSchedule()


def check_schedule(settings: FederationSettings, fleet: Any, sampler: Any, schedule: Any) -> None:
    """Raise for devices without a clock, and for a schedule beside one that the algorithm brings itself.

    Raises:
        MisconfigurationException: says what to write instead.
    """
    if fleet is not None and (isinstance(fleet, type) or not isinstance(fleet, Timing)):
        raise MisconfigurationException(
            f"Expected fleet to say how long clients take, with seconds(client_id, num_steps, num_bytes_down, "
            f"num_bytes_up, at), got {fleet!r}."
        )
    if schedule is not None and not isinstance(schedule, Schedule):
        raise MisconfigurationException(
            f"Expected schedule to be a Schedule of fl_lightning.schedules, got {schedule!r}. Leave it out for rounds "
            "in which everyone who was drawn reports."
        )
    if isinstance(schedule, DeviceRounds) and not isinstance(fleet, DeviceFleet):
        raise MisconfigurationException(
            f"DeviceRounds needs devices, got fleet={fleet!r}. Write FederatedTrainer(fleet=DeviceFleet("
            "profile='smartphones'), schedule=DeviceRounds(...))."
        )
    if isinstance(schedule, DeviceBuffer) and not isinstance(fleet, DeviceFleet):
        raise MisconfigurationException(
            f"DeviceBuffer needs devices, got fleet={fleet!r}. Write FederatedTrainer(fleet=DeviceFleet("
            "profile='smartphones'), schedule=DeviceBuffer(...))."
        )
    if settings.algorithm.schedule() is not None:
        _check_asynchronous(settings, sampler, None if isinstance(schedule, DeviceBuffer) else schedule)
    elif isinstance(schedule, DeviceBuffer):
        raise MisconfigurationException(
            f"DeviceBuffer is for FedBuff and FedAsync, and {type(settings.algorithm).__name__} works in rounds. Write "
            "schedule=DeviceRounds(...)."
        )


def _check_asynchronous(settings: FederationSettings, sampler: Any, schedule: Any) -> None:
    algorithm = settings.algorithm
    name = type(algorithm).__name__
    if settings.clients_per_round is not None:
        raise MisconfigurationException(
            f"clients_per_round={settings.clients_per_round} has no meaning with {name}, whose clients work all the "
            f"time. Write {name}(..., concurrency={settings.clients_per_round}) for the clients at work at any time."
        )
    for argument, given in (("sampler", sampler), ("schedule", schedule)):
        if given is not None:
            raise MisconfigurationException(
                f"{name} draws the next client itself whenever one has finished, and would not use "
                f"{argument}={type(given).__name__}(...). Leave {argument} out, or use a synchronous algorithm."
            )
    size = getattr(algorithm, "buffer_size", 1)
    if settings.min_clients > size:
        raise MisconfigurationException(
            f"min_clients={settings.min_clients} can never deliver into a round of {name}, which is complete with "
            f"{size}. Lower min_clients."
        )


class Dispatcher:
    """Asks the schedule for the plan of each round and turns it into tasks.

    It keeps the virtual clock, the number of dispatches, the clients' step counts and the versions of the model that
    clients in flight train from; a checkpoint holds them as they were after the last committed round.

    Args:
        settings: the user's choices.
        population: the clients.
        sampler: draws cohorts.
        schedule: who works when.
        timing: how long clients take, or ``None``.
    """

    def __init__(
        self,
        settings: FederationSettings,
        population: ClientPopulation,
        sampler: Sampler,
        schedule: Schedule,
        timing: Timing | None = None,
    ) -> None:
        self.settings = settings
        self.population = population
        # what a sampler learns is this fit's
        self.sampler = copy.deepcopy(sampler) if _state_of(sampler) else sampler
        self.schedule = schedule
        self.timing = timing
        self.limits: Mapping[str, Any] = {}
        """Lightning's arguments of local training that bound the number of steps."""
        self.num_dispatched = 0
        self.clock = 0.0
        self.bytes_down = self.bytes_up = 0
        self.client_steps: dict[ClientId, int] = {}
        self.client_downloads: dict[ClientId, int] = {}
        """Bytes that each logged client has downloaded since its last report."""
        self.client_uploads: dict[ClientId, int] = {}
        """Bytes of the answers that each logged client has given since its last report."""
        self.versions: dict[int, Mapping[str, Tree]] = {}
        self.drew_nobody = False
        """Whether the sampler drew an empty cohort in this round, as it may."""
        self.module: nn.Module | None = None
        """The server's, from which narrow models are cut."""
        self._cuts = False
        self._lengths: dict[tuple[ClientId, int | None], int | None] = {}
        """Batches of the loaders that this round has opened: a plan asks several times, and data may change later."""
        self._plan: Plan | None = None
        self._committed: dict[str, Any] | None = None

    # ---- a round -----------------------------------------------------------------------------------------------

    def plan(self, round: int, at_most: int | None = None) -> Plan:
        """Return the plan of a round.

        Raises:
            NotEnoughClientsError: when fewer than ``min_clients`` exist or are chosen.
        """
        self._lengths, self.drew_nobody = {}, False
        if self._committed is None:  # an error before the first commit leaves the beginning behind
            self._committed = self._state()
        available = len(self.population.client_ids())
        require_enough(available, self.settings.min_clients, round)
        size = cohort_size(self._wanted(round, available), available)
        if at_most is not None:
            at_most = max(at_most, self.settings.algorithm.fewest_clients)
            size = min(size, at_most)
        factor = self._lr_factor(round)
        occasion = Occasion(
            round,
            self.clock,
            self.settings.seed,
            self.population,
            size,
            self.num_dispatched,
            self.bytes_down,
            self.bytes_up,
            at_most,
            lambda size: self._choose(size, round),
            lambda client_id: self._work(client_id, factor),
            self.num_steps,
            self.timing,
            lambda size, wave: self._draw(size, wave, round),
        )
        self._plan = plan = self.schedule.plan(occasion)
        used = (dispatch.dispatch_id for dispatch in (*plan.dispatches, *plan.in_flight))
        self.num_dispatched = max(self.num_dispatched, 1 + max(used, default=-1))
        self.clock = plan.finished_at
        return plan

    def _wanted(self, round: int, available: int) -> int | float | None:
        wanted = self.settings.clients_per_round
        # more than exist is a mistake in the first round; later clients may have left, and min_clients has the say
        return min(wanted, available) if round > 0 and isinstance(wanted, int) else wanted

    def _choose(self, size: int, round: int) -> list[ClientId]:
        """Return a cohort, in an order that does not depend on the population's."""
        cohort = self._draw(size, 0, round)
        if not cohort and self.settings.min_clients == 1 and getattr(self.sampler, "may_draw_nobody", False):
            self.drew_nobody = True
            return []
        advice = self.sampler.advice(len(self.population.client_ids())) if isinstance(self.sampler, Sampler) else None
        require_enough(len(cohort), self.settings.min_clients, round, advice)
        self.settings.algorithm.check_cohort(len(cohort))  # before anyone trains in vain
        return sorted(cohort, key=sort_key)

    def _draw(self, size: int, wave: int, round: int) -> list[ClientId]:
        seed = seed_for(self.settings.seed, round, None, f"wave {wave}") if wave else self.settings.seed
        cohort = self.sampler.cohort(self.population, size, seed, round)
        if len(set(cohort)) != len(cohort):
            twice = next(client_id for client_id in cohort if cohort.count(client_id) > 1)
            raise MisconfigurationException(
                f"{type(self.sampler).__name__} chose client {twice!r} twice in round {round}; a cohort has no doubles."
            )
        return cohort

    def _lr_factor(self, round: int) -> float:
        schedule = self.settings.client_lr_schedule
        factor = 1.0 if schedule is None else schedule(round)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise MisconfigurationException(
                f"Expected client_lr_schedule({round}) to return a finite factor >= 0, got {factor!r}. Return 1.0 to "
                "leave the clients' learning rates alone."
            )
        return float(factor)

    def _work(self, client_id: ClientId, factor: float) -> Work:
        override = self.settings.override_of(client_id)
        steps = override.get("steps", None if "epochs" in override else self.settings.local_steps)
        epochs = None if steps is not None else override.get("epochs", self.settings.local_epochs)
        width = float(override.get("width", 1.0))
        return Work(epochs, steps, factor, override.get("lr"), override.get("batch_size"), width=width)

    def tasks(self, plan: Plan, round: int) -> list[ClientTask]:
        """Return the tasks of a plan; :attr:`versions` must hold the broadcasts that they train from."""
        offsets = {dispatch.client_id: self.client_steps.get(dispatch.client_id, 0) for dispatch in plan.dispatches}
        narrow: dict[tuple[int, float], Mapping[str, Tree]] = {}  # clients of one width share one model
        several = len(offsets) < len(plan.dispatches)
        tasks = []
        for dispatch in plan.dispatches:
            own = dispatch.version, dispatch.work.width
            if own not in narrow:
                narrow[own] = self._broadcast(*own)
            tasks.append(self._task(dispatch, round, offsets[dispatch.client_id], narrow[own]))
            if several:  # a client's curve goes on where its dispatch before this one ends
                offsets[dispatch.client_id] += self.num_steps(dispatch.client_id, dispatch.work)
        return tasks

    def _broadcast(self, version: int, width: float) -> Mapping[str, Tree]:
        whole = self.versions[version]
        if width == 1.0:
            return whole
        if not self._cuts and self.module is not None:
            self.settings.algorithm.check_narrow(self.module, list(whole["model"]))
            self._cuts = True
        return {**whole, "model": self.settings.algorithm.narrowed(whole["model"], width)}

    def _task(self, dispatch: Dispatch, round: int, step_offset: int, broadcast: Mapping[str, Tree]) -> ClientTask:
        purpose = f"training {dispatch.repeat}" if dispatch.repeat else "training"
        seed = seed_for(self.settings.seed, dispatch.version, dispatch.client_id, purpose)
        work = replace(dispatch.work, step_offset=step_offset) if step_offset else dispatch.work
        return ClientTask(dispatch.client_id, round, dispatch.dispatch_id, broadcast, seed, work)

    # ---- how much work that is ---------------------------------------------------------------------------------

    def num_steps(self, client_id: ClientId, work: Work) -> int:
        """Return how many optimizer steps some work is, by the length of the client's loader."""
        if work.steps is not None:
            return work.steps
        loader = client_id, work.batch_size
        if loader not in self._lengths:
            try:
                self._lengths[loader] = sized_len(self.population.client_dataloader(*loader))
            except Exception:  # a loader that cannot be opened is the client's failure, and named when it trains
                self._lengths[loader] = None
        batches = self._lengths[loader]
        limit = self.limits.get("overfit_batches") or self.limits.get("limit_train_batches")
        if batches is not None and limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        elif batches is None:
            batches = limit if isinstance(limit, int) else 1
        return (work.epochs or 1) * math.ceil(batches / (self.limits.get("accumulate_grad_batches") or 1))

    def estimated_work(self, client_id: ClientId, work: Work) -> float:
        """Return how much work a client has, for lanes of about equal length."""
        if work.steps is not None:
            return float(work.steps)
        try:
            size = self.population.client_size(client_id) or 1
        except Exception:  # a loader that cannot be opened is the client's failure, and named when it trains
            size = 1
        return float(size * (work.epochs or 1))

    # ---- what lasts --------------------------------------------------------------------------------------------

    def keep_versions(self, plan: Plan) -> None:
        """Forget the versions that no client in flight trains from."""
        needed = {dispatch.version for dispatch in plan.in_flight}
        self.versions = {version: sent for version, sent in self.versions.items() if version in needed}

    def learn(self, deliveries: Sequence[Delivery], num_bytes_down: int, downloads: int) -> Mapping[str, float]:
        """Look at what came back: the schedule learns from it, and later rounds take its bytes for granted."""
        assert self._plan is not None
        sent = [delivery.num_bytes_up for delivery in deliveries if delivery.failure is None]
        if sent:
            self.bytes_up = round(sum(sent) / len(sent))
        if downloads:
            self.bytes_down = round(num_bytes_down / downloads)
        if isinstance(self.sampler, Sampler):
            self.sampler.learn(self._plan, deliveries)
        return self.schedule.learn(self._plan, deliveries)

    def uploads_in_vain(self, delivered: Sequence[Delivery]) -> Counter[ClientId]:
        """Return the bytes of reports that arrived and are not summed: as many each as the others have on average."""
        assert self._plan is not None
        sizes = [delivery.num_bytes_up for delivery in delivered]
        mean = round(sum(sizes) / len(sizes)) if sizes else self.bytes_up
        return Counter({client_id: mean * times for client_id, times in Counter(self._plan.in_vain).items()})

    @property
    def min_reports(self) -> int:
        """Fewest updates that make this round, as its schedule has it."""
        return 0 if self._plan is None else self._plan.min_reports

    def commit(self) -> None:
        """Make the state of the round that just ended the one that a checkpoint holds."""
        self._committed = self._state()

    def count_steps(self, num_steps: Iterable[tuple[ClientId, int]]) -> None:
        """Advance clients' step counts."""
        for client_id, steps in num_steps:
            self.client_steps[client_id] = self.client_steps.get(client_id, 0) + steps

    def count_bytes(self, way: Literal["down", "up"], num_bytes: Iterable[tuple[ClientId, int]]) -> None:
        """Add to what clients have downloaded, or answered, since their last report."""
        counted = self.client_downloads if way == "down" else self.client_uploads
        for client_id, size in num_bytes:
            counted[client_id] = counted.get(client_id, 0) + size

    def _state(self) -> dict[str, Any]:
        return {
            "num_dispatched": self.num_dispatched,
            "clock": self.clock,
            "bytes": [self.bytes_down, self.bytes_up],
            "schedule": {type(self.schedule).__name__: self.schedule.state_dict()},
            "sampler": {type(self.sampler).__name__: _state_of(self.sampler)},
            "versions": dict(self.versions),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as it was after the last committed round.

        Every version in flight is in it once, however many clients train from it. Versions never change, so they are
        not copied.
        """
        state = dict(self._committed or self._state())
        own = {part: copy.deepcopy(state[part]) for part in ("schedule", "sampler")}
        logged = ("client_steps", "client_downloads", "client_uploads")
        return {**state, **own, **{name: dict(getattr(self, name)) for name in logged}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint's state, with its tensors on this process's device."""
        self.num_dispatched, self.clock = state["num_dispatched"], state.get("clock", 0.0)
        self.bytes_down, self.bytes_up = state.get("bytes", [self.bytes_down, self.bytes_up])
        self.client_steps = dict(state["client_steps"])
        self.client_downloads = dict(state.get("client_downloads", {}))
        self.client_uploads = dict(state.get("client_uploads", {}))
        self.versions = dict(state.get("versions", {}))
        for part in ("schedule", "sampler"):
            self._load(part, getattr(self, part), state.get(part, {}))
        self._committed = self._state()

    def _load(self, part: str, now: Schedule | Sampler, saved: Mapping[str, Any]) -> None:
        for name, own in saved.items():
            if name == type(now).__name__ and own:
                now.load_state_dict(copy.deepcopy(own))
            elif own:
                raise MisconfigurationException(
                    f"The checkpoint was written with {part}={name}(...), and this trainer runs "
                    f"{type(now).__name__}. Resume with the checkpoint's {part}."
                )


def _state_of(sampler: Any) -> dict[str, Any]:
    """Whatever has ``cohort`` may be a sampler; only a subclass of ours can learn."""
    return sampler.state_dict() if isinstance(sampler, Sampler) else {}
