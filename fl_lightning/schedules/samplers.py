"""More ways to choose a cohort: by chance, by size, by loss, in turn, from a list; all pure in (seed, round)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.callbacks.checks import flag, is_number
from fl_lightning.schedules.sampling import Sampler, UniformSampler
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId, Population

__all__ = ["FixedSampler", "PoissonSampler", "PowerOfChoiceSampler", "RoundRobinSampler", "SizeSampler"]


class PoissonSampler(Sampler):
    """Every client takes part with the same probability, independently of the others.

    The size of the cohort is then random, with mean ``rate * number of clients``; accounting of differential privacy
    is tightest for this sampling. The work grows with the cohort and not with the population.

    A cohort may come out empty, with probability ``(1 - rate) ** number of clients``. Such a round counts: model,
    server optimizer and the state of the algorithm stay as they are, and the report's cohort is empty. With
    ``min_clients`` above 1 it is an error instead.

    Args:
        rate: probability in (0, 1]; ``None`` takes ``clients_per_round / number of clients``.

    Raises:
        MisconfigurationException: for a rate outside of (0, 1].

    Example:
        >>> class Thousand:
        ...     def client_ids(self): return range(1000)
        ...     def client_dataloader(self, client_id): return []
        >>> sizes = [len(PoissonSampler(0.1).cohort(Thousand(), 0, seed=0, round=r)) for r in range(200)]
        >>> min(sizes) < 95 < sum(sizes) / 200 < 105 < max(sizes)
        True
    """

    may_draw_nobody = True

    def __init__(self, rate: float | None = None) -> None:
        if rate is not None and (not is_number(rate) or not 0 < rate <= 1):
            raise MisconfigurationException(
                f"PoissonSampler expected rate to be a probability in (0, 1], got {rate!r}. Leave it out to take "
                "clients_per_round / number of clients."
            )
        self.rate = rate

    def advice(self, num_clients: int) -> str:
        if self.rate is None:
            drawn, more = "clients_per_round / number of clients", "clients_per_round"
        else:
            drawn, more = f"rate={self.rate:g}", "rate"
        needed = min(1.0, 10 / max(1, num_clients))
        return (
            f"PoissonSampler draws each of {num_clients} clients by itself ({drawn}), so a cohort's size is random "
            f"and may be zero. Leave min_clients at 1, where a round without clients is one in which the model stays, "
            f"or raise {more}: with 10 clients a round on average (a rate of {needed:g}) one round in 20000 or fewer "
            "is empty. UniformSampler() draws cohorts of one size."
        )

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        ids = population.client_ids()
        rate = self.rate if self.rate is not None else min(1.0, size / max(1, len(ids)))
        if rate == 1:
            return list(ids)
        draw = random.Random(seed_for(seed, round, None, "cohort"))
        chosen: list[ClientId] = []
        index = -1
        while True:
            # the gaps between independent coin flips that succeed are geometric, so failures need no draw
            index += 1 + int(math.log(1.0 - draw.random()) / math.log1p(-rate))
            if index >= len(ids):
                return chosen
            chosen.append(ids[index])


class SizeSampler(Sampler):
    r"""``size`` clients without replacement, one after the other with probability proportional to their size.

    Client :math:`k` gets the key :math:`u_k^{1/n_k}` with :math:`u_k` uniform, and the largest keys win. Use
    ``weights="uniform"`` beside it, as FedProx does: a client that is drawn by its size and weighed by its size counts
    twice. The population must know ``client_size(id)``.

    Example:
        >>> class Two:
        ...     def client_ids(self): return ["small", "large"]
        ...     def client_dataloader(self, client_id): return []
        ...     def client_size(self, client_id): return {"small": 1, "large": 3}[client_id]
        >>> drawn = [SizeSampler().cohort(Two(), 1, seed=0, round=r)[0] for r in range(1000)]
        >>> 700 < drawn.count("large") < 800
        True

    References:
        Efraimidis and Spirakis, *Weighted Random Sampling with a Reservoir*, 2006, algorithm A.
    """

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        ids = population.client_ids()
        if size >= len(ids):
            return list(ids)
        draw = random.Random(seed_for(seed, round, None, "cohort"))
        # the logarithm of the key keeps apart what underflows to the same power
        keys = [math.log(1.0 - draw.random()) / _size(population, client_id) for client_id in ids]
        order = sorted(range(len(ids)), key=lambda index: -keys[index])
        return [ids[index] for index in order[:size]]


class PowerOfChoiceSampler(Sampler):
    """Of a random set of candidates, those with the highest loss: rounds go where the model is worst.

    Args:
        candidates: how many clients are looked at, at least as many as take part.
        loss: the loss of a client as ``loss(client_id, round)``; pure, for the cohort to be pure. ``None`` asks the
            candidates, as the paper does: each downloads the global model (counted in ``num_bytes_down``), passes
            once over its training data where it lives, and sends its loss back (counted in ``num_bytes_up``). Those
            that are chosen download again when the round begins.
        by_size: draw the candidates by their size, as the paper does; ``False`` draws them uniformly.

    Raises:
        MisconfigurationException: for ``candidates < 1``, or fewer candidates than clients per round.

    Example:
        >>> class Ten:
        ...     def client_ids(self): return range(10)
        ...     def client_dataloader(self, client_id): return []
        >>> sampler = PowerOfChoiceSampler(candidates=10, loss=lambda client_id, round: client_id, by_size=False)
        >>> sampler.cohort(Ten(), 3, seed=0, round=0)
        [9, 8, 7]

    References:
        Cho et al., *Towards Understanding Biased Client Selection in Federated Learning*, 2022, algorithm pow-d.
    """

    def __init__(
        self, candidates: int, loss: Callable[[ClientId, int], float] | None = None, by_size: bool = True
    ) -> None:
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise MisconfigurationException(
                f"PowerOfChoiceSampler expected candidates to be an integer >= 1, got {candidates!r}."
            )
        self.candidates, self.loss, self.by_size = candidates, loss, by_size

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        if self.candidates < size:
            raise MisconfigurationException(
                f"PowerOfChoiceSampler looks at {self.candidates} candidates and cannot choose {size} of them. Set "
                f"candidates to {size} or more, or lower clients_per_round."
            )
        sampler = SizeSampler() if self.by_size else UniformSampler()
        looked_at = sampler.cohort(population, self.candidates, seed, round)
        losses = self._losses(looked_at, round)
        # `sorted` is stable: equal losses keep the random order of the draw
        return sorted(looked_at, key=lambda client_id: -losses[client_id])[:size]

    def _losses(self, client_ids: Sequence[ClientId], round: int) -> dict[ClientId, float]:
        if self.loss is not None:
            return {client_id: self.loss(client_id, round) for client_id in client_ids}
        if self.ask is None:
            raise MisconfigurationException(
                "PowerOfChoiceSampler without a loss asks the clients of a running FederatedTrainer.fit, and none is "
                "running. Give it a function: PowerOfChoiceSampler(candidates, loss=lambda client_id, round: ...)."
            )
        asked = self.ask(client_ids, round)
        # a model that gives NaN somewhere is worst there
        return {client_id: math.inf if math.isnan(loss) else loss for client_id, loss in asked.items()}


class RoundRobinSampler(Sampler):
    """Everyone in turn: the next ``size`` clients of one random order that the seed fixes.

    Every client takes part once before anyone takes part twice, as long as the population stays the same.

    Args:
        shuffle: ``False`` follows the order of ``client_ids()``.

    Raises:
        MisconfigurationException: unless ``shuffle`` is True or False.

    Example:
        >>> class Five:
        ...     def client_ids(self): return "abcde"
        ...     def client_dataloader(self, client_id): return []
        >>> [RoundRobinSampler(shuffle=False).cohort(Five(), 2, seed=0, round=r) for r in range(3)]
        [['a', 'b'], ['c', 'd'], ['e', 'a']]
    """

    def __init__(self, shuffle: bool = True) -> None:
        self.shuffle = flag("RoundRobinSampler", "shuffle", shuffle)

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        ids = population.client_ids()
        size = min(size, len(ids))
        order = list(range(len(ids)))
        if self.shuffle:
            random.Random(seed_for(seed, -1, None, "cohort")).shuffle(order)
        return [ids[order[(round * size + offset) % len(ids)]] for offset in range(size)]


class FixedSampler(Sampler):
    """Cohorts from a list, one for each round; after the last the list starts again.

    Args:
        cohorts: client ids by round; ``clients_per_round`` does not change them.

    Raises:
        MisconfigurationException: for an empty list, or an id that the population does not have.

    Example:
        >>> class Three:
        ...     def client_ids(self): return ["a", "b", "c"]
        ...     def client_dataloader(self, client_id): return []
        >>> [FixedSampler([["a"], ["b", "c"]]).cohort(Three(), 1, seed=0, round=r) for r in range(3)]
        [['a'], ['b', 'c'], ['a']]
    """

    def __init__(self, cohorts: Sequence[Sequence[ClientId]]) -> None:
        if not cohorts or not all(cohorts):
            raise MisconfigurationException(
                f"FixedSampler expected a list of cohorts with at least one client each, got {cohorts!r}. "
                "Write FixedSampler([['a', 'b'], ['c']])."
            )
        self.cohorts = [list(cohort) for cohort in cohorts]

    def cohort(self, population: Population, size: int, seed: int, round: int) -> list[ClientId]:
        chosen = self.cohorts[round % len(self.cohorts)]
        ids = population.client_ids()
        known = ids if isinstance(ids, range) else set(ids)
        unknown = [client_id for client_id in chosen if client_id not in known]
        if unknown:
            raise MisconfigurationException(
                f"FixedSampler names {unknown} in round {round}, and the population has no such client (1 and '1' are "
                f"different ids). It has {len(ids)} clients, the first is {ids[0]!r}."
            )
        return list(chosen)


def _size(population: Population, client_id: ClientId) -> float:
    measure = getattr(population, "client_size", None)
    size = measure(client_id) if callable(measure) else None
    if size is None:
        raise MisconfigurationException(
            f"Sampling by size needs the size of client {client_id!r}, and {type(population).__name__} has no "
            "client_size(id). Add that method to the data module, or use UniformSampler()."
        )
    return max(float(size), 1e-9)  # a client without examples is drawn last, and divides by no zero
