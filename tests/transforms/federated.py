"""A small federation with transforms, always from the same weights."""

from __future__ import annotations

from typing import Any

import torch
from spine_zoo import Classifier, fit_federated, sites, weights
from torch import Tensor

__all__ = ["START", "train"]

START = weights(Classifier(hidden=6))


def train(
    transforms: Any, kind: type[Classifier] = Classifier, hidden: int = 6, **arguments: Any
) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(0)
    module = kind(hidden=hidden)
    if hidden == 6:
        module.load_state_dict(START)
    arguments = {"max_rounds": 3, "num_threads": 1, "log_clients": False, **arguments}
    trainer = fit_federated(module, sites(3), transforms=transforms, **arguments)
    return weights(module), trainer
