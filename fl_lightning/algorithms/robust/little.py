"""A little is enough: attackers that know each other stay just inside the honest spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fl_lightning.algorithms.base import Algorithm, State
from fl_lightning.algorithms.robust.cohort import Block, Cohort
from fl_lightning.callbacks.attacks import LittleIsEnough
from fl_lightning.callbacks.checks import finite
from fl_lightning.types import ClientId, ClientTask, ClientUpdate, Contribution, Memory, Phase, Tree

__all__ = ["ALittleIsEnough", "colluding", "little_z"]


class ALittleIsEnough(Algorithm):
    r"""Puts an algorithm under attack by clients that collude (for research and tests).

    .. math:: \delta_k \leftarrow \mu - z\,\sigma \qquad \text{for every attacker } k

    with mean and standard deviation of the updates by coordinate. The shift is small against the spread of honest
    clients, so distances do not give it away, and it is the same in every attacker, so it does not average out.

    One client's callback cannot know the others' updates; this wrapper sees the whole cohort. Beside the other attacks,
    which are callbacks, :class:`~fl_lightning.callbacks.attacks.LittleIsEnough` says the same.

    Args:
        algorithm: what is attacked: one whose clients contribute one update and its weight (``FedAvg``, adaptive
            servers, robust rules). Running statistics are aggregated by their median, as robust rules do.
        clients: ids of the attackers; they act when they are in a cohort. A client whose weight is 0 sends nothing:
            it is no attacker, nobody knows its update, and the size of the cohort is without it.
        z: size of the shift in standard deviations; ``None`` takes the paper's for the size of the cohort.
        omniscient: attackers know everyone's updates. Without, they know each other's, and need to be two or more.

    Raises:
        MisconfigurationException: for no attacker, a ``z`` that is not finite, or an algorithm that contributes
            something else.

    Example:
        >>> from fl_lightning.algorithms.fedavg import FedAvg
        >>> sent = [Contribution({"delta": {"w": torch.tensor([x])}}, {"weight": 1.0}) for x in (1.0, 3.0, 9.0)]
        >>> attack = ALittleIsEnough(FedAvg(), clients=["a", "c"], z=2.0, omniscient=False)  # of 1 and 9: 5 - 2 * 4
        >>> gradient, _ = attack.combine(Cohort("abc", sent), {}, num_clients=3)
        >>> gradient["w"].tolist()  # of -3, 3 and -3
        [1.0]

    References:
        Baruch et al., *A Little Is Enough: Circumventing Defenses For Distributed Learning*, 2019, algorithm 3.
    """

    linear = False

    def __init__(
        self, algorithm: Algorithm, clients: Sequence[ClientId], z: float | None = None, omniscient: bool = True
    ) -> None:
        if not isinstance(algorithm, Algorithm):
            raise MisconfigurationException(
                f"ALittleIsEnough expected the algorithm that is attacked, such as FedAvg(), got {algorithm!r}."
            )
        if algorithm.asynchronous:
            raise MisconfigurationException(
                f"ALittleIsEnough needs the updates of a cohort side by side, and those of {type(algorithm).__name__} "
                "arrive one by one. Attack an algorithm in rounds such as FedAvg(), or use a callback (SignFlip)."
            )
        super().__init__(algorithm.server_optimizer, algorithm.server_lr_scheduler, algorithm.weights)
        if isinstance(clients, str) or not clients:
            raise MisconfigurationException(
                f"ALittleIsEnough expected a list of the attackers' ids, got {clients!r}. Write clients=[3, 7]."
            )
        self.algorithm = algorithm
        self.clients = list(clients)
        hint = "None takes the paper's for the size of the cohort"
        self.z = None if z is None else finite("ALittleIsEnough", "z", z, hint)
        self.omniscient = omniscient

    @property
    def fewest_clients(self) -> int:
        return self.algorithm.fewest_clients

    def check_cohort(self, num_clients: int) -> None:
        self.algorithm.check_cohort(num_clients)

    def client_callbacks(self) -> list[Callback]:
        return self.algorithm.client_callbacks()

    def phases(self, task: ClientTask) -> list[Phase]:
        return self.algorithm.phases(task)

    def local_parameters(self, module: nn.Module) -> set[str]:
        return self.algorithm.local_parameters(module)

    def root_data(self) -> Any:
        return self.algorithm.root_data()

    def init_state(self, model: Tree) -> State:
        return self.algorithm.init_state(model)

    def broadcast(self, state: State) -> Mapping[str, Tree]:
        return self.algorithm.broadcast(state)

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        contribution, kept = self.algorithm.contribute(update, task, memory)
        if contribution.trees.keys() != {"delta"} or contribution.scalars.keys() != {"weight"}:
            raise MisconfigurationException(
                f"ALittleIsEnough attacks algorithms whose clients contribute one update and its weight, and those of "
                f"{type(self.algorithm).__name__} contribute {sorted(contribution.trees)} and "
                f"{sorted(contribution.scalars)}. Attack it by a callback (SignFlip, LabelFlip)."
            )
        return contribution, kept

    def combine(self, cohort: Cohort, state: State, num_clients: int) -> tuple[Tree, State]:
        # a linear algorithm's clients have multiplied their update by their weight, and by 0 nothing is left to be seen
        factors = [float(scalars["weight"]) if self.algorithm.linear else 1.0 for scalars in cohort.scalars]
        counted = [position for position, factor in enumerate(factors) if factor > 0]
        attackers = [position for position in counted if cohort.client_ids[position] in self.clients]
        knows = counted if self.omniscient else attackers
        if attackers and len(knows) > 1:
            z = little_z(len(counted), len(attackers)) if self.z is None else self.z
            cohort = _Attacked(cohort, attackers, knows, z, factors)
        if not self.algorithm.linear:
            return self.algorithm.combine(cohort, state, num_clients)
        total = Contribution(
            {"delta": cohort.coordinatewise("delta", lambda rows: rows.sum(dim=0))},
            {"weight": sum(scalars["weight"] for scalars in cohort.scalars)},
        )
        return self.algorithm.apply(total, state, num_clients)


def colluding(algorithm: Algorithm, callbacks: Sequence[Callback]) -> tuple[Algorithm, list[Callback]]:
    """Return the algorithm under the attacks of clients that collude, and the callbacks that act on clients.

    Example:
        >>> from fl_lightning.algorithms.fedavg import FedAvg
        >>> attacked, left = colluding(FedAvg(), [LittleIsEnough(clients=["a", "c"])])
        >>> type(attacked).__name__, attacked.omniscient, left
        ('ALittleIsEnough', False, [])
    """
    for callback in callbacks:
        if isinstance(callback, LittleIsEnough):
            algorithm = ALittleIsEnough(algorithm, callback.clients, callback.z, callback.omniscient)
    return algorithm, [callback for callback in callbacks if not isinstance(callback, LittleIsEnough)]


class _Attacked(Cohort):
    """A cohort in which the attackers' updates are replaced, block by block."""

    def __init__(
        self, cohort: Cohort, attackers: Sequence[int], knows: Sequence[int], z: float, factors: Sequence[float]
    ) -> None:
        super().__init__(cohort.client_ids, [], cohort.root)
        self.scalars = cohort.scalars
        self._cohort = cohort
        self._attackers, self._knows, self._z = list(attackers), list(knows), z
        self._factors = list(factors)

    def template(self, tree: str) -> Tree:
        return self._cohort.template(tree)

    def blocks(self, tree: str = "delta") -> Iterator[Block]:
        for block in self._cohort.blocks(tree):
            yield Block(block.name, block.begin, self._replaced(block.rows)) if tree == "delta" else block

    def _replaced(self, rows: Tensor) -> Tensor:
        factors = torch.tensor(self._factors, dtype=torch.float64, device=rows.device)[:, None]
        known = rows[self._knows].double() / factors[self._knows]
        shifted = known.mean(dim=0) - self._z * known.std(dim=0, correction=0)
        rows = rows.clone()
        rows[self._attackers] = (factors[self._attackers] * shifted).to(rows.dtype)
        return rows


def little_z(num_clients: int, num_attackers: int) -> float:
    r"""Return the largest shift that a majority of the clients still covers.

    .. math:: z = \Phi^{-1}\Bigl(\frac{n - m - s}{n - m}\Bigr), \qquad s = \lfloor n/2 + 1 \rfloor - m

    Args:
        num_clients: :math:`n`.
        num_attackers: :math:`m` of them.

    Returns:
        The shift in standard deviations, >= 0.

    Example:
        >>> round(little_z(50, 24), 2)  # two of 26 honest workers will support them
        1.43
    """
    honest = num_clients - num_attackers
    if honest < 1:
        return 0.0
    supporters = num_clients // 2 + 1 - num_attackers
    quantile = (honest - supporters) / honest
    # attackers in the majority need no supporter, and Φ⁻¹(1) is infinite
    return max(0.0, NormalDist().inv_cdf(min(max(quantile, 0.5), 0.999)))
