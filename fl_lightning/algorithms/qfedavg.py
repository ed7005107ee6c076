"""q-FedAvg: clients with a high loss count more."""

from __future__ import annotations

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State, Weights
from fl_lightning.callbacks import StepCounter
from fl_lightning.callbacks.checks import non_negative, positive
from fl_lightning.callbacks.start_pass import StartPass
from fl_lightning.tree import scaled
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["QFedAvg"]


class QFedAvg(Algorithm):
    r"""Fair federated averaging for :math:`\min_w \sum_k \frac{p_k}{q+1} F_k(w)^{q+1}`.

    .. math:: w_{t+1} = w_t + \frac{\sum_k p_k F_k^q \delta_k}{\sum_k p_k \left(F_k^q + q F_k^{q-1} L
        \lVert \delta_k \rVert^2\right)}, \qquad F_k = F_k(w_t)

    The larger :math:`q`, the more the worst clients count, and the more alike the clients' losses become. The
    denominator estimates how fast the objective bends, so that no step size must be tuned for each :math:`q`. The loss
    at the global model costs a pass over the client's data in each round.

    Args:
        q: fairness, >= 0; 0 is FedAvg, bit for bit.
        lipschitz: :math:`L` > 0; ``None`` takes one over the client's learning rate, as the paper does.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: :math:`p_k`: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for ``q < 0``, a negative loss, or an optimizer without a learning rate to take.

    Example:
        >>> import torch
        >>> algorithm, task = QFedAvg(q=1.0, lipschitz=2.0), ClientTask("a", 0, 0, {}, seed=0)
        >>> update = ClientUpdate("a", {"w": torch.tensor([3.0])}, {}, 1, 1, extra={"start_loss": 0.5})
        >>> contribution, _ = algorithm.contribute(update, task, {})
        >>> contribution.trees["delta"]["w"].tolist(), contribution.scalars["weight"]  # .5 * 3 and .5 + 2 * 9
        ([1.5], 18.5)

    References:
        Li et al., *Fair Resource Allocation in Federated Learning*, 2020, algorithm 2, with numerator and denominator
        divided by :math:`L`. There clients are drawn with probability :math:`p_k`; here the sampler draws.
    """

    def __init__(
        self,
        q: float = 1.0,
        lipschitz: float | None = None,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        self.q = non_negative("QFedAvg", "q", q, "q=0 is FedAvg")
        self.lipschitz = None if lipschitz is None else positive("QFedAvg", "lipschitz", lipschitz)

    def client_callbacks(self) -> list[Callback]:
        counter = StepCounter()
        counter.beside_a_proximal_term = "Leave it out of client_callbacks: QFedAvg is defined for plain gradients."
        return [StartPass(), counter]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        loss = float(update.extra["start_loss"])
        if loss < 0 or (loss == 0 and 0 < self.q < 1):
            raise MisconfigurationException(
                f"QFedAvg raises losses to the power of q={self.q} and needs them > 0; the loss of client "
                f"{update.client_id!r} is {loss}. Use a loss that is bounded below by zero, such as cross entropy."
            )
        weight, factor = self.weight(update), loss**self.q
        squared = float(sum(tensor.double().square().sum() for tensor in update.delta.values()))
        bend = self.q * loss ** (self.q - 1) * self._lipschitz(update) * squared if self.q else 0.0
        return Contribution(
            {"delta": scaled(update.delta, weight * factor)}, {"weight": weight * (factor + bend)}
        ), None

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        if self.q and total.scalars["weight"] == 0:
            return scaled(total.trees["delta"], 0.0), state  # every loss is zero: nobody is left to improve
        return super().apply(total, state, num_clients)

    def _lipschitz(self, update: ClientUpdate) -> float:
        if self.lipschitz is not None:
            return self.lipschitz
        rate = float(update.extra.get("lr", 0.0))
        if not rate > 0:
            reason = update.extra.get("no_a_norm", "its learning rate is zero")
            raise MisconfigurationException(
                f"QFedAvg takes L = 1 / learning rate from the client's SGD, and client {update.client_id!r} has none: "
                f"{reason}. Use one torch.optim.SGD in configure_optimizers, or set QFedAvg(lipschitz=...)."
            )
        return 1.0 / rate
