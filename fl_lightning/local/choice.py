"""Which loop runs the clients: a pure function of the module, the algorithm and the configuration."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.errors import MisconfigurationException
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.lightning_loop import LightningLoop
from fl_lightning.local.settings import LocalSettings

__all__ = ["choose_loop"]


def choose_loop(module: pl.LightningModule, algorithm: Algorithm, settings: LocalSettings) -> LightningLoop:
    """Return the loop for ``local_loop``, and say once which and why.

    ``"auto"`` takes the lean loop for a plain module and Lightning's Trainer for any other; no clock has a say, so
    every process of a group and every resumed run takes the same.

    Args:
        module: a copy of the user's module, which is the loop's from now on.
        algorithm: gives the client callbacks.
        settings: how clients train, ``local_loop`` and ``group_size`` included.

    Raises:
        MisconfigurationException: for ``local_loop="lean"`` with a module or callback that needs a real Trainer.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
        >>> choose_loop(BoringModel(), Algorithm(), LocalSettings()).__class__.__name__
        'LeanLoop'
        >>> choose_loop(ManualOptimBoringModel(), Algorithm(), LocalSettings()).__class__.__name__
        'LightningLoop'
    """
    if settings.local_loop == "lightning":
        rank_zero_info("Clients train in LightningLoop, as local_loop='lightning' asks.")
        return LightningLoop(module, algorithm, settings)
    loop = LeanLoop(module, algorithm, settings)
    if loop.reason is None:
        rank_zero_info(f"Clients train in LeanLoop: {type(module).__name__} is plain. {_grouping(loop)}")
        return loop
    if settings.local_loop == "lean":
        raise MisconfigurationException(
            "Expected a plain module for local_loop='lean' (automatic optimization, one optimizer, no exotic hooks), "
            f"but {loop.reason}. Use local_loop='auto' or 'lightning'."
        )
    rank_zero_info(f"Clients train in LightningLoop: {loop.reason}.")
    return LightningLoop(module, algorithm, settings)


def _grouping(loop: LeanLoop) -> str:
    together = loop.together
    if loop.groups:
        return f"Groups of at most {together.size} of a lane train at once, if they can."
    if together.reason is not None:
        return f"They train one at a time: {together.reason}."
    if loop.settings.group_size == "auto":
        return "They train one at a time: a group of them would be slower on a CPU."
    return "They train one at a time, as group_size=1 asks."
