"""FedAsync: every client's model is mixed into the server's as soon as it arrives."""

from __future__ import annotations

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.algorithms.base import Algorithm, SchedulerCallable
from fl_lightning.algorithms.fedbuff import at_work, count
from fl_lightning.algorithms.staleness import Staleness, StalenessWeight
from fl_lightning.callbacks import ProximalTerm
from fl_lightning.callbacks.checks import non_negative
from fl_lightning.schedules.buffered import BufferedSchedule
from fl_lightning.tree import add_, difference, scaled
from fl_lightning.types import Arrival, Contribution, Tree

__all__ = ["FedAsync"]


class FedAsync(Algorithm):
    r"""Asynchronous federated optimisation: a round is one client's arrival.

    .. math:: w_{t+1} = (1 - \alpha_t)\, w_t + \alpha_t\, w^k, \qquad \alpha_t = \alpha\, s(\tau)

    :math:`w^k` is the model that the client trained from the server's :math:`w_{t - \tau}`. ``concurrency`` clients
    are at work at any time, and who arrives makes room for the next. It is :class:`FedBuff` with a buffer of one and
    another rule: models are mixed, so that an old one also pulls back what the server has learned since.

    Args:
        alpha: mixing weight :math:`\alpha` of a fresh model, in (0, 1].
        concurrency: clients at work at any time: a count, a fraction in (0, 1] of those that exist, or ``None`` for
            everyone. It takes the place of ``clients_per_round``.
        staleness: :math:`s`: ``"polynomial"``, ``"constant"``, ``"hinge"``, or a callable on the number of rounds.
        exponent: :math:`a` of the polynomial, >= 0.
        hinge_slope: :math:`a` of the hinge, > 0.
        hinge_delay: :math:`b` of the hinge, in rounds, >= 0.
        mu: the paper's :math:`\rho`, strength of the proximal term of local training, >= 0; 0 trains without one.
        max_staleness: a model older than so many rounds is dropped and named in ``RoundReport.dropped``; ``None``
            takes every one.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round; its rate times
            :math:`\alpha_t` is the mixing weight.

    Raises:
        MisconfigurationException: for a value out of range.

    Example:
        >>> import torch
        >>> algorithm = FedAsync(alpha=0.5, staleness="constant")
        >>> sent, now = {"model": {"w": torch.tensor([1.0])}}, {"model": {"w": torch.tensor([3.0])}}
        >>> arrived = Contribution({"delta": {"w": torch.tensor([4.0])}}, {"weight": 1.0})  # its model is 1 + 4 = 5
        >>> algorithm.receive(arrived, Arrival(2, sent, now)).trees["delta"]["w"].tolist()  # from 3 half way to 5
        [1.0]

    References:
        Xie et al., *Asynchronous Federated Optimization*, 2019, algorithm 1 and section 5.2. The paper's updater may
        mix while clients are being sent work; here a client starts either before or after a step.
    """

    asynchronous = True

    def __init__(
        self,
        alpha: float = 0.6,
        concurrency: int | float | None = None,
        staleness: Staleness = "polynomial",
        exponent: float = 0.5,
        hinge_slope: float = 10.0,
        hinge_delay: float = 4.0,
        mu: float = 0.0,
        max_staleness: int | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(None, server_lr_scheduler, "uniform")  # the weight of a single client cancels
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
            raise MisconfigurationException(f"FedAsync expected alpha to be a number in (0, 1], got {alpha!r}.")
        self.alpha = float(alpha)
        self.staleness, self.exponent = staleness, exponent
        self.discount = StalenessWeight("FedAsync", staleness, exponent, hinge_slope, hinge_delay)
        self.mu = non_negative("FedAsync", "mu", mu, "mu=0 trains without a proximal term")
        self.concurrency = at_work("FedAsync", concurrency)
        self.max_staleness = None if max_staleness is None else count("FedAsync", "max_staleness", max_staleness, 0)

    def client_callbacks(self) -> list[Callback]:
        return [ProximalTerm(self.mu)] if self.mu else []

    def schedule(self) -> BufferedSchedule:
        return BufferedSchedule(1, self.concurrency, self.max_staleness)

    def receive(self, contribution: Contribution, arrival: Arrival) -> Contribution:
        rate = self.alpha * self.discount(arrival.staleness, arrival.client_id)
        trees: dict[str, Tree] = dict(contribution.trees)
        moved = {name: tensor.clone() for name, tensor in trees["delta"].items()}
        add_(moved, difference(arrival.sent["model"], arrival.now["model"]))
        trees["delta"] = scaled(moved, rate)
        if trees.get("buffers"):
            weight, old = contribution.scalars["buffers"], arrival.now["buffers"]
            mixed = scaled(trees["buffers"], rate)
            add_(mixed, {name: old[name].to(tensor) * (weight * (1.0 - rate)) for name, tensor in mixed.items()})
            trees["buffers"] = mixed
        return Contribution(trees, contribution.scalars)
