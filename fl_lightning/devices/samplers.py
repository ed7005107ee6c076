"""Samplers that learn from the reports: one for speed to accuracy, one for fairness."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fl_lightning.errors import MisconfigurationException
from fl_lightning.schedules.plan import Delivery, Plan
from fl_lightning.schedules.sampling import Sampler, UniformSampler
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, Population

__all__ = ["FairSampler", "OortSampler"]


class OortSampler(Sampler):
    r"""Devices whose updates are large and fast, with a share of devices that nobody knows yet.

    .. math:: U_k = \left(n_k \frac{\lVert \delta_k \rVert}{\text{steps}_k} + \sqrt{\frac{0.1 \log R}{R_k}} \, \bar U
        \right) \left(\frac{T}{t_k}\right)^{\alpha \, [T < t_k]}

    with :math:`R` the round, :math:`R_k` the round of the client's last report, :math:`t_k` its seconds from broadcast
    to report, and :math:`\bar U` the largest utility so far, which gives the bonus of clients that were not seen for
    long the right unit. ``exploration`` of the places go to unexplored clients, uniformly, and shrink by ``decay`` each
    round to ``least_exploration``. The others go, with probability proportional to utility, to explored clients with at
    least ``cutoff`` times the utility of the last one that would fit.

    It learns from each client's own update norm, which secure aggregation would hide.

    Args:
        preferred_seconds: :math:`T`; slower clients are penalised. ``None`` is the median of the seconds seen.
        penalty: :math:`\alpha` >= 0; 0 looks at the updates only.
        exploration: first share of unexplored clients, in [0, 1].
        decay: of that share a round, in (0, 1].
        least_exploration: the last share, in [0, 1].
        cutoff: in (0, 1].

    Raises:
        MisconfigurationException: for numbers out of these ranges.

    Example:
        >>> OortSampler(penalty=0.5).exploration
        0.9

    References:
        Lai et al., *Oort: Efficient Federated Learning via Guided Participant Selection*, OSDI 2021, algorithm 1. There
        the statistical part is :math:`n_k \sqrt{\text{mean}(\text{loss}^2)}`, a stand-in for the gradient norm, which
        the update norm a step is nearer to; unexplored clients are drawn by speed; a pacer moves :math:`T`; and clients
        that took part too often are left out. None of these three is here.
    """

    def __init__(
        self,
        preferred_seconds: float | None = None,
        penalty: float = 2.0,
        exploration: float = 0.9,
        decay: float = 0.98,
        least_exploration: float = 0.2,
        cutoff: float = 0.95,
    ) -> None:
        if preferred_seconds is not None and not 0 < preferred_seconds < math.inf:
            raise MisconfigurationException(f"OortSampler expected preferred_seconds > 0, got {preferred_seconds!r}.")
        if not 0 <= penalty < math.inf:
            raise MisconfigurationException(f"OortSampler expected penalty >= 0, got {penalty!r}.")
        for name, share, lowest in (
            ("exploration", exploration, 0.0),
            ("least_exploration", least_exploration, 0.0),
            ("decay", decay, 1e-9),
            ("cutoff", cutoff, 1e-9),
        ):
            if not lowest <= share <= 1:
                raise MisconfigurationException(f"OortSampler expected {name} in [0, 1], got {share!r}.")
        self.preferred_seconds, self.penalty = preferred_seconds, penalty
        self.exploration, self.decay = exploration, decay
        self.least_exploration, self.cutoff = least_exploration, cutoff
        self._known: dict[ClientId, tuple[float, float, int]] = {}  # utility, seconds, round

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        ids = population.client_ids()
        if size >= len(ids) and not self._known:
            return list(ids)
        size = min(size, len(ids))
        draw = random.Random(seed_for(seed, round, None, "cohort"))
        scored = self._scored(ids, round)
        share = max(self.least_exploration, self.exploration * self.decay**round)
        unexplored = len(ids) - len(scored)
        explore = min(unexplored, max(size - len(scored), math.floor(share * size + draw.random())))
        exploit = size - explore
        return self._exploited(scored, exploit, draw) + self._unexplored(ids, explore, draw)

    def _scored(self, ids: Sequence[ClientId], round: int) -> list[tuple[float, ClientId]]:
        present = ids if isinstance(ids, range) else set(ids)
        known = {client_id: row for client_id, row in self._known.items() if client_id in present}
        seconds = sorted(row[1] for row in known.values())
        limit = self.preferred_seconds or (seconds[len(seconds) // 2] if seconds else 1.0)
        largest = max((row[0] for row in known.values()), default=0.0)
        found = []
        for client_id, (utility, took, last) in known.items():
            value = utility + math.sqrt(0.1 * math.log(max(round, 1)) / (last + 1)) * largest
            if took > limit > 0:
                value *= (limit / took) ** self.penalty
            found.append((value, client_id))
        found.sort(key=lambda pair: -pair[0])
        return found

    def _exploited(self, scored: list[tuple[float, ClientId]], size: int, draw: random.Random) -> list[ClientId]:
        if not size:
            return []
        least = self.cutoff * scored[size - 1][0]
        pool = [pair for pair in scored if pair[0] >= least]
        # successive draws with probability proportional to utility, as Efraimidis and Spirakis' keys do them
        keys = [math.log(1.0 - draw.random()) / max(value, 1e-300) for value, _ in pool]
        order = sorted(range(len(pool)), key=lambda index: -keys[index])
        return [pool[index][1] for index in order[:size]]

    def _unexplored(self, ids: Sequence[ClientId], size: int, draw: random.Random) -> list[ClientId]:
        chosen: dict[ClientId, None] = {}
        for _ in range(20 * size):  # nearly everyone in a large population is unexplored
            if len(chosen) == size:
                return list(chosen)
            client_id = ids[draw.randrange(len(ids))]
            if client_id not in self._known:
                chosen[client_id] = None
        rest = [client_id for client_id in ids if client_id not in self._known and client_id not in chosen]
        return [*chosen, *draw.sample(rest, size - len(chosen))]

    def learn(self, plan: Plan, deliveries: Sequence[Delivery]) -> None:
        by_id = {dispatch.dispatch_id: dispatch for dispatch in plan.dispatches}
        for delivery in deliveries:
            dispatch = by_id[delivery.dispatch_id]
            if delivery.failure is None:
                utility = delivery.num_examples * delivery.update_norm / max(delivery.num_steps, 1)
                took = dispatch.done_at - dispatch.sent_at
                self._known[delivery.client_id] = utility, took, dispatch.version

    def state_dict(self) -> dict[str, Any]:
        rows = list(self._known.values())
        return {
            "ids": list(self._known),
            "utilities": torch.tensor([row[0] for row in rows], dtype=torch.float64),
            "seconds": torch.tensor([row[1] for row in rows], dtype=torch.float64),
            "rounds": torch.tensor([row[2] for row in rows], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        columns = [state[name].tolist() for name in ("utilities", "seconds", "rounds")]
        self._known = dict(zip(state["ids"], zip(*columns, strict=True), strict=True))


class FairSampler(Sampler):
    """Of a random set of candidates those that delivered least often, so that availability does not decide who counts.

    Devices that are often eligible are proposed as often as others and chosen less; slow devices still have to make the
    deadline (``stragglers="partial"`` lets them).

    Args:
        candidates: candidates for each place, >= 1; 1 is the uniform sampler, more are fairer.

    Raises:
        MisconfigurationException: for fewer than one candidate a place.

    Example:
        >>> FairSampler(candidates=4).candidates
        4
    """

    def __init__(self, candidates: float = 3.0) -> None:
        if not 1 <= candidates < math.inf:
            raise MisconfigurationException(
                f"FairSampler expected candidates to be finite and >= 1, got {candidates!r}."
            )
        self.candidates = candidates
        self._counts: dict[ClientId, int] = {}

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        num_clients = len(population.client_ids())
        looked_at = min(num_clients, math.ceil(size * self.candidates))
        proposed = UniformSampler().cohort(population, looked_at, seed, round)
        if looked_at == num_clients:  # in the population's order: ties must go by chance
            random.Random(seed_for(seed, round, None, "cohort")).shuffle(proposed)
        # `sorted` is stable: clients with equal counts keep the random order of the draw
        return sorted(proposed, key=lambda client_id: self._counts.get(client_id, 0))[:size]

    def learn(self, plan: Plan, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.failure is None:
                self._counts[delivery.client_id] = self._counts.get(delivery.client_id, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"ids": list(self._counts), "counts": torch.tensor(list(self._counts.values()), dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = dict(zip(state["ids"], state["counts"].tolist(), strict=True))
