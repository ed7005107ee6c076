"""FedNova: averaging that does not favour clients which take more steps."""

from __future__ import annotations

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State, Weights
from fl_lightning.callbacks import ProximalTerm, StepCounter
from fl_lightning.callbacks.checks import non_negative
from fl_lightning.tree import scaled
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["FedNova"]

_NO_NORM = "no StepCounter ran, every learning rate was zero, or training_step returned None for every batch"


class FedNova(Algorithm):
    r"""Normalised averaging: each update is divided by what its client's optimizer made of a unit gradient.

    .. math:: w_{t+1} = w_t + \tau_\text{eff} \sum_k p_k \frac{\delta_k}{\lVert a_k \rVert_1}, \qquad
        \tau_\text{eff} = \sum_k p_k \lVert a_k \rVert_1, \qquad p_k = \frac{n_k}{\sum_j n_j}

    FedAvg converges to the optimum of another objective when clients take unequal numbers of steps; FedNova does not.
    A client contributes :math:`\{w_k \delta_k / \lVert a_k \rVert_1,\ w_k \lVert a_k \rVert_1,\ w_k\}`. The normaliser
    is followed step by step for SGD with momentum, Nesterov's look-ahead, a proximal term and any learning-rate
    schedule (:class:`~fl_lightning.callbacks.StepCounter`); where clients differ in learning rate,
    :math:`\eta_k \lVert a_k \rVert_1` takes its place.

    Args:
        mu: strength of a proximal term on the clients, >= 0; FedNova with it is FedProx without its inconsistency.
        normalizer: ``"gradients"`` uses :math:`\lVert a_k \rVert_1`, which is defined for SGD; ``"steps"`` the number
            of optimizer steps, a stand-in for optimizers such as Adam.
        server_optimizer: parameters to the server's torch optimizer; SGD with momentum is the paper's server momentum.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for ``mu < 0``, a ``ProximalTerm`` among the client callbacks (``mu`` is its place),
            a client that took no step, or an optimizer other than SGD.

    Example:
        >>> import torch
        >>> algorithm, task = FedNova(), ClientTask("a", 0, 0, {}, seed=0)
        >>> update = ClientUpdate("a", {"w": torch.tensor([6.0])}, {}, num_examples=1, num_steps=3, a_norm=3.0)
        >>> algorithm.contribute(update, task, {})[0].trees["delta"]["w"].tolist()
        [2.0]

    References:
        Wang et al., *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*, 2020,
        equation 9 and section 4.
    """

    def __init__(
        self,
        mu: float = 0.0,
        normalizer: str = "gradients",
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        self.mu = non_negative("FedNova", "mu", mu, "mu=0 trains without a proximal term")
        if normalizer not in ("gradients", "steps"):
            raise MisconfigurationException(
                f"FedNova expected normalizer='gradients' (SGD) or 'steps' (any optimizer), got {normalizer!r}."
            )
        self.normalizer = normalizer

    def client_callbacks(self) -> list[Callback]:
        proximal: list[Callback] = [ProximalTerm(self.mu)] if self.mu else []
        counter = StepCounter(self.mu)
        counter.beside_a_proximal_term = "Write FedNova(mu={mu}) and leave the ProximalTerm out of client_callbacks."
        return [*proximal, counter]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        weight, norm = self.weight(update), self._norm(update)
        delta = scaled(update.delta, weight / norm)
        return Contribution({"delta": delta}, {"weight": weight, "norm": weight * norm}), None

    def _norm(self, update: ClientUpdate) -> float:
        if update.num_steps == 0:
            raise MisconfigurationException(
                f"FedNova divides by a client's steps, and client {update.client_id!r} took no optimizer step. Give it "
                "more local epochs or a smaller accumulate_grad_batches, or leave it out of the population."
            )
        if self.normalizer == "steps":
            return float(update.num_steps)
        if update.a_norm is None or not update.a_norm > 0:
            reason = update.extra.get("no_a_norm", _NO_NORM)
            raise MisconfigurationException(
                f"FedNova cannot normalise the update of client {update.client_id!r}: {reason}. It is defined for one "
                "torch.optim.SGD with the same learning rate and momentum for all parameters, started anew in each "
                "round. Use that in configure_optimizers, or FedNova(normalizer='steps')."
            )
        # the product with the rate is what unequal rates ask for; with equal ones it cancels
        return update.a_norm * float(update.extra.get("lr", 1.0))

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        mean, state = super().apply(total, state, num_clients)
        return scaled(mean, total.scalars["norm"] / total.scalars["weight"]), state
