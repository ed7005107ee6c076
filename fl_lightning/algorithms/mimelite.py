"""MIME-lite: local steps with the momentum of the server."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch import Callback
from torch import Tensor

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State, Weights
from fl_lightning.callbacks import GradientCorrection
from fl_lightning.callbacks.checks import in_unit_interval, sgd_only
from fl_lightning.callbacks.start_pass import StartPass
from fl_lightning.tree import scaled, zeros_like
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["MimeLite"]

_KEY = "mimelite"


class MimeLite(Algorithm):
    r"""Clients step with a momentum that is fixed for the round; only the server's gradients change it.

    .. math:: y \leftarrow y - \eta\,\bigl((1-\beta)\,g_k(y) + \beta s\bigr), \qquad
        s \leftarrow \beta s + (1-\beta) \frac{\sum_k w_k \nabla F_k(x)}{\sum_k w_k}

    and the new model is the mean of the clients' models. Momentum that a client builds for itself drifts towards that
    client's optimum; this one points where the whole cohort goes. It costs a pass over the client's data each round.

    Args:
        momentum: :math:`\beta` in [0, 1); 0 is FedAvg, bit for bit.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``; it weighs models and gradients.

    Raises:
        MisconfigurationException: for a momentum outside of [0, 1), a module with manual optimization, or clients that
            do not train with ``torch.optim.SGD``.

    Example:
        >>> MimeLite(momentum=0.5).momentum
        0.5

    References:
        Karimireddy et al., *Breaking the Centralized Barrier for Cross-Device Federated Learning* (MIME), 2021,
        algorithm 1 with SGD and momentum as the base optimizer. Use plain SGD in ``configure_optimizers``: a momentum
        of the client's own would come on top.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        self.momentum = in_unit_interval("MimeLite", "momentum", momentum, "0 is FedAvg")

    def client_callbacks(self) -> list[Callback]:
        return [_ServerMomentum(self.momentum), StartPass(gradient=True)]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        contribution, memory_next = super().contribute(update, task, memory)
        grads = update.extra["start_grad"]
        own = {name: grads[name].to(value.dtype) for name, value in update.delta.items()}
        contribution.trees["gradient"] = scaled(own, contribution.scalars["weight"])
        return contribution, memory_next

    def init_state(self, model: Tree) -> State:
        return {"momentum": zeros_like(model)}

    def broadcast(self, state: State) -> Mapping[str, Tree]:
        return {_KEY: state["momentum"]}

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        gradient, _ = super().apply(total, state, num_clients)
        fresh = scaled(total.trees["gradient"], (1 - self.momentum) / total.scalars["weight"])
        kept = scaled(state["momentum"], self.momentum)
        return gradient, {"momentum": {name: kept[name] + fresh[name] for name in kept}}


class _ServerMomentum(GradientCorrection):
    """Blends every gradient with the server's momentum."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.momentum:
            sgd_only("MimeLite", trainer.optimizers, "an algorithm for any optimizer such as FedAvgM")

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        server = task.broadcast[_KEY]
        if self.momentum == 0:
            return dict(grads)
        return {
            name: (1 - self.momentum) * grad + self.momentum * server[name].to(grad.dtype) if name in server else grad
            for name, grad in grads.items()
        }
