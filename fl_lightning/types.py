"""The words of the house as types: tasks, work, updates, contributions, reports.

Everything that crosses the border between server and client is built from tensors and primitives, so that it can be
written as bytes without pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

__all__ = [
    "Arrival",
    "ClientId",
    "ClientTask",
    "ClientUpdate",
    "Contribution",
    "Memory",
    "Phase",
    "Population",
    "RoundReport",
    "Tree",
    "Work",
]

ClientId: TypeAlias = str | int
Tree: TypeAlias = Mapping[str, Tensor]
"""Named tensors: parameters, buffers, an update or a gradient."""
Memory: TypeAlias = dict[str, Any]
"""What a client keeps between rounds: nested dictionaries and lists of tensors and primitives."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much a client is asked to do in one round.

    Args:
        epochs: passes over the client's data; ``None`` when ``steps`` counts.
        steps: optimizer steps; ``None`` when ``epochs`` counts.
        lr_factor: factor on the client's own learning rates (``client_lr_schedule``).
        lr: replaces the client's own learning rate before the factor (``client_overrides``); ``None`` keeps it.
        batch_size: replaces the batch size of the client's loader; ``None`` keeps it.
        deadline: seconds on the fleet's clock after which the client's report is late; ``None`` waits for ever.
        partial: whether ``steps`` is less than the whole work, as a deadline leaves it.
        step_offset: steps that the client took in earlier rounds, where its curve goes on.
        width: part of every hidden layer that the client trains, in (0, 1]; less than 1 needs ``HeteroFL``.
    """

    epochs: int | None = 1
    steps: int | None = None
    lr_factor: float = 1.0
    lr: float | None = None
    batch_size: int | None = None
    deadline: float | None = None
    partial: bool = False
    step_offset: int = 0
    width: float = 1.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One local training of a round; most algorithms have one, personalisation has two.

    Args:
        name: shown in errors and used in seeds.
        trainable: name patterns (``fnmatch``) of the parameters that this phase trains; ``None`` trains all.
        frozen: name patterns of the parameters that this phase leaves as they are, among those of ``trainable``.
        epochs: overrides the task's epochs in this phase.
        callbacks: "algorithm" runs the algorithm's client callbacks, "none" runs plain local training.
        start: "broadcast" starts from what the server sent, "personal" from the client's own model in its memory,
            "previous" from where the phase before ended.
        report: whether this phase's update, steps and metrics are the ones that are reported.
        keep: name under which the model after this phase (parameters, running statistics, and what stays with the
            client) goes to ``update.extra``; ``None`` keeps nothing.
    """

    name: str = "train"
    trainable: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    epochs: int | None = None
    callbacks: Literal["algorithm", "none"] = "algorithm"
    start: Literal["broadcast", "personal", "previous"] = "broadcast"
    report: bool = True
    keep: str | None = None


@dataclass(frozen=True, slots=True)
class ClientTask:
    """One order of work to one client.

    Args:
        client_id: the client, as ``client_ids()`` gave it.
        round: 0-based round.
        dispatch_id: unique in the federation; asynchronous schedules may send one client twice in a version.
        broadcast: named trees from the server: ``"model"`` holds the trainable parameters, ``"buffers"`` the buffers
            that travel, other names belong to the algorithm.
        seed: root of everything random in this client's round.
        work: how much to do.
    """

    client_id: ClientId
    round: int
    dispatch_id: int
    broadcast: Mapping[str, Tree]
    seed: int
    work: Work = field(default_factory=Work)


@dataclass(slots=True)
class ClientUpdate:
    r"""What local training made of a task.

    Args:
        client_id: who trained.
        delta: ``local - global`` for every parameter that travels.
        buffers: values of the buffers that travel, after training.
        num_examples: size of the client's training data in examples (what FedAvg weighs by).
        num_steps: optimizer steps that really happened.
        a_norm: FedNova's :math:`\|a\|_1`, when a ``StepCounter`` ran.
        status: ``"partial"`` when the client stopped before its work was done.
        metrics: the mergeable sums of what the module logged (``fl_lightning.metrics.MetricSums``).
        extra: what the algorithm's own client callbacks hand over (start loss, start gradient, new control variate).
        memory: what the loop itself keeps for the client's next round (optimizer state, local BatchNorm).
        norm: Euclidean norm of ``delta``, when the loop has measured it already.
    """

    client_id: ClientId
    delta: Tree
    buffers: Tree
    num_examples: int
    num_steps: int
    a_norm: float | None = None
    status: Literal["complete", "partial"] = "complete"
    metrics: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    norm: float | None = None


@dataclass(slots=True)
class Contribution:
    """One client's summand: named trees and named scalars, every one of which is summed over the cohort.

    Args:
        trees: for FedAvg ``{"delta": w * delta, "buffers": w * buffers}``.
        scalars: for FedAvg ``{"weight": w}``.
    """

    trees: dict[str, Tree] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrival:
    """When an update reached the server, seen from where its client had started.

    Args:
        staleness: rounds between the model that the client was sent and the one that the server has now.
        sent: the broadcast that the client trained from.
        now: what the server has now, as ``"model"`` and ``"buffers"``.
        client_id: whose update it is.
    """

    staleness: int = 0
    sent: Mapping[str, Tree] = field(default_factory=dict)
    now: Mapping[str, Tree] = field(default_factory=dict)
    client_id: ClientId | None = None


@dataclass(slots=True)
class RoundReport:
    """What happened in one round; ``trainer.round_history`` holds one for each.

    Args:
        round: 0-based round.
        cohort: the clients whose contributions are in the sum, in the order of the cohort.
        num_examples: training examples of the cohort.
        num_steps: optimizer steps of the cohort.
        seconds: wall-clock seconds from the broadcast to the server's step.
        num_bytes_down: bytes of the encoded broadcast, summed over the clients that got it, and of the model for each
            client that a sampler asked before.
        num_bytes_up: bytes of the encoded payloads that came back, and of the answers to what a sampler asked before.
        metrics: client training metrics combined over the cohort, ``clients/<name>`` from ``evaluate_clients``, and
            what the server's validation logged.
        dropped: clients that did not deliver, with the reason.
        skipped: clients whose update was refused, with the reason (``on_bad_update="skip"``).
    """

    round: int
    cohort: list[ClientId]
    num_examples: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    num_bytes_down: int = 0
    num_bytes_up: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    dropped: dict[ClientId, str] = field(default_factory=dict)
    skipped: dict[ClientId, str] = field(default_factory=dict)


@runtime_checkable
class Population(Protocol):
    """All clients, lazily. Ids may be any sequence (``range(10**6)`` included) and may change between rounds."""

    def client_ids(self) -> Sequence[ClientId]:
        """Return the ids of the clients that exist now."""

    def client_dataloader(self, client_id: ClientId) -> Iterable[Any]:
        """Return what the client trains on: anything that Lightning accepts as a train loader."""
