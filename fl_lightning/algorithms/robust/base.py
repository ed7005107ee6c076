"""What robust rules share: every client contributes its bare update, and no sum is formed."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State, Weights
from fl_lightning.algorithms.robust.cohort import Cohort
from fl_lightning.tree import scaled
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["RobustAlgorithm", "count_of", "shares_of"]


class RobustAlgorithm(Algorithm):
    r"""Base of the rules that replace the mean of the updates, :math:`w_{t+1} = w_t + R(\delta_1, \dots, \delta_n)`.

    A subclass defines :meth:`aggregate`. The server must see every single update, so these rules are not linear: they
    exclude what decodes sums, and will exclude secure aggregation, which hides the updates. Running statistics of
    BatchNorm are aggregated by their coordinate-wise median, whatever the rule. Training metrics are sums of what
    clients claim; validate on the server.

    Args:
        f: Byzantine clients that each cohort may contain; a cohort too small to withstand so many is refused.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: weight of a client. Uniform unless a rule says otherwise: a number of examples is a client's own claim.
    """

    linear = False

    def __init__(
        self,
        f: int = 0,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "uniform",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        self.f = count_of(self, "f", f, 0)

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        """Return the update that stands for the cohort's."""
        raise NotImplementedError(f"{type(self).__name__} must define aggregate(cohort).")

    @property
    def fewest_clients(self) -> int:
        return 2 * self.f + 1

    def check_cohort(self, num_clients: int) -> None:
        """Raise for a cohort that is too small.

        Raises:
            MisconfigurationException: for fewer than ``fewest_clients``.
        """
        fewest = self.fewest_clients
        if num_clients < fewest:
            raise MisconfigurationException(
                f"{type(self).__name__} {self._needs()}: expected a cohort of at least {fewest} clients, got "
                f"{num_clients}. Let more take part and deliver (clients_per_round={fewest}, min_clients={fewest}), or "
                f"{self._instead()}."
            )

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        return Contribution({"delta": update.delta}, {"weight": self.weight(update)}), None

    def combine(self, cohort: Cohort, state: State, num_clients: int) -> tuple[Tree, State]:
        return scaled(self.aggregate(cohort), -1.0), state

    def _needs(self) -> str:
        return f"withstands f={self.f} Byzantine clients only where they are a minority (f < n/2)"

    def _instead(self) -> str:
        return "declare a smaller f"


def count_of(owner: object, name: str, value: int, least: int) -> int:
    """Return the value.

    Raises:
        MisconfigurationException: unless it is an integer of at least ``least``.

    Example:
        >>> count_of(RobustAlgorithm(), "f", 2, 0)
        2
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationException(
            f"{type(owner).__name__} expected {name} to be an integer >= {least}, got {value!r}."
        )
    return value


def shares_of(owner: Algorithm, cohort: Cohort) -> list[float]:
    """Return the clients' weights as shares that sum to one.

    Raises:
        MisconfigurationException: when all weights are zero.
    """
    weights = [scalars["weight"] for scalars in cohort.scalars]
    total = sum(weights)
    if not total > 0:
        raise MisconfigurationException(
            f"{type(owner).__name__} expected a positive sum of client weights, got {total}. Use weights='uniform'."
        )
    return [weight / total for weight in weights]
