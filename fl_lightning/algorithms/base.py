"""What an algorithm is: what a client contributes to a sum, and what the server does with that sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fl_lightning.tree import divided, scaled
from fl_lightning.types import Arrival, ClientTask, ClientUpdate, Contribution, Memory, Phase, Tree

if TYPE_CHECKING:
    from fl_lightning.algorithms.robust.cohort import Cohort
    from fl_lightning.schedules.plan import Schedule

__all__ = ["PERSONAL", "Algorithm", "OptimizerCallable", "SchedulerCallable", "State", "Weights", "assignment"]

OptimizerCallable: TypeAlias = Callable[[Iterable[Any]], Optimizer]
SchedulerCallable: TypeAlias = Callable[[Optimizer], LRScheduler] | Callable[[Optimizer], dict[str, Any]]
Weights: TypeAlias = Literal["examples", "uniform"] | Callable[[ClientUpdate], float]
State: TypeAlias = dict[str, Any]


PERSONAL = "personal"
"""Where a client's memory keeps a whole model of its own."""


def assignment(params: Iterable[Any]) -> Optimizer:
    """Return the neutral server optimizer ``SGD(lr=1)``: the new model is the old one plus the mean update."""
    return torch.optim.SGD(params, lr=1.0)


class Algorithm:
    r"""Base of all federated algorithms; by itself it is federated averaging.

    In round :math:`t` each client :math:`k` of the cohort contributes :math:`\{w_k \delta_k, w_k\}` to one sum, and
    the server steps with the pseudo-gradient :math:`g_t = -\sum_k w_k \delta_k / \sum_k w_k`.

    Subclasses are pure: what they learn goes through ``state``, what a client keeps goes through ``memory``.

    Args:
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round, or to Lightning's dict with
            ``"scheduler"`` and the ``"monitor"`` of a ``ReduceLROnPlateau``; ``None`` for none.
        weights: weight of a client: its number of examples, ``"uniform"``, or a callable on its ``ClientUpdate``.

    Raises:
        MisconfigurationException: for other weights, or a server optimizer or scheduler that is no callable.
    """

    linear: bool = True
    """Whether the server needs only the sum of the contributions (robust rules need every one)."""

    asynchronous: bool = False
    """Whether the server looks at when an update arrived, so that it must know each one by itself."""

    @property
    def fewest_clients(self) -> int:
        """Size of the smallest cohort that the algorithm is defined for."""
        return 1

    def __init__(
        self,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        if not callable(weights) and weights not in ("examples", "uniform"):
            raise MisconfigurationException(
                f"Expected weights='examples', 'uniform' or a callable on a ClientUpdate, got {weights!r}."
            )
        _check_maker("server_optimizer", server_optimizer, "lambda params: torch.optim.Adam(params, lr=0.01)")
        _check_maker("server_lr_scheduler", server_lr_scheduler, "lambda optimizer: StepLR(optimizer, step_size=10)")
        self.server_optimizer: OptimizerCallable = server_optimizer or assignment
        self.server_lr_scheduler = server_lr_scheduler
        self.weights = weights

    # ---- client half -------------------------------------------------------------------------------------------

    def client_callbacks(self) -> list[Callback]:
        """Return the Lightning callbacks of local training; they are copied for each client."""
        return []

    def phases(self, task: ClientTask) -> list[Phase]:
        """Return the local trainings of a round, in order; one of them reports."""
        return [Phase()]

    def local_parameters(self, module: nn.Module) -> set[str]:
        """Return the names of the parameters that stay with their client (personalisation)."""
        return set()

    def weight(self, update: ClientUpdate) -> float:
        """Return the client's weight in the sum."""
        if callable(self.weights):
            weight = float(self.weights(update))
            if not 0 <= weight < float("inf"):
                raise MisconfigurationException(
                    f"Expected weights to return a finite number >= 0, got {weight!r} for client {update.client_id!r}."
                )
            return weight
        return float(update.num_examples) if self.weights == "examples" else 1.0

    def narrowed(self, model: Tree, width: float) -> Tree:
        """Return the broadcast model as a client of some width gets it.

        Raises:
            MisconfigurationException: unless the algorithm sums clients of different width.
        """
        instead = "Use algorithm=HeteroFL(), or leave out width and AdaptiveWidth."
        if self.asynchronous:
            instead = "Use algorithm=BufferedHeteroFL(...), or leave out width and AdaptiveWidth."
        raise MisconfigurationException(
            f"{type(self).__name__} sums whole models, and a client was asked to train {width:g} of its width. "
            f"{instead}"
        )

    def check_narrow(self, module: nn.Module, names: Collection[str]) -> None:
        """Raise when clients of smaller width would not be parts of this module; asked before the first of them trains.

        Args:
            module: the user's module.
            names: of the parameters that travel, in their order.
        """

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        """Return the client's summand and its next memory (``None`` keeps the old one)."""
        weight = self.weight(update)
        return Contribution({"delta": scaled(update.delta, weight)}, {"weight": weight}), None

    # ---- server half -------------------------------------------------------------------------------------------

    def init_state(self, model: Tree) -> State:
        """Return the server's state before the first round: tensors and primitives only."""
        return {}

    def broadcast(self, state: State) -> Mapping[str, Tree]:
        """Return the trees that go to the clients beside ``"model"`` and ``"buffers"``."""
        return {}

    def schedule(self) -> Schedule | None:
        """Return who works when, if the algorithm itself decides that; ``None`` leaves it to the trainer."""
        return None

    def opened(self, contribution: Contribution, task: ClientTask) -> Contribution:
        """Return what a decoded contribution can be: a lossy transform may have filled what was empty."""
        return contribution

    def receive(self, contribution: Contribution, arrival: Arrival) -> Contribution:
        """Return what of an update that arrived is added to the sum; its tensors stay unchanged."""
        return contribution

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        """Turn the sum into the server optimizer's gradient.

        Args:
            total: the sum of the cohort's contributions.
            state: the server's state.
            num_clients: size of the population.

        Returns:
            The pseudo-gradient and the next state.
        """
        weight = total.scalars["weight"]
        if not weight > 0:
            raise MisconfigurationException(
                f"Expected a positive sum of client weights, got {weight}. {self._no_weight()}"
            )
        # divided, so that a single client's update comes out to 1 ulp whatever its weight
        return divided(total.trees["delta"], -weight), state

    def _no_weight(self) -> str:
        if callable(self.weights):
            return (
                "The callable that was given as weights returned 0 for every client of this cohort: return a positive "
                "number for some, or use weights='uniform'."
            )
        return (
            f"With weights={self.weights!r} every client of this cohort reports no examples: give the population "
            "client_size(id), or use weights='uniform'."
        )

    def check_cohort(self, num_clients: int) -> None:
        """Raise when the algorithm is not defined for a cohort of this size; asked before and after it trains."""

    def root_data(self) -> Any:
        """Return a loader on which the server itself trains in each round, or ``None``; see ``Cohort.root``."""
        return None

    def combine(self, cohort: Cohort, state: State, num_clients: int) -> tuple[Tree, State]:
        """Turn every single contribution into the server optimizer's gradient; asked instead of :meth:`apply` when
        ``linear`` is false.

        Args:
            cohort: the contributions, in an order that depends on the clients' ids only.
            state: the server's state.
            num_clients: size of the population.

        Returns:
            The pseudo-gradient and the next state.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is not linear and must define combine(cohort, state, num_clients)."
        )


def _check_maker(name: str, value: object, example: str) -> None:
    """Raise for an optimizer (or its name) where a function that makes one is expected."""
    if value is not None and (isinstance(value, Optimizer | LRScheduler) or not callable(value)):
        raise MisconfigurationException(
            f"Expected {name} to be a function that makes one, because the server's parameters exist only in the fit, "
            f"got {value!r}. Write {name}={example}."
        )
