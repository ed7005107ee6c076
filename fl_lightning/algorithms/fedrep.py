"""FedRep: every client's own head on a shared representation, each trained while the other stands still."""

from __future__ import annotations

from collections.abc import Sequence

from fl_lightning.algorithms.base import OptimizerCallable, SchedulerCallable, Weights
from fl_lightning.algorithms.personal import FedPer
from fl_lightning.callbacks.checks import epochs_or_none
from fl_lightning.types import ClientTask, Phase

__all__ = ["FedRep"]


class FedRep(FedPer):
    r"""Federated averaging of a representation; each client first fits its own head to it, then moves it.

    .. math:: \phi_k \leftarrow \arg\min_\phi F_k(\theta_t, \phi), \qquad
        \theta_k \leftarrow \theta_t - \eta \nabla_\theta F_k(\theta, \phi_k), \qquad
        \theta_{t+1} = \theta_t + \frac{\sum_k n_k \delta_k^\theta}{\sum_k n_k}

    The head :math:`\phi_k` stays with its client and waits in its memory. With ``head_epochs`` epochs it comes close to
    the best head for the representation that was sent; the representation then takes the trainer's ``local_epochs``
    (or ``local_steps``).

    Args:
        personal: name patterns (``fnmatch``) of the head, ``["head.*"]`` for example.
        head_epochs: epochs of the head in each round, >= 1; ``None`` takes as much work as the representation gets.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for no pattern, a pattern that matches no parameter, or ``head_epochs < 1``.

    Example:
        >>> head, body = FedRep(["head.*"], head_epochs=10).phases(ClientTask("a", 0, 0, {}, seed=0))
        >>> head.trainable, head.epochs, body.frozen, body.start, body.report
        (('head.*',), 10, ('head.*',), 'previous', True)

    References:
        Collins et al., *Exploiting Shared Representations for Personalized Federated Learning*, 2021, algorithm 1 and
        section 5 (ten epochs of the head, one of the representation). The paper's average is uniform, which is
        ``weights="uniform"``; a client that has not taken part yet has the head that the server's module was built
        with, as with :class:`FedPer`.
    """

    def __init__(
        self,
        personal: Sequence[str],
        head_epochs: int | None = None,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(personal, server_optimizer, server_lr_scheduler, weights)
        self.head_epochs = epochs_or_none(
            "FedRep",
            "head_epochs",
            head_epochs,
            "as much as the representation gets",
            f" To train head and representation together use FedPer({list(self.personal)}).",
        )

    def phases(self, task: ClientTask) -> list[Phase]:
        return [
            Phase("head", trainable=self.personal, epochs=self.head_epochs, report=False),
            Phase("representation", frozen=self.personal, start="previous"),
        ]
