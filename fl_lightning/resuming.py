"""What ``ckpt_path="last"`` and ``"best"`` mean: checkpoints of the newest run of this name, and its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fl_lightning.reporting import continue_folder, continue_runs, newest_checkpoint, newest_version
from fl_lightning.reporting.versions import is_whole

__all__ = [
    "best_to_evaluate",
    "last_to_evaluate",
    "last_to_fit",
    "old_folders",
    "on_device",
    "require_best",
    "require_whole",
]


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


def last_to_evaluate(loggers: Sequence[Logger], callbacks: Iterable[Any], word: str = "last") -> str:
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
            f"ckpt_path={word!r} finds no checkpoint of a run of this name. Pass the path of a checkpoint."
        )
    return found


def best_to_evaluate(loggers: Sequence[Logger], callbacks: Iterable[Any]) -> str:
    """Return the best checkpoint of the newest run, as its ``ModelCheckpoint`` has it.

    Raises:
        MisconfigurationException: when there is none.
    """
    newest = last_to_evaluate(loggers, callbacks, "best")
    require_whole(newest)
    states = torch.load(newest, map_location="cpu", weights_only=True).get("callbacks", {})
    folder = Path(newest).parent
    for state in states.values():
        # the run's folder may have been moved since
        best = folder / Path(state.get("best_model_path") or "").name if isinstance(state, dict) else folder
        if best.is_file():
            return str(best)
    raise MisconfigurationException(
        f"ckpt_path='best' finds no best checkpoint beside {newest!r}: no ModelCheckpoint of that run has one. Pass "
        "the path of a checkpoint, or ckpt_path='last'."
    )


def require_best(callbacks: Iterable[Any]) -> None:
    """Raise when ``fit(ckpt_path="best")`` has no best checkpoint of a fit before.

    Raises:
        MisconfigurationException: says what to pass.
    """
    if not any(getattr(callback, "best_model_path", "") for callback in callbacks):
        raise MisconfigurationException(
            "ckpt_path='best' goes on from the best checkpoint of the last fit of this trainer, and there was none. "
            "Pass ckpt_path='last' to go on with the newest run, or the path of a checkpoint."
        )


def require_whole(path: str | os.PathLike[str]) -> None:
    """Raise when a local file is no whole checkpoint, for example because a disk was full or a copy broke off.

    Raises:
        MisconfigurationException: names the other checkpoints beside it.
    """
    file = Path(path)
    if not file.is_file() or is_whole(file):
        return
    others = sorted(str(other) for other in file.parent.glob("*.ckpt") if other != file and is_whole(other))
    raise MisconfigurationException(
        f"{str(file)!r} is no whole checkpoint: its {file.stat().st_size} bytes are cut off, or it is another kind of "
        f"file. Go on from {' or '.join(others) if others else 'another checkpoint'}."
    )


def _elsewhere(callbacks: Iterable[Any]) -> str | None:
    folders = [str(callback.dirpath) for callback in callbacks if getattr(callback, "dirpath", None)]
    found = [path for path in map(newest_checkpoint, folders) if path is not None]
    return max(found, key=os.path.getmtime) if found else None


def old_folders(saved: str, ckpt_path: Any) -> list[Path]:
    """Return the folders that may hold the run of a checkpoint: where it was, and where its file is now."""
    candidates = [Path(saved)]
    if ckpt_path:
        candidates.append(Path(str(ckpt_path)).resolve().parent.parent)  # <version>/checkpoints/<file>
    return [folder for folder in candidates if folder.is_dir()]


def on_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of nested dictionaries and lists, as a checkpoint holds them."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [on_device(item, device) for item in value]
    return value
