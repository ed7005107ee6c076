"""A group of clients in one training: ``vmap`` over stacked parameters, batches and optimizer state.

Each client makes the steps it would make alone, on the same batches in the same order. Clients with batches of equal
size go together, so nothing is padded: in an epoch first all full batches, then the last ones, by their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fl_lightning.callbacks import StepCounter
from fl_lightning.callbacks.base import ClientCallback, GradientCorrection
from fl_lightning.local.job import Job, Outcome
from fl_lightning.local.lean_client import Facts, configure
from fl_lightning.local.lean_data import TensorBatches
from fl_lightning.local.lean_group_log import GroupLog, Tick
from fl_lightning.local.lean_stack import CannotGroup, Rates, Rows, StackedOptimizer, put, take
from fl_lightning.local.lean_trainer import LeanTrainer, Progress
from fl_lightning.local.recorder import ClientLogger
from fl_lightning.types import ClientUpdate, Tree

__all__ = ["Group", "Member"]


@dataclass(slots=True)
class Member:
    """One client of a group: its job, its data and its own copies of the callbacks."""

    job: Job
    batches: TensorBatches
    callbacks: list[Callback]
    num_examples: int

    def sizes(self, epoch: int) -> list[int]:
        """Return the sizes of the batches of an epoch that the client gets to."""
        work, sizes = self.job.task.work, self.batches.sizes()
        if work.steps is not None:
            return sizes[: max(0, work.steps - epoch * len(sizes))]
        return sizes if epoch < (work.epochs or 0) else []

    def key(self) -> tuple[Any, ...]:
        """Return what clients of one group have in common."""
        task, batches = self.job.task, self.batches
        kinds = tuple((tensor.dtype, tensor.shape[1:]) for tensor in batches.tensors)
        return task.work.epochs, task.work.steps, batches.batch_size, kinds, id(task.broadcast["model"])


class Group:
    """Trains some clients at once.

    Args:
        facts: what is the same for all clients; its module is as good as new and holds the broadcast model.
        members: the clients.
        uses_index: whether ``training_step`` looks at the index of a batch, so that only clients with equal indices go
            together.
        log_every: ``log_every_n_steps``.
    """

    def __init__(self, facts: Facts, members: Sequence[Member], uses_index: bool, log_every: int) -> None:
        self.facts = facts
        self.module = facts.module
        self.members = members
        self.log = GroupLog(len(members))
        self._uses_index = uses_index
        self._log_every = log_every
        self._epoch = 0
        self._index: Any = 0 if uses_index else _Index()
        self._counts = [0] * len(members)
        self._progress = Progress()
        self.module.trainer = GroupTrainer(self._progress, facts)  # type: ignore[assignment]
        vars(self.module)["log"] = self.log.log
        self._optimizer, configs = self._configure()
        self._rates = self._rate_tables()
        names = {id(p): name for name, p in self.module.named_parameters()}
        order = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._names = [names[id(p)] for p in order]
        self._start = [p.detach().clone() for p in order]
        self.params = [p.expand(len(members), *p.shape).clone() for p in self._start]
        self._stacked = StackedOptimizer(self._optimizer, self.params)
        self._corrections = _Corrections.of(members, facts.module)
        self._step = vmap(grad_and_value(self._loss, has_aux=True), randomness="different")
        self._wrapper = _Step(self.module)
        self._interval = configs[0] if configs else None
        self._data = _GroupData(members)

    # ---- before ------------------------------------------------------------------------------------------------

    def _configure(self) -> tuple[torch.optim.Optimizer, list[Any]]:
        optimizers, configs = configure(self.module)
        return optimizers[0], configs

    def _rate_tables(self) -> list[Rates]:
        tables: dict[tuple[float, float | None], Rates] = {}
        for member in self.members:
            work = member.job.task.work
            if (work.lr_factor, work.lr) not in tables:
                tables[work.lr_factor, work.lr] = Rates(*self._configure(), work.lr_factor, work.lr)
        return [tables[m.job.task.work.lr_factor, m.job.task.work.lr] for m in self.members]

    def check(self) -> None:
        """Look at one batch of one client, alone, for what a group would silently do otherwise.

        Raises:
            CannotGroup: for a parameter without a gradient, which an optimizer leaves out and a group would not.
        """
        batch = self._data.batch(1, 0, self.members[0].sizes(0)[0])
        loss, _ = self._loss({}, [tensor[0] for tensor in batch])
        order = [p for group in self._optimizer.param_groups for p in group["params"]]
        for name, grad in zip(self._names, torch.autograd.grad(loss, order, allow_unused=True), strict=True):
            if grad is None:
                raise CannotGroup(f"its parameter {name!r} gets no gradient")

    # ---- training ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run every client to its end."""
        self.log.keep_ticks = any(member.job.logged for member in self.members)
        versions = [buffer._version for buffer in self.module.buffers()]
        sizes = [member.sizes(0) for member in self.members]
        while any(sizes):
            self._progress.epoch = self._epoch
            active = [row for row, mine in enumerate(sizes) if mine]
            self.log.begin_epoch(torch.tensor(active))
            self._data.begin_epoch(self._epoch, active)
            self._run_epoch(sizes)
            self._epoch += 1
            sizes = [member.sizes(self._epoch) for member in self.members]
        if versions != [buffer._version for buffer in self.module.buffers()]:
            raise CannotGroup("training_step writes to its buffers")

    def _run_epoch(self, sizes: Sequence[list[int]]) -> None:
        full = max(mine[0] for mine in sizes if mine)
        waiting: dict[tuple[int, int], list[int]] = {}
        longest = max(len(mine) for mine in sizes)
        for index in range(longest):
            rows = []
            for row, mine in enumerate(sizes):
                if index < len(mine) and mine[index] == full:
                    rows.append(row)
                elif index < len(mine):  # an incomplete last batch: after everyone's full ones
                    waiting.setdefault((mine[index], index if self._uses_index else -1), []).append(row)
            if rows:
                self._tick(rows, full, [index] * len(rows), sizes)
        for (size, _), rows in sorted(waiting.items()):
            self._tick(rows, size, [len(sizes[row]) - 1 for row in rows], sizes)

    def _tick(self, which: list[int], size: int, indices: list[int], sizes: Sequence[list[int]]) -> None:
        rows: Rows = len(which) if which[-1] == len(which) - 1 else torch.tensor(which)
        if self._uses_index:
            self._index = indices[0]
        begin = indices[0] if len(set(indices)) == 1 else torch.tensor(indices)
        batch = self._data.batch(rows, begin, size)
        params = take(self.params, rows)
        named = dict(zip(self._names, params, strict=True))
        self.log.begin()
        grads, (_, logged) = self._step(named, batch)
        grads = self._corrections.apply(rows, named, grads)
        found = [grads[name] for name in self._names]
        if self.facts.clip:
            found = _clipped(found, self.facts.clip, self.facts.clip_algorithm)
        self._stacked.step(rows, params, found, self._rates_at(which, indices, sizes), [self._counts[r] for r in which])
        put(self.params, rows, params)
        for row in which:
            self._counts[row] += 1
        last = [index + 1 == len(sizes[row]) for row, index in zip(which, indices, strict=True)]
        self.log.absorb(Tick(rows, self._epoch, size, logged, last))

    def _loss(self, params: Tree, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        arguments = (batch, self._index) if self.facts.takes_index else (batch,)
        self.log.begin()
        output = functional_call(self._wrapper, {f"module.{name}": p for name, p in params.items()}, arguments)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise CannotGroup("training_step returned no loss")
        return loss.reshape(()), self.log.logged()

    def _rates_at(self, which: list[int], indices: list[int], sizes: Sequence[list[int]]) -> list[float | Tensor]:
        rates = [self._rates[row].at(self._scheduled(row, i)) for row, i in zip(which, indices, strict=True)]
        if len(set(rates)) == 1:
            return list(rates[0])
        return [torch.tensor(column, dtype=torch.float64) for column in zip(*rates, strict=True)]

    def _scheduled(self, row: int, index: int) -> int:
        """Return how often the client's scheduler has stepped before this batch."""
        config = self._interval
        if config is None:
            return 0
        frequency: int = config.frequency
        if config.interval == "step":
            per_epoch = len(self.members[row].batches.sizes()) // frequency
            return self._epoch * per_epoch + index // frequency
        return self._epoch // frequency

    # ---- after -------------------------------------------------------------------------------------------------

    def outcomes(self, settings: Any) -> list[Outcome]:
        """Return what became of the members, in their order."""
        torch._foreach_sub_(self.params, [start.unsqueeze(0) for start in self._start])
        columns = {name: delta.unbind(0) for name, delta in zip(self._names, self.params, strict=True)}
        own = dict(self.module.named_parameters())
        still = {n: torch.zeros_like(own[n]).detach() for n in settings.parameter_names if n not in columns}
        sums = self.log.sums()
        found = []
        for row, member in enumerate(self.members):
            logger = None
            if member.job.logged and settings.has_loggers:
                offset = member.job.task.work.step_offset
                logger = ClientLogger(True, settings.save_dir, step_offset=offset)
                self.log.replay(row, logger, offset, self._log_every)
            extra = self._reports(row)
            delta = {n: columns[n][row] if n in columns else still[n] for n in settings.parameter_names}
            update = ClientUpdate(
                member.job.task.client_id,
                delta,
                {},
                member.num_examples,
                self._counts[row],
                a_norm=extra.pop("a_norm", None),
                status="partial" if extra.pop("partial", member.job.task.work.partial) else "complete",
                metrics=sums[row],
                extra=extra,
            )
            found.append(Outcome(member.job, update, logger.take() if logger is not None else []))
        return found

    def _reports(self, row: int) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        for callback in self.members[row].callbacks:
            if isinstance(callback, GradientCorrection):
                callback.num_corrections = self._counts[row]
            elif isinstance(callback, StepCounter):
                self._recount(row, callback)
            if isinstance(callback, ClientCallback):
                extra.update(callback.report())
        return extra

    def _recount(self, row: int, counter: StepCounter) -> None:
        """Let a counter see the client's steps: the rates of each, in order."""
        counter.watch([self._optimizer])
        for epoch in range(self._epoch):
            self._epoch, now = epoch, self._epoch
            for index in range(len(self.members[row].sizes(epoch))):
                rates = self._rates[row].at(self._scheduled(row, index))
                for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                for hook in tuple(self._optimizer._optimizer_step_post_hooks.values()):
                    hook(self._optimizer, (), {})
            self._epoch = now
        counter.unwatch()


class _Step(nn.Module):
    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module.training_step(*arguments)


class _Index:
    """A batch index that nobody looked at yet: looking is an error, and the group is formed again by indices."""


class GroupTrainer(LeanTrainer):
    """The trainer of a group: it has no answer that would differ from client to client."""

    def __init__(self, progress: Progress, facts: Facts) -> None:
        super().__init__(progress, [], [], facts.device, facts.precision.precision)

    def _refuse(self) -> Any:
        self._own.refuse("it looks at something of self.trainer that differs from client to client")

    global_step = is_last_batch = num_training_batches = estimated_stepping_batches = property(_refuse)
    logger = loggers = optimizers = lr_scheduler_configs = callbacks = property(_refuse)


@dataclass(slots=True)
class _Corrections:
    """The members' gradient corrections, each one's own trees stacked."""

    templates: list[tuple[GradientCorrection, dict[str, tuple[list[str], list[Tensor]]]]]

    @classmethod
    def of(cls, members: Sequence[Member], module: nn.Module) -> _Corrections:
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
        for template, stacked in self.templates:
            own: dict[str, Tree] = {t: dict(zip(n, take(s, rows), strict=True)) for t, (n, s) in stacked.items()}
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


class _GroupData:
    """The members' examples in one place, and where each one's batches are.

    Shape:
        ``order``: ``(clients, longest epoch)``, positions in ``tensors``.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        whole = members[0].batches.tensors
        self._shared = all(
            len(m.batches.tensors) == len(whole) and all(a is b for a, b in zip(m.batches.tensors, whole, strict=True))
            for m in members
        )
        self._offsets = [0] * len(members)
        self.tensors: Sequence[Tensor] = whole
        if not self._shared:
            parts = [m.batches.own() for m in members]
            self.tensors = [torch.cat(column) for column in zip(*parts, strict=True)]
            for row, part in enumerate(parts[:-1]):
                self._offsets[row + 1] = self._offsets[row] + len(part[0])
        self._orders = [_orders(member, mapped=self._shared) for member in members]
        self.order = torch.empty(0, dtype=torch.int64)
        self.begin_epoch(0, range(len(members)))

    def begin_epoch(self, epoch: int, active: Sequence[int]) -> None:
        longest = max(len(self._orders[row][epoch]) for row in active)
        self.order = torch.zeros(len(self.members), longest, dtype=torch.int64)
        for row in active:
            mine = self._orders[row][epoch]
            self.order[row, : len(mine)] = mine + self._offsets[row] if self._offsets[row] else mine

    def batch(self, rows: Rows, index: int | Tensor, size: int) -> list[Tensor]:
        """Return batches of the rows, ``(rows, size, *example)``."""
        order = self.order[:rows] if isinstance(rows, int) else self.order.index_select(0, rows)
        full = self.members[0].batches.batch_size
        if isinstance(index, int):
            chosen = order[:, index * full : index * full + size]
        else:
            chosen = order.gather(1, (index * full).unsqueeze(1) + torch.arange(size))
        flat = chosen.reshape(-1)
        return [tensor.index_select(0, flat).reshape(*chosen.shape, *tensor.shape[1:]) for tensor in self.tensors]


def _orders(member: Member, mapped: bool) -> list[Tensor]:
    """Draw a client's orders of all epochs, as it draws them alone."""
    torch.default_generator.manual_seed(member.job.task.seed)
    orders: list[Tensor] = []
    while member.sizes(len(orders)):
        member.batches.skip_seed()
        orders.append(member.batches.positions() if mapped else member.batches.order())
    return orders


def _clipped(grads: list[Tensor], clip: float, algorithm: Any) -> list[Tensor]:
    if algorithm == GradClipAlgorithmType.VALUE:
        return [grad.clamp(-clip, clip) for grad in grads]
    norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads])
    factors = (clip / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)  # one for each client
    return [grad * factors.view(-1, *[1] * (grad.ndim - 1)) for grad in grads]
