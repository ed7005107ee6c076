"""Who of a lane trains at once, and what becomes of clients that cannot.

What is learned while clients train (a weight is used twice, a step looks at its index) holds until the end of the lane:
the next lane may run in another process, or after a resume, and has to find out by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fl_lightning.local.job import Job, Outcome
from fl_lightning.local.lean_data import TensorBatches, batches_of
from fl_lightning.local.lean_group import Group
from fl_lightning.local.lean_group_attacks import poison
from fl_lightning.local.lean_group_data import Member
from fl_lightning.local.lean_group_linear import CannotFuse
from fl_lightning.local.lean_grouping import chunks, too_long
from fl_lightning.local.lean_stack import CannotGroup
from fl_lightning.local.lean_trainer import NeedsResults, NotPlain, NotThisClient
from fl_lightning.local.lightning_loop import ClientRun
from fl_lightning.local.quiet import as_rank_zero
from fl_lightning.local.worker import load_tensors
from fl_lightning.metrics import alone
from fl_lightning.seeding import forked_rng, rng_states
from fl_lightning.tree import norm
from fl_lightning.types import ClientUpdate, Phase, Tree

if TYPE_CHECKING:
    from fl_lightning.local.lean_loop import LeanLoop

__all__ = ["Together"]

_ALIKE = 2e-3
"""Of an update's norm: far above what rounding does in a round, far below what other random numbers do."""


