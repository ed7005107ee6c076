"""What ``ckpt_path="last"`` means: the newest run of this name, and its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fl_lightning.reporting import continue_folder, continue_runs, newest_checkpoint, newest_version

__all__ = ["last_to_evaluate", "last_to_fit"]


def last_to_fit(loggers: Sequence[Logger], callbacks: Iterable[Any]) -> str | None:
    """Return the checkpoint to go on from, and make the loggers go on in its folder; ``None`` starts anew.

    Args:
        loggers: the federation's loggers, none of which has logged yet.
        callbacks: its checkpoint callbacks; one with a ``dirpath`` of its own keeps checkpoints there.
    """
    elsewhere = _elsewhere(callbacks)
    if elsewhere is not None:  # the checkpoint says which folder its run logs to
        continue_folder(loggers, elsewhere)
        return elsewhere
    if not loggers:
        return "last"  # Lightning looks in the default folder
    folder = continue_runs(loggers)
    path = None if folder is None else newest_checkpoint(folder)
    if path is None:
        rank_zero_warn("ckpt_path='last' finds no checkpoint of a run of this name: the federation starts anew.")
    return path


def last_to_evaluate(loggers: Sequence[Logger], callbacks: Iterable[Any]) -> str:
    """Return the newest checkpoint of the newest run.

    Raises:
        MisconfigurationException: when there is none: an untrained model is not what was asked for.
    """
    found = _elsewhere(callbacks)
    version = newest_version(loggers[0]) if loggers else None
    if found is None and version is not None:
        name = version if isinstance(version, str) else f"version_{version}"
        found = newest_checkpoint(os.path.join(str(getattr(loggers[0], "root_dir", "")), name))
    if found is None:
        raise MisconfigurationException(
            "ckpt_path='last' finds no checkpoint of a run of this name. Pass the path of a checkpoint."
        )
    return found


def _elsewhere(callbacks: Iterable[Any]) -> str | None:
    folders = [str(callback.dirpath) for callback in callbacks if getattr(callback, "dirpath", None)]
    found = [path for path in map(newest_checkpoint, folders) if path is not None]
    return max(found, key=os.path.getmtime) if found else None
