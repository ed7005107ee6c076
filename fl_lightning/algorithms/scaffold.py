"""SCAFFOLD: control variates that cancel the drift of local training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State
from fl_lightning.callbacks import GradientCorrection, StepCounter
from fl_lightning.callbacks.start_pass import StartPass
from fl_lightning.tree import difference, scaled, zeros_like
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["Scaffold"]

_KEY = "scaffold"


class Scaffold(Algorithm):
    r"""Stochastic controlled averaging: every local gradient is moved by the global minus the own control variate.

    .. math:: y \leftarrow y - \eta\,(g_k(y) - c_k + c), \qquad
        x \leftarrow x + \frac{1}{|S|}\sum_{k \in S} \delta_k, \qquad
        c \leftarrow c + \frac{1}{N}\sum_{k \in S} (c_k^+ - c_k)

    with the client's new control variate

    .. math:: \text{option I: } c_k^+ = \nabla F_k(x), \qquad
        \text{option II: } c_k^+ = c_k - c - \frac{\delta_k}{\eta K}

    :math:`c_k` lives in the client's memory and starts at zero; :math:`N` is the size of the population, so any part of
    it may take part in a round. The average is uniform, as the objective of the paper is.

    Args:
        option: ``"I"`` measures the gradient at the global model, which costs a pass over the client's data in each
            round; ``"II"`` reuses the gradients of local training and costs nothing.
        server_optimizer: parameters to the server's torch optimizer; ``SGD(lr=...)`` is the paper's global step size.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for another option, or for clients that do not train with one ``torch.optim.SGD``.

    Example:
        >>> [type(callback).__name__ for callback in Scaffold(option="I").client_callbacks()]
        ['_ControlVariate', 'StepCounter', 'StartPass']

    References:
        Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, 2020, algorithm 1. With
        momentum or a learning-rate schedule :math:`\eta K` becomes :math:`\eta \lVert a \rVert_1`, the sum of the
        coefficients of the gradients in the update; for plain SGD that is :math:`\eta K`. With ``GradientClip`` or
        ``GradientNoise`` among the client callbacks option II's control variate is the mean of such gradients;
        ``gradient_clip_val`` clips what is corrected already, and what it takes off is missing in the control variate.
    """

    def __init__(
        self,
        option: Literal["I", "II"] = "II",
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights="uniform")
        if option not in ("I", "II"):
            raise MisconfigurationException(
                f"Scaffold expected option='I' (gradient at the global model) or option='II', got {option!r}."
            )
        self.option = option

    def client_callbacks(self) -> list[Callback]:
        start: list[Callback] = [StartPass(gradient=True)] if self.option == "I" else []
        counter = StepCounter()
        counter.beside_a_proximal_term = (
            "Scaffold is not defined with a proximal term: leave it out of client_callbacks, or use FedProx(mu={mu})."
        )
        return [_ControlVariate(), counter, *start]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        self._check(update)
        if update.num_steps == 0 or not update.extra["distance"]:
            # nothing was learned about the gradient; the client keeps its control variate
            still: dict[str, Tree] = {"delta": dict(update.delta), "control": zeros_like(update.delta)}
            return Contribution(still, {"weight": 1.0}), None
        old = memory.get(_KEY) or zeros_like(update.delta)
        if self.option == "I":
            grads = update.extra["start_grad"]
            new = {name: grads[name].to(value.dtype) for name, value in old.items()}
            change = difference(new, old)
        else:
            control = task.broadcast[_KEY]
            change = difference(scaled(update.delta, -1.0 / update.extra["distance"]), control)
            new = {name: old[name] + change[name] for name in old}
        return Contribution({"delta": dict(update.delta), "control": change}, {"weight": 1.0}), {_KEY: new}

    def _check(self, update: ClientUpdate) -> None:
        if update.num_steps and update.a_norm is None:
            raise MisconfigurationException(
                f"Scaffold is not defined for client {update.client_id!r}: "
                f"{update.extra.get('no_a_norm', 'no StepCounter ran')}. It is defined for one torch.optim.SGD with "
                "the same learning rate and momentum for all parameters, started anew in each round: use that in "
                "configure_optimizers, or an algorithm for any optimizer such as FedProx."
            )

    def init_state(self, model: Tree) -> State:
        return {"control": zeros_like(model)}

    def broadcast(self, state: State) -> Mapping[str, Tree]:
        return {_KEY: state["control"]}

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        gradient, _ = super().apply(total, state, num_clients)
        step = scaled(total.trees["control"], 1.0 / num_clients)
        return gradient, {"control": {name: value + step[name] for name, value in state["control"].items()}}


class _ControlVariate(GradientCorrection):
    """Adds ``c - c_k``; both are known before the first step, so their difference is kept."""

    def begin(self, task: ClientTask, memory: Memory) -> None:
        super().begin(task, memory)
        control = task.broadcast[_KEY]
        own = memory.get(_KEY)
        self.own = {"shift": dict(control) if own is None else difference(control, own)}

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        shift = self.own["shift"]
        return {n: g + shift[n].to(g.dtype) if n in shift else g for n, g in grads.items()}
