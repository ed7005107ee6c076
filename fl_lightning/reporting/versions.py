"""Where a run goes on: its newest version folder and the newest checkpoint in it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from fl_lightning.reporting.client_curves import is_logger
from fl_lightning.reporting.csv_history import continue_csv

__all__ = [
    "continue_folder",
    "continue_runs",
    "continue_version",
    "folders",
    "is_whole",
    "keeps_versions",
    "newest_checkpoint",
    "newest_version",
]

_FILE_LOGGERS = ("TensorBoardLogger", "CSVLogger")


def newest_checkpoint(version_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint of a version folder that can be loaded, by its time of writing.

    Files that a killed process or a full disk left incomplete are passed over, so the one before is found. The default
    ``ModelCheckpoint``, which writes no ``last.ckpt``, is served as well.

    Args:
        version_dir: a folder ``version_N``; checkpoints stand in it or anywhere under its ``checkpoints``.
    """
    folder = Path(version_dir)
    found = [*folder.glob("*.ckpt"), *(folder / "checkpoints").rglob("*.ckpt")]
    # `last.ckpt` beside a file of the same instant is a copy of it: either will do, but always the same one
    dated = sorted(((_written(path), path.name, path) for path in found), reverse=True)
    return next((str(path) for _, _, path in dated if is_whole(path)), None)


def newest_version(logger: Logger) -> int | str | None:
    """Return the newest version of the logger's run that has a loadable checkpoint, ``None`` when there is none.

    Args:
        logger: a ``TensorBoardLogger`` or ``CSVLogger``; its own version is not asked for, which would take the next
            number. A version that the user gave is returned if it has a checkpoint.
    """
    if not keeps_versions(logger):
        return None
    given: Any = logger
    if given._version is not None:
        return given._version if newest_checkpoint(_version_dir(logger, given._version)) else None
    versions = _versions(Path(given.root_dir))
    return next((n for n in versions if newest_checkpoint(_version_dir(logger, n)) is not None), None)


def continue_version(logger: Logger) -> Path | None:
    """Make a logger go on in the newest version of its run that has a checkpoint, before it opens a new one.

    Args:
        logger: a ``TensorBoardLogger`` or ``CSVLogger`` that has not logged yet; others are left as they are.

    Returns:
        The version folder, or ``None`` when there is nothing to go on with.
    """
    version = newest_version(logger)
    if version is None:
        return None
    given: Any = logger
    given._version = version
    if is_logger(logger, "CSVLogger"):
        continue_csv(logger)
    return _version_dir(logger, version)


def continue_runs(loggers: Sequence[Logger]) -> Path | None:
    """Make all loggers of a run go on, and return the folder of the newest version that has a checkpoint.

    Lightning keeps checkpoints with the first logger. The others go on in the newest version that has a log of theirs.

    Args:
        loggers: the federation's loggers, none of which has logged yet.
    """
    folder = next((found for logger in loggers if (found := continue_version(logger)) is not None), None)
    if folder is None:
        return None
    for logger in loggers:
        given: Any = logger
        if not keeps_versions(logger):
            continue
        if given._version is None:
            given._version = next((n for n in _versions(Path(given.root_dir)) if _has_log(logger, n)), None)
        if given._version is not None and is_logger(logger, "CSVLogger"):
            continue_csv(logger)
    return folder


def continue_folder(loggers: Sequence[Logger], checkpoint: str) -> None:
    """Make the loggers go on in the folder that a checkpoint of a federation names, if it is a version of theirs.

    Args:
        loggers: the federation's loggers, none of which has logged yet.
        checkpoint: path of the checkpoint.
    """
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("fl_lightning")
    folder = Path(saved["folder"]) if saved else None
    for logger in loggers:
        given: Any = logger
        if folder is None or not keeps_versions(logger) or folder.parent.resolve() != Path(given.root_dir).resolve():
            continue
        if folder.name.startswith("version_") and given._version is None:
            given._version = int(folder.name.removeprefix("version_"))
            if is_logger(logger, "CSVLogger"):
                continue_csv(logger)


def keeps_versions(logger: Logger) -> bool:
    """Return whether a logger keeps its versions in folders ``version_N`` on disk."""
    return any(is_logger(logger, kind) for kind in _FILE_LOGGERS)


def _version_dir(logger: Logger, version: int | str) -> Path:
    given: Any = logger
    # not `log_dir`: a TensorBoardLogger's may end in a `sub_dir`, beside which the checkpoints stand
    root = Path(os.path.expanduser(os.path.expandvars(given.root_dir)))
    return root / (version if isinstance(version, str) else f"version_{version}")


def _versions(root: Path) -> list[int]:
    names = [child.name.removeprefix("version_") for child in folders(root) if child.name.startswith("version_")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _has_log(logger: Logger, version: int) -> bool:
    pattern = "metrics.csv" if is_logger(logger, "CSVLogger") else "*tfevents*"
    return any(_version_dir(logger, version).glob(pattern))


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0  # a dangling link


def is_whole(path: Path) -> bool:
    """A torch checkpoint is a zip file, whose table stands at its end: an incomplete one has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none if it does not exist."""
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