class Together:
    """Trains clients of one lane in groups.

    Args:
        loop: trains a client by itself.
        size: clients of a group at most.
        reason: why none can be formed, or ``None``.
    """

    def __init__(self, loop: LeanLoop, size: int, reason: str | None) -> None:
        self.loop = loop
        self.size = size
        self.reason = reason
        self.trouble: str | None = None
        """Why the last group that failed did; unlike ``reason`` it does not keep the next group from trying."""
        self.fuses = True
        self._uses_index = False
        self._lasting = reason
        self._checked = self._compared = self._said = False
        self._bytes: dict[Any, int] = {}

    def begin(self) -> None:
        """A lane begins."""
        self.reason, self.trouble = self._lasting, None
        self.fuses, self._uses_index = True, False

    def run(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        """Return the outcomes of the jobs that could train together, by position."""
        done: dict[int, Outcome] = {}
        with forked_rng(jobs[0].task.seed), as_rank_zero(), alone(), torch.enable_grad():
            opened = [self._member(job) for job in jobs]
            members = {position: member for position, member in enumerate(opened) if member is not None}
            positions, found = list(members), list(members.values())
            sizes = [member.num_bytes() + self._batch_bytes(member) for member in found]
            for chunk in chunks([member.key() for member in found], sizes):
                together = [positions[i] for i in self._fitting(chunk, found)]
                if len(together) > 1 and self.reason is None:
                    outcomes = self._train([members[position] for position in together])
                    done.update(zip(together, outcomes, strict=False))
        return done

    def _fitting(self, chunk: list[int], found: Sequence[Member]) -> list[int]:
        """Return those of a chunk that are worth a group; whoever asks for a ``group_size`` gets it."""
        if self.loop.settings.group_size != "auto":
            return chunk
        steps = {i: found[i].num_steps() for i in chunk}
        alone = sorted(chunk, key=lambda i: -steps[i])[: too_long([*steps.values()])]
        return [i for i in chunk if i not in alone]

    def _member(self, job: Job) -> Member | None:
        """Open a client for a group, or return ``None`` when it has to train by itself."""
        loop = self.loop
        phases = loop.algorithm.phases(job.task)
        if phases != [Phase(name=phases[0].name)]:
            return None
        try:
            data = job.data()
            batches = None if data.validates else batches_of(data.train, loop.trainer.limit_train_batches)
            if not isinstance(batches, TensorBatches) or not batches.sizes():
                return None
            memory = job.memory()
            callbacks = ClientRun(loop, job.task, data, memory, None).callbacks(phases[0])
            poison(batches, callbacks)
        except (Exception, NotThisClient):
            return None  # its fault shows when it trains by itself
        num_examples = sum(batches.sizes()) if data.num_examples is None else data.num_examples
        return Member(job, batches, callbacks, num_examples, memory.get("local", {}))

    def _batch_bytes(self, member: Member) -> int:
        """Return what a client's step keeps for its backward pass; a group keeps that of all its clients."""
        key = member.key()[2:4]
        if key not in self._bytes:
            try:
                self._load(member)
                with forked_rng(member.job.task.seed):
                    self._bytes[key] = Group(self.loop.facts, [member], True, 1, fuses=False).saved_bytes()
            except (Exception, NotPlain, NeedsResults):
                self._bytes[key] = 0  # the reason shows when the group trains
        return self._bytes[key]

    def _load(self, member: Member) -> None:
        loop = self.loop
        loop.worker.restore()
        load_tensors(loop.worker.module, [loop.settings.static, member.job.task.broadcast["model"]])

    # ---- one group ----------------------------------------------------------------------------------------------

    def _train(self, members: Sequence[Member]) -> list[Outcome]:
        """Train some clients at once, or one by one when that is not the same."""
        try:
            try:
                outcomes = self._fused_or_not(members)
            except (Exception, NotPlain):
                if self._uses_index or not self.loop.facts.takes_index:
                    raise
                self._uses_index = True  # the index of the batch was in the way, or something else is
                outcomes = self._fused_or_not(members)
            self._compare(members[-1], outcomes[-1].update)
            return outcomes
        except (CannotGroup, NotPlain, NeedsResults) as error:
            return self._one_by_one(members, str(error) or "it logs in its hooks", for_good=True)
        except Exception as error:
            # perhaps it depends on the data: the next group tries again
            first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            return self._one_by_one(members, f"{type(error).__name__}: {first_line}", for_good=False)

    def _one_by_one(self, members: Sequence[Member], reason: str, for_good: bool) -> list[Outcome]:
        outcomes = [self.loop.run_one(member.job) for member in members]
        if any(outcome.error for outcome in outcomes):
            return outcomes  # it was a client's fault
        if for_good:
            self.reason = reason
        if not self._said and self.loop.reason is None:
            self._said = True
            rank_zero_info(
                f"Clients train one by one in LeanLoop: {reason}. With group_size=1 no group is tried; "
                "group_size=N also groups modules that draw random numbers."
            )
        self.trouble = reason
        return outcomes

    def _fused_or_not(self, members: Sequence[Member]) -> list[Outcome]:
        if self.fuses:
            try:
                return self._at_once(members)
            except (CannotFuse, RuntimeError):
                # a weight was needed after its step, or something else is wrong, which shows again with whole gradients
                self.fuses = False
                try:
                    return self._at_once(members)
                except BaseException:
                    self.fuses = True
                    raise
        return self._at_once(members)

    def _at_once(self, members: Sequence[Member]) -> list[Outcome]:
        loop = self.loop
        self._load(members[0])
        group = Group(loop.facts, members, self._uses_index, loop.trainer._log_every, self.fuses)
        if not self._checked:
            with forked_rng(members[0].job.task.seed):  # who trains first must not draw other numbers than who is later
                group.check()
            self._checked = True
        before = rng_states()
        group.train()
        self._refuse_draws(before)
        changed = loop.worker.changed()
        if changed is not None:
            raise CannotGroup(f"training_step changes {changed!r} of the module, which is one for all of a group")
        return group.outcomes(loop.settings)

    def _refuse_draws(self, before: dict[str, Any]) -> None:
        now = rng_states()
        if before["python"] != now["python"] or not np.array_equal(before["numpy"][1], now["numpy"][1]):
            raise CannotGroup("training_step draws from random or NumPy, which would be one number for all of a group")
        if before["numpy"][2:] != now["numpy"][2:]:
            raise CannotGroup("training_step draws from NumPy, which would be one number for all of a group")
        if self.loop.settings.group_size == "auto" and not torch.equal(before["torch"], now["torch"]):
            raise CannotGroup("training_step draws random numbers, which are others in a group")

    def _compare(self, member: Member, grouped: ClientUpdate | None) -> None:
        """Let one client of the first group train alone too: nothing but rounding may be between the two.

        Raises:
            CannotGroup: when there is more, whatever in the module or in ``vmap`` makes it.
        """
        if self._compared or self.loop.settings.group_size != "auto" or grouped is None:
            return
        self._compared = True
        update = self.loop.run_one(member.job).update
        if update is not None and not _alike(update.delta, grouped.delta, member.job.task.broadcast["model"]):
            self._lasting = "a group gives something else than its clients give alone"
            raise CannotGroup(self._lasting)


def _alike(own: Tree, grouped: Tree, start: Tree) -> bool:
    whole = norm(own)
    for name, delta in own.items():
        allowed = _ALIKE * float(delta.norm()) + 1e-6 * (float(start[name].norm()) + whole)
        if float((delta - grouped[name]).norm()) > allowed:
            return False
    return True
