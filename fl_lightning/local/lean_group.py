"""A group of clients in one training: ``vmap`` over stacked parameters, batches and optimizer state.

Each client makes the steps it would make alone, on the same batches in the same order. Clients with batches of equal
size go together, so nothing is padded: in an epoch first all full batches, then the last ones, by their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap

from fl_lightning.callbacks import StepCounter
from fl_lightning.callbacks.base import ClientCallback, GradientCorrection
from fl_lightning.local.job import Outcome
from fl_lightning.local.lean_client import Facts, configure
from fl_lightning.local.lean_group_attacks import forge
from fl_lightning.local.lean_group_corrections import Corrections
from fl_lightning.local.lean_group_data import GroupData, Member
from fl_lightning.local.lean_group_linear import FusedLinears, plain_sgd, step_weight
from fl_lightning.local.lean_group_log import GroupLog, Tick
from fl_lightning.local.lean_stack import CannotGroup, Rate, Rates, Rows, StackedOptimizer, put, stacked, take, trained
from fl_lightning.local.lean_trainer import LeanTrainer, Progress
from fl_lightning.local.recorder import ClientLogger
from fl_lightning.tree import norm
from fl_lightning.types import ClientUpdate, Tree

__all__ = ["Group"]


class Group:
    """Trains some clients at once.

    Args:
        facts: what is the same for all clients; its module is as good as new and holds the broadcast model.
        members: the clients.
        uses_index: whether ``training_step`` looks at the index of a batch, so that only clients with equal indices go
            together.
        log_every: ``log_every_n_steps``.
        fuses: whether plain SGD steps the weights of linear layers within the backward pass, where that is possible.
    """

    def __init__(
        self, facts: Facts, members: Sequence[Member], uses_index: bool, log_every: int, fuses: bool = True
    ) -> None:
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
        self._trainer = GroupTrainer(self._progress, facts)
        self.module.trainer = self._trainer  # type: ignore[assignment]
        vars(self.module)["log"] = self.log.log
        self._optimizer, configs = self._configure()
        self._rates = self._rate_tables()
        names = {id(p): name for name, p in self.module.named_parameters()}
        order = trained(self._optimizer)
        self._names = [names[id(p)] for p in order]
        groups = self._optimizer.param_groups
        self._group_of = [i for i, group in enumerate(groups) for p in group["params"] if p.requires_grad]
        self._start = [p.detach().clone() for p in order]
        self._corrections = Corrections.of(members, facts.module)
        linears = FusedLinears.of(self.module, self._names)
        fuses = fuses and plain_sgd(self._optimizer) and not self._corrections.templates and not facts.clip
        self._fused = linears if fuses else FusedLinears({})
        self._places = [(name, self._names.index(name)) for name in self._fused.parts]
        self._rest = [name for name in self._names if name not in self._fused.parts]
        turned = linears.parts.keys() - self._fused.parts.keys()
        self.params = [
            stacked(p.detach(), len(members), turned=name in turned) for name, p in zip(self._names, order, strict=True)
        ]
        self._begin_with_own_layers()
        self._stacked = StackedOptimizer(self._optimizer, self.params)
        self._losses = vmap(self._loss, randomness="different")
        self._wrapper = _Step(self.module)
        self._interval = configs[0] if configs else None
        self._data = GroupData(members)

    # ---- before ------------------------------------------------------------------------------------------------

    def _configure(self) -> tuple[torch.optim.Optimizer, list[Any]]:
        optimizers, configs = configure(self.module)
        return optimizers[0], configs

    def _begin_with_own_layers(self) -> None:
        """Let layers that stay with their client start from what the client remembers, if it does."""
        for row, member in enumerate(self.members):
            for name in member.local.keys() & set(self._names):
                self.params[self._names.index(name)][row].copy_(member.local[name])

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
        loss, *_ = self._loss({}, [tensor[0] for tensor in batch])
        order = trained(self._optimizer)
        for name, grad in zip(self._names, torch.autograd.grad(loss, order, allow_unused=True), strict=True):
            if grad is None:
                raise CannotGroup(f"its parameter {name!r} gets no gradient")

    def saved_bytes(self) -> int:
        """Return what one step of one client keeps for its backward pass, beside the parameters."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = self._data.batch(1, 0, self.members[0].sizes(0)[0])
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, *_ = self._loss({}, [tensor[0] for tensor in batch])
        del loss  # until here nothing it saved could give its place to something else
        own = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        return sum(size for place, size in kept.items() if place not in own)

    # ---- training ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run every client to its end."""
        self.log.keep_ticks = any(member.job.logged for member in self.members)
        before = [(buffer, buffer._version) for buffer in self.module.buffers()]
        sizes = [member.sizes(0) for member in self.members]
        with self._fused.forwards():
            while any(sizes):
                self._progress.epoch = self._epoch
                active = [row for row, mine in enumerate(sizes) if mine]
                self.log.begin_epoch(torch.tensor(active))
                self._data.begin_epoch(self._epoch, active)
                self._run_epoch(sizes)
                self._epoch += 1
                sizes = [member.sizes(self._epoch) for member in self.members]
        now = [(buffer, buffer._version) for buffer in self.module.buffers()]
        if len(now) != len(before) or any(a is not b or v != w for (a, v), (b, w) in zip(before, now, strict=True)):
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
        rates = self._rates_at(which, indices, sizes)
        found, logged = self._gradients(params, batch, rates)
        if self._corrections.templates:
            named = dict(zip(self._names, params, strict=True))
            grads = self._corrections.apply(rows, named, dict(zip(self._names, found, strict=True)))
            found = [grads[name] for name in self._names]
        if self.facts.clip:
            found = _clipped(found, self.facts.clip, self.facts.clip_algorithm)
        self._stacked.step(rows, params, found, rates, [self._counts[r] for r in which])
        put(self.params, rows, params)
        for row in which:
            self._counts[row] += 1
        last = [index + 1 == len(sizes[row]) for row, index in zip(which, indices, strict=True)]
        self.log.absorb(Tick(rows, self._epoch, size, logged, last))

    def _gradients(
        self, params: list[Tensor], batch: list[Tensor], rates: Sequence[Rate]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Return each client's gradients, ``None`` for weights that have made their step, and what it logged.

        No client's loss depends on another one's parameters, so the gradient of their sum is everyone's own. Autograd
        outside of vmap walks back over plain batched tensors; vmap over ``torch.func.grad`` would go through its
        dispatcher for every operation of the backward pass as well.
        """
        leaves = {n: p.detach().requires_grad_() for n, p in zip(self._names, params, strict=True)}
        losses, logged, kept = self._losses(leaves, batch)
        if not self._fused.parts:
            return list(torch.autograd.grad(losses.sum(), list(leaves.values()))), logged
        loss = losses.sum()
        outputs = self._fused.outputs(loss, leaves, kept)
        found = torch.autograd.grad(loss, [*outputs, *(leaves[name] for name in self._rest)])
        for (name, at), grad in zip(self._places, found, strict=False):
            group = self._group_of[at]
            decay = self._optimizer.param_groups[group]["weight_decay"]
            step_weight(params[at], kept[name][0], grad, rates[group], decay)
        grads = dict(zip(self._rest, found[len(outputs) :], strict=True))
        return [grads.get(name) for name in self._names], logged

    def _loss(self, params: Tree, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor], Any]:
        arguments = (batch, self._index) if self.facts.takes_index else (batch,)
        self.log.begin()
        self._fused.begin()
        output = functional_call(self._wrapper, {f"module.{name}": p for name, p in params.items()}, arguments)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise CannotGroup("training_step returned no loss")
        return loss.reshape(()), self.log.logged(), self._fused.kept()

    def _rates_at(self, which: list[int], indices: list[int], sizes: Sequence[list[int]]) -> list[float | Tensor]:
        with self._trainer.scheduling():
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
        stay = {name: p for name, p in zip(self._names, self.params, strict=True) if name in settings.local_names}
        if len(stay) < len(settings.local_names):
            raise CannotGroup("a layer that stays with its client is not among the optimizer's")
        parts = zip(self._names, self.params, self._start, strict=True)
        moves = {name: _moved(p, s) for name, p, s in parts if name not in stay}
        self.params = []
        norms = _norms(list(moves.values()))
        columns = {name: move.unbind(0) for name, move in moves.items()}
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
            trained = {n: columns[n][row] if n in columns else still[n] for n in settings.parameter_names}
            delta = forge(trained, member.callbacks)
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
                memory={"local": {name: p[row].clone() for name, p in stay.items()}} if stay else {},
                norm=norms[row] if delta is trained else norm(delta),
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
                counter.count(self._optimizer)  # every member had a gradient in each of its steps
            self._epoch = now
        counter.unwatch()


def _moved(params: Tensor, start: Tensor) -> Tensor:
    """Return what clients add to the model, in the layout of the model whatever that of the stack is."""
    if params.is_contiguous():
        return params.sub_(start)
    return torch.sub(params, start, out=torch.empty(params.shape, dtype=params.dtype))


def _norms(moves: Sequence[Tensor]) -> list[float]:
    """Return the norm of each client's update, of all its parameters together."""
    parts = [torch.linalg.vector_norm(move.flatten(1), dim=1) for move in moves]
    found: list[float] = torch.stack(parts).double().norm(dim=0).tolist()
    return found


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
        super().__init__(progress, [], [], facts.device, facts.precision)
        vars(self)["_schedules"] = False

    @contextmanager
    def scheduling(self) -> Iterator[None]:
        """While schedulers step, for whoever comes first to a count, there is no epoch: clients get there in others."""
        vars(self)["_schedules"] = True
        try:
            yield
        finally:
            vars(self)["_schedules"] = False

    @property
    def current_epoch(self) -> int:
        if vars(self)["_schedules"]:
            self._refuse()
        return self._own.epoch

    def _refuse(self) -> Any:
        self._own.refuse("it looks at something of self.trainer that differs from client to client")

    global_step = is_last_batch = num_training_batches = estimated_stepping_batches = property(_refuse)
    logger = loggers = optimizers = lr_scheduler_configs = callbacks = property(_refuse)


def _clipped(grads: list[Tensor], clip: float, algorithm: Any) -> list[Tensor]:
    if algorithm == GradClipAlgorithmType.VALUE:
        return [grad.clamp(-clip, clip) for grad in grads]
    norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads])
    factors = (clip / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)  # one for each client
    return [grad * factors.view(-1, *[1] * (grad.ndim - 1)) for grad in grads]
