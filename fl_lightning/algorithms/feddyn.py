"""FedDyn: a regulariser that moves with the client, so that local optima agree with the global one."""

from __future__ import annotations

from lightning.pytorch import Callback
from torch import Tensor

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State
from fl_lightning.callbacks import GradientCorrection
from fl_lightning.callbacks.checks import positive
from fl_lightning.callbacks.proximal import pulled
from fl_lightning.tree import scaled, zeros_like
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["FedDyn"]

_KEY = "feddyn"


class FedDyn(Algorithm):
    r"""Dynamic regularisation: local problems whose joint fixed point is the optimum, whatever the number of steps.

    .. math:: \min_w F_k(w) - \langle h_k, w \rangle + \frac{\alpha}{2} \lVert w - w_t \rVert^2, \qquad
        h_k \leftarrow h_k - \alpha\,\delta_k

    .. math:: h \leftarrow h - \frac{\alpha}{N} \sum_{k \in S} \delta_k, \qquad
        w_{t+1} = w_t + \frac{1}{|S|} \sum_{k \in S} \delta_k - \frac{1}{\alpha} h

    :math:`h_k` lives in the client's memory and starts at zero; :math:`N` is the size of the population. The average is
    uniform, as the objective of the paper is.

    Args:
        alpha: strength of the regulariser, > 0. Larger is slower and steadier.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``, the paper's server.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for ``alpha <= 0``.

    Example:
        >>> FedDyn(alpha=0.1).alpha
        0.1

    References:
        Acar et al., *Federated Learning Based on Dynamic Regularization*, 2021, algorithm 1. :math:`h_k` stands for
        :math:`\nabla L_k(\theta_k^{t-1})` there, which exact local solves make equal to the gradient.
    """

    def __init__(
        self,
        alpha: float = 0.01,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights="uniform")
        self.alpha = positive("FedDyn", "alpha", alpha, "without a regulariser use FedAvg(weights='uniform')")

    def client_callbacks(self) -> list[Callback]:
        return [_DynamicRegularizer(self.alpha)]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        old = memory.get(_KEY) or zeros_like(update.delta)
        moved = scaled(update.delta, self.alpha)
        return Contribution({"delta": dict(update.delta)}, {"weight": 1.0}), {_KEY: {n: old[n] - moved[n] for n in old}}

    def init_state(self, model: Tree) -> State:
        return {"h": zeros_like(model)}

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        gradient, _ = super().apply(total, state, num_clients)
        step = scaled(total.trees["delta"], self.alpha / num_clients)
        h = {name: value - step[name] for name, value in state["h"].items()}
        return {name: gradient[name] + h[name] / self.alpha for name in gradient}, {"h": h}


class _DynamicRegularizer(GradientCorrection):
    """Adds ``alpha * (w - w_t) - h_k``."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def begin(self, task: ClientTask, memory: Memory) -> None:
        super().begin(task, memory)
        self.own = {_KEY: memory.get(_KEY) or zeros_like(task.broadcast["model"])}

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        own = self.own[_KEY]
        near = pulled(grads, params, task.broadcast["model"], self.alpha)
        return {n: g - own[n].to(g.dtype) if n in own else g for n, g in near.items()}
