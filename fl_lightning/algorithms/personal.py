"""Personalisation: FedPer keeps layers with their client, Ditto gives each client a model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from fl_lightning.algorithms.base import PERSONAL, Algorithm, OptimizerCallable, SchedulerCallable, Weights
from fl_lightning.callbacks import ProximalTerm
from fl_lightning.callbacks.checks import epochs_or_none, non_negative
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Phase

__all__ = ["Ditto", "FedPer"]


class FedPer(Algorithm):
    r"""Federated averaging of some layers; the others stay with their client and never travel.

    .. math:: w_k = (\theta, \phi_k), \qquad \theta_{t+1} = \theta_t + \frac{\sum_k n_k \delta_k^\theta}{\sum_k n_k}

    A client trains all of its parameters; :math:`\phi_k` waits in its memory for its next round. A client that has not
    taken part yet has the layers that the server's module was built with. Evaluation on clients
    (``evaluate_clients``) uses their own layers.

    Args:
        personal: name patterns (``fnmatch``) of the parameters that stay local, ``["head.*"]`` for example.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for no pattern, or a pattern that matches no parameter.

    Example:
        >>> sorted(FedPer(["1.*"]).local_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))))
        ['1.bias', '1.weight']

    References:
        Arivazhagan et al., *Federated Learning with Personalization Layers*, 2019, algorithms 1 and 2. FedBN keeps
        normalisation layers local, and is ``FederatedTrainer(batch_norm="local")`` with any algorithm.
    """

    def __init__(
        self,
        personal: Sequence[str],
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        given = (personal,) if isinstance(personal, str) else personal
        if not isinstance(given, Sequence) or not given or not all(isinstance(pattern, str) for pattern in given):
            shown = "none" if given in ([], ()) else repr(personal)
            raise MisconfigurationException(
                f"{type(self).__name__} expected patterns of the parameters that stay local, got {shown}. Write "
                f"{type(self).__name__}(['head.*']), or use FedAvg() to share all of them."
            )
        self.personal = tuple(given)

    def local_parameters(self, module: nn.Module) -> set[str]:
        names = [name for name, _ in module.named_parameters()]
        found: set[str] = set()
        for pattern in self.personal:
            matching = {name for name in names if fnmatchcase(name, pattern)}
            if not matching:
                owner = getattr(module, "_user_class", type(module)).__name__  # on the server the class is another
                raise MisconfigurationException(
                    f"{type(self).__name__}'s pattern {pattern!r} matches no parameter of {owner}. Its "
                    f"parameters are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}; 'head.*' takes "
                    "everything below head."
                )
            found |= matching
        return found


class Ditto(Algorithm):
    r"""Federated averaging, and beside it a personal model for each client that is pulled towards the global one.

    .. math:: v_k \leftarrow \arg\min_v F_k(v) + \frac{\lambda}{2} \lVert v - w_t \rVert^2

    A client first trains the global model as in FedAvg, and reports that; then it goes on with its own model, which
    waits in its memory under ``"personal"`` and never leaves it. Its first personal model starts from the global one.

    Args:
        lam: pull towards the global model, >= 0; 0 is local training, bit for bit.
        personal_epochs: epochs of the personal model in each round; ``None`` takes as many as the global one's.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for ``lam < 0`` or ``personal_epochs < 1``.

    Example:
        >>> [phase.name for phase in Ditto(lam=0.1).phases(ClientTask("a", 0, 0, {}, seed=0))]
        ['global', 'personal']

    References:
        Li et al., *Ditto: Fair and Robust Federated Learning Through Personalization*, 2021, algorithm 1. The pull is
        towards the global model that the round started from, as there. Running statistics of BatchNorm
        belong to the personal model.
    """

    def __init__(
        self,
        lam: float = 0.1,
        personal_epochs: int | None = None,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        self.lam = non_negative("Ditto", "lam", lam, "lam=0 trains the personal models on their own")
        self.personal_epochs = epochs_or_none(
            "Ditto", "personal_epochs", personal_epochs, "as many as the global model gets"
        )

    def client_callbacks(self) -> list[Callback]:
        return [ProximalTerm(self.lam)]  # only the personal phase runs them

    def phases(self, task: ClientTask) -> list[Phase]:
        return [
            Phase("global", callbacks="none"),
            Phase("personal", epochs=self.personal_epochs, start="personal", report=False, keep=PERSONAL),
        ]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        contribution, _ = super().contribute(update, task, memory)
        return contribution, {PERSONAL: update.extra[PERSONAL]}
