"""FLTrust: the server trains on a little clean data of its own, and trusts who agrees with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.algorithms.base import OptimizerCallable, SchedulerCallable
from fl_lightning.algorithms.robust.base import RobustAlgorithm, count_of
from fl_lightning.algorithms.robust.cohort import Cohort
from fl_lightning.data.loaders import ClientLoaders, recorded_arguments
from fl_lightning.seeding import seed_for

__all__ = ["FLTrust"]


class FLTrust(RobustAlgorithm):
    r"""The mean of the updates, scaled to the norm of the server's own and weighted by agreement with it.

    .. math:: w_{t+1} = w_t + \frac{1}{\sum_k T_k} \sum_k T_k \frac{\lVert \delta_0 \rVert}{\lVert \delta_k \rVert}
        \delta_k, \qquad T_k = \max\bigl(0, \cos(\delta_k, \delta_0)\bigr)

    In each round the server trains on its root data exactly as a client would (the same module, epochs and learning
    rates) and gets :math:`\delta_0`. Clients whose updates point elsewhere have no say, whatever their number; with
    nobody to trust the model stays as it is. The root data stay with the server.

    Args:
        root: the server's clean data: a train loader, a ``LightningDataModule``, or a function that returns one.
        num_examples: draw so many examples from ``root``, uniformly; ``None`` uses all. The paper's 100 will do.
        seed: root of that draw.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for root data without a loader, or with fewer than ``num_examples``.

    Example:
        >>> from fl_lightning.types import Contribution
        >>> sent = [Contribution({"delta": {"w": torch.tensor(u)}}, {"weight": 1.0}) for u in ([3.0, 0.0], [-9.0, 0.0])]
        >>> cohort = Cohort("ab", sent, root={"w": torch.tensor([1.0, 0.0])})
        >>> FLTrust(root=[]).aggregate(cohort)["w"].tolist()  # the first agrees, the second does not
        [1.0, 0.0]

    References:
        Cao et al., *FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping*, 2021, algorithm 2. The
        paper's global learning rate is ``server_optimizer``'s.
    """

    def __init__(
        self,
        root: LightningDataModule | Iterable[Any] | Callable[[], Any],
        num_examples: int | None = None,
        seed: int = 0,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(0, server_optimizer, server_lr_scheduler)
        self.root = root
        self.num_examples = num_examples if num_examples is None else count_of(self, "num_examples", num_examples, 1)
        self.seed = seed
        self._loader: Any = None

    def root_data(self) -> Any:
        if self._loader is None:
            with recorded_arguments():
                self._loader = _opened(self.root)
            if self.num_examples is not None:
                self._loader = self._drawn(self._loader, self.num_examples)
        return self._loader

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        assert cohort.root is not None, "the federation trains on root_data before it asks for the aggregate"
        products = torch.zeros(len(cohort), dtype=torch.float64)
        squares = torch.zeros(len(cohort), dtype=torch.float64)
        for block in cohort.blocks("delta"):
            rows = block.rows.cpu().double()
            own = cohort.root[block.name].reshape(-1)[block.begin : block.begin + rows.shape[1]].cpu().double()
            products += (rows * own).sum(dim=1)
            squares += rows.square().sum(dim=1)
        norm = torch.stack([tensor.cpu().double().square().sum() for tensor in cohort.root.values()]).sum().sqrt()
        sizes = squares.sqrt()
        # an update of zero (or the server's) has no direction and agrees with nobody
        trust = (products / (sizes * norm)).nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
        if not bool(trust.sum() > 0):
            return cohort.mixture("delta", torch.zeros(len(cohort)))
        shares = trust / trust.sum() * norm / sizes
        return cohort.mixture("delta", shares.nan_to_num(0.0, 0.0, 0.0))

    def _drawn(self, loader: Any, count: int) -> Any:
        loaders = ClientLoaders(loader, "the root data")
        length = len(loaders.dataset)
        if length < count:
            raise MisconfigurationException(
                f"FLTrust expected root data of at least num_examples={count} examples, got {length}. Ask for fewer, "
                "or leave num_examples out to use all."
            )
        draw = np.random.default_rng(seed_for(self.seed, -1, None, "root data"))
        return loaders.build(np.sort(draw.choice(length, count, replace=False)))


def _opened(root: Any) -> Any:
    """Return the loader behind root data."""
    if callable(root) and not hasattr(root, "train_dataloader"):
        root = root()
    if callable(getattr(root, "train_dataloader", None)):
        for hook, arguments in (("prepare_data", ()), ("setup", ("fit",))):
            if callable(getattr(root, hook, None)):
                getattr(root, hook)(*arguments)
        root = root.train_dataloader()
    if root is None or not hasattr(root, "__iter__"):
        raise MisconfigurationException(
            f"FLTrust expected root data as a train loader, a LightningDataModule or a function that returns one, got "
            f"{type(root).__name__}. Write FLTrust(root=DataLoader(clean_data, batch_size=32))."
        )
    return root
