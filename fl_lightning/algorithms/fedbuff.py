"""FedBuff: nobody waits for the slowest; the server steps whenever a buffer of updates is full."""

from __future__ import annotations

from functools import partial

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, Weights
from fl_lightning.algorithms.staleness import Staleness, StalenessWeight
from fl_lightning.callbacks.checks import positive
from fl_lightning.schedules.buffered import BufferedSchedule
from fl_lightning.tree import scaled
from fl_lightning.types import Arrival, Contribution

__all__ = ["FedBuff", "at_work", "count"]


class FedBuff(Algorithm):
    r"""Buffered asynchronous aggregation: a round is one flush of ``buffer_size`` updates.

    .. math:: w_{t+1} = w_t + \eta \frac{\sum_k n_k\, s(\tau_k)\, \delta_k}{\sum_k n_k}, \qquad
        s(\tau) = \frac{1}{\sqrt{1 + \tau}}

    ``concurrency`` clients are at work at any time. Each trains from the model as it was when it was sent the work,
    :math:`\tau_k` rounds ago, and as soon as it is done the next client starts; the server steps when ``buffer_size``
    updates have arrived. Times come from the trainer's ``fleet``; without one every optimizer step takes one second.
    ``RoundReport.cohort`` are the clients of the flush, in the order of their arrival, and may name a client twice;
    ``metrics`` hold ``simulated_seconds``, ``staleness/mean`` and ``staleness/max``.

    Args:
        buffer_size: :math:`K`, updates that make the server step, >= 1.
        concurrency: clients at work at any time: a count, a fraction in (0, 1] of those that exist, or ``None`` for
            everyone. It takes the place of ``clients_per_round``.
        staleness: :math:`s`: ``"polynomial"``, ``"constant"``, ``"hinge"``, or a callable on the number of rounds.
        exponent: of the polynomial, >= 0.
        hinge_slope: of the hinge, > 0.
        hinge_delay: rounds without discount of the hinge, >= 0.
        max_staleness: an update older than so many rounds is dropped and named in ``RoundReport.dropped``; ``None``
            takes every one.
        client_concurrency: dispatches that one client may have in flight, >= 1.
        server_lr: :math:`\eta`, > 0.
        server_optimizer: parameters to the server's torch optimizer, instead of ``server_lr``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a flush.
        weights: ``"examples"`` (:math:`n_k`), ``"uniform"`` as in the paper, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for a value out of range, or ``server_lr`` beside ``server_optimizer``.

    Example:
        >>> algorithm = FedBuff(buffer_size=10, concurrency=50)
        >>> arrived = Contribution({"delta": {"w": torch.tensor([6.0])}}, {"weight": 3.0})
        >>> algorithm.receive(arrived, Arrival(staleness=3)).trees["delta"]["w"].tolist()
        [3.0]

    References:
        Nguyen et al., *Federated Learning with Buffered Asynchronous Aggregation*, 2022, algorithm 1. The discount
        shortens the step, as there: weights of the mean are not normalised by it. The paper weighs clients uniformly;
        ``weights="examples"`` is the default here, as in FedAvg. Its secure buffer in a trusted enclave is not built.
    """

    asynchronous = True

    def __init__(
        self,
        buffer_size: int,
        concurrency: int | float | None = None,
        staleness: Staleness = "polynomial",
        exponent: float = 0.5,
        hinge_slope: float = 10.0,
        hinge_delay: float = 4.0,
        max_staleness: int | None = None,
        client_concurrency: int = 1,
        server_lr: float = 1.0,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        if server_optimizer is not None and server_lr != 1.0:
            raise MisconfigurationException(
                f"FedBuff got server_lr={server_lr} and a server_optimizer with a rate of its own. Pass one of them."
            )
        server_lr = positive("FedBuff", "server_lr", server_lr)
        # `partial` and not a lambda: the client half of an algorithm must pickle
        super().__init__(server_optimizer or partial(torch.optim.SGD, lr=server_lr), server_lr_scheduler, weights)
        self.staleness, self.exponent = staleness, exponent
        self.discount = StalenessWeight("FedBuff", staleness, exponent, hinge_slope, hinge_delay)
        self.buffer_size = count("FedBuff", "buffer_size", buffer_size)
        self.concurrency = at_work("FedBuff", concurrency)
        self.max_staleness = None if max_staleness is None else count("FedBuff", "max_staleness", max_staleness, 0)
        self.client_concurrency = count("FedBuff", "client_concurrency", client_concurrency)

    def schedule(self) -> BufferedSchedule:
        return BufferedSchedule(self.buffer_size, self.concurrency, self.max_staleness, self.client_concurrency)

    def receive(self, contribution: Contribution, arrival: Arrival) -> Contribution:
        factor = self.discount(arrival.staleness, arrival.client_id)
        if factor == 1.0:
            return contribution
        scalars = dict(contribution.scalars)
        if "buffers" in scalars:  # running statistics are a mean, whatever their weights
            scalars["buffers"] *= factor
        return Contribution({key: scaled(tree, factor) for key, tree in contribution.trees.items()}, scalars)


def count(owner: str, name: str, value: int, least: int = 1) -> int:
    """Return an integer that is large enough.

    Raises:
        MisconfigurationException: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationException(f"{owner} expected {name} to be an integer >= {least}, got {value!r}.")
    return value


def at_work(owner: str, concurrency: int | float | None) -> int | float | None:
    """Return the clients at work at any time: a count, a fraction, or ``None`` for everyone.

    Raises:
        MisconfigurationException: for anything else.
    """
    if concurrency is None or (isinstance(concurrency, float) and 0.0 < concurrency <= 1.0):
        return concurrency
    if isinstance(concurrency, float):
        raise MisconfigurationException(
            f"{owner} expected concurrency as a count >= 1 or as a fraction in (0, 1], got {concurrency!r}."
        )
    return count(owner, "concurrency", concurrency)
