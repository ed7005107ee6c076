"""APFL: every client mixes a model of its own with the global one."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.algorithms.base import PERSONAL, Algorithm, OptimizerCallable, SchedulerCallable, Weights
from fl_lightning.callbacks.base import ClientCallback
from fl_lightning.callbacks.checks import epochs_or_none, flag, is_number, sgd_only
from fl_lightning.callbacks.learning_rates import scale_learning_rates
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Phase, Tree

__all__ = ["APFL"]

_KEY = "apfl"
_SMALLEST = 0.01
"""Where an adaptive share stops: the own model is found from the mixture by a division by it."""


class APFL(Algorithm):
    r"""Federated averaging, and beside it a personal model for each client that is a mixture with the global one.

    .. math:: \bar v_k = \alpha_k v_k + (1 - \alpha_k)\,w_k, \qquad
        v_k \leftarrow v_k - \eta\,\alpha_k \nabla F_k(\bar v_k)

    A client trains the global model to :math:`w_k` and reports that; then its own :math:`v_k` learns what the mixture
    lacks. The mixture is its personal model, under ``"personal"`` in its memory. With ``adaptive`` the share follows
    the gradient as well, :math:`\alpha_k \leftarrow \alpha_k - \eta \langle \nabla F_k(\bar v_k), v_k - w_k \rangle`: a
    client that the global model does not serve moves towards 1.

    Args:
        alpha: share of the client's own model, in (0, 1]; 1 is local training, bit for bit.
        adaptive: start from ``alpha`` and let each client find its share, in [0.01, 1].
        personal_epochs: epochs of the mixture in each round; ``None`` takes as many as the global model's.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for an ``alpha`` outside of (0, 1], ``personal_epochs < 1``, or clients that do not
            train with ``torch.optim.SGD``.

    Example:
        >>> [phase.name for phase in APFL(alpha=0.5).phases(ClientTask("a", 0, 0, {}, seed=0))]
        ['global', 'personal']

    References:
        Deng et al., *Adaptive Personalized Federated Learning*, 2020, algorithm 1 and equation 10. There both models
        step in turn on the same batch; here :math:`w_k` is trained first and the mixture is taken with its end, so each
        has its own batches, and the share moves once a round, by the sum of the round's gradients. The chain rule's
        factor (:math:`\alpha^2` for the mixture's step) is on the learning rate, so momentum, weight decay, clipping
        and schedules are those of a training of the mixture; optimizers whose step does not follow the size of a
        gradient, such as Adam, are refused.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        adaptive: bool = False,
        personal_epochs: int | None = None,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        if not is_number(alpha) or not 0 < alpha <= 1:
            raise MisconfigurationException(
                f"APFL expected alpha in (0, 1], got {alpha!r}. 1 trains every client by itself; without a share of "
                "its own (alpha=0) a client's model is the global one, which is FedAvg()."
            )
        self.alpha, self.adaptive = float(alpha), flag("APFL", "adaptive", adaptive)
        self.personal_epochs = epochs_or_none(
            "APFL", "personal_epochs", personal_epochs, "as many as the global model gets"
        )

    def client_callbacks(self) -> list[Callback]:
        return [_Mixture(self.alpha)]  # only the personal phase runs it

    def phases(self, task: ClientTask) -> list[Phase]:
        return [
            Phase("global", callbacks="none"),
            Phase("personal", epochs=self.personal_epochs, start="previous", report=False, keep=PERSONAL),
        ]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        contribution, _ = super().contribute(update, task, memory)
        start = task.broadcast["model"]
        alpha, own = _own(memory, start, self.alpha)
        mixture: Tree = update.extra[PERSONAL]
        local = {name: start[name] + delta.to(start[name].dtype) for name, delta in update.delta.items()}
        trained = {n: (mixture[n].to(w.dtype) - (1 - alpha) * w) / alpha for n, w in local.items()}
        if self.adaptive:
            # the mixture moved by -alpha^2 times the sum of eta * gradient
            along = sum(float(((own[n] - w) * alpha * (trained[n] - own[n])).double().sum()) for n, w in local.items())
            alpha = min(1.0, max(_SMALLEST, alpha + along / alpha**2))
        return contribution, {PERSONAL: dict(mixture), _KEY: {"alpha": alpha, "own": trained}}


class _Mixture(ClientCallback):
    """Starts the phase from the mixture, and gives its steps the factor of the chain rule."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.model: Tree = {}

    def begin(self, task: ClientTask, memory: Memory) -> None:
        self.alpha, self.model = _own(memory, task.broadcast["model"], self.alpha)

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sgd_only("APFL", trainer.optimizers, "a personal model for any optimizer such as Ditto's")
        # not on gradients: SGD adds weight decay to them afterwards, and Lightning clips what it finds there
        scale_learning_rates(trainer.optimizers, trainer.lr_scheduler_configs, self.alpha**2)
        for name, p in pl_module.named_parameters():
            if name in self.model:
                p.copy_(self.alpha * self.model[name].to(p.dtype) + (1 - self.alpha) * p)


def _own(memory: Memory, start: Tree, alpha: float) -> tuple[float, dict[str, Tensor]]:
    """Return a client's share and its own model; in its first round they are the user's share and the global model."""
    kept: dict[str, Any] = memory.get(_KEY) or {"alpha": alpha, "own": start}
    return float(kept["alpha"]), dict(kept["own"])
