"""A run that goes on: the same version folder, the newest checkpoint, and no point that was logged after it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from fl_lightning.reporting.client_curves import is_logger, tensorboard_dir
from fl_lightning.reporting.client_names import safe_name
from fl_lightning.reporting.csv_history import cut_csv
from fl_lightning.reporting.simulated_time import SIMULATED_TIME, cut_after
from fl_lightning.reporting.versions import folders, keeps_versions
from fl_lightning.types import ClientId

__all__ = ["cut_logs", "flush_logs", "truncate_events"]

_LAYOUT = "custom_scalars__config__"
_SESSION = ("_hparams_/", "hp_metric")  # said at step 0 by every process


def flush_logs(loggers: Sequence[Logger]) -> None:
    """Hand everything that was logged to the operating system; to be called before a checkpoint is written.

    TensorBoard's writer keeps points for two minutes and Lightning's CSV writer for a hundred steps: after a kill,
    the checkpoint would be newer than its curves.
    """
    for logger in loggers:
        given: Any = logger
        if keeps_versions(logger) and given._experiment is not None:
            logger.save()


def cut_logs(loggers: Sequence[Logger], round: int, client_steps: Mapping[ClientId, int], clock: float = 0.0) -> None:
    """Remove from all logs what was logged after the checkpoint that a fit resumes from.

    To be called on rank zero, after Lightning logged the hyperparameters again (``on_fit_start`` or later) and before
    the first round.

    Args:
        loggers: the federation's loggers.
        round: the round that comes next, as the checkpoint says: the server's points at this step and later go.
        client_steps: optimizer steps of each client in the checkpoint: a client's points at its step and later go, all
            of them if it is not named.
        clock: seconds on the virtual clock in the checkpoint.
    """
    flush_logs(loggers)
    for logger in loggers:
        folder = tensorboard_dir(logger)
        if folder is not None:
            _truncate_run(folder, round, client_steps)
            cut_after(folder / SIMULATED_TIME, round, clock)
        elif is_logger(logger, "CSVLogger"):
            steps = {safe_name(client_id): step for client_id, step in client_steps.items()}
            cut_csv(logger, partial(_row_stays, round=round, client_steps=steps, prefix=_prefix(logger)))


def truncate_events(log_dir: str | os.PathLike[str], step: int) -> int:
    """Remove the points at ``step`` and later from the event files of one folder; return how many events went.

    What a later file of the folder says again at step 0 (hyperparameters, ``hp_metric``) goes from the earlier ones,
    as does their chart layout, so that any reader sees every point once. A half-written last record is cut. Files are
    shortened in place where that is enough. A file that would sort before an older one of the same second is put
    right by giving the older ones an earlier second.

    Args:
        log_dir: a folder of event files; its subfolders are other runs and are left alone.
        step: the first step that goes.
    """
    from fl_lightning.reporting.event_files import cut_events, read_events  # TensorBoard is slow to import

    removed = 0
    files = _in_order_of_time(Path(log_dir))
    repeated: set[str] = set()
    for path in reversed(files):
        # files are cut newest first, so that each is compared with what came after it
        said = (
            {tag for _, _, event in read_events(path) if not event.step for tag in _tags(event)} if files[1:] else set()
        )
        removed += cut_events(path, partial(_stays, step=step, repeated=frozenset(repeated)))
        repeated |= said | {_LAYOUT}
    return removed


def _stays(event: Any, step: int, repeated: frozenset[str]) -> bool:
    if event.WhichOneof("what") != "summary":
        return True
    tags = _tags(event)
    if event.step == 0 and not tags.isdisjoint(repeated):
        return False
    said_at_start = event.step == 0 and all(tag.startswith(_SESSION) or tag == _LAYOUT for tag in tags)
    return bool(event.step < step) or said_at_start


def _truncate_run(folder: Path, round: int, client_steps: Mapping[ClientId, int]) -> None:
    # `add_scalars` of the server's writer makes subfolders, which are runs of the server too
    for path in [folder, *(Path(parent) for parent in _subfolders(folder))]:
        truncate_events(path, round)
    steps = {safe_name(client_id): step for client_id, step in client_steps.items()}
    for client in folders(folder / "clients"):
        truncate_events(client, steps.get(client.name, 0))


def _subfolders(folder: Path) -> Iterator[str]:
    for child in folders(folder):
        if child.name not in ("clients", "checkpoints", SIMULATED_TIME):
            yield from (parent for parent, _, _ in os.walk(child))


def _prefix(logger: Logger) -> str:
    given: Any = logger
    return f"{given._prefix}{given.LOGGER_JOIN_CHAR}" if given._prefix else ""


def _row_stays(row: Mapping[str, str], round: int, client_steps: Mapping[str, int], prefix: str) -> bool:
    names = (name.removeprefix(prefix).split("/") for name, value in row.items() if value)
    client = next((parts[1] for parts in names if parts[0] == "client" and len(parts) > 2), None)
    limit = round if client is None else client_steps.get(client, 0)
    return int(float(row.get("step") or 0)) < limit


def _tags(event: Any) -> set[str]:
    return {value.tag for value in event.summary.value}


def _in_order_of_time(folder: Path) -> list[Path]:
    """Return the event files, oldest first, renamed where two of one second would be read the other way round."""
    from fl_lightning.reporting.event_files import read_events

    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if "tfevents" in path.name and not path.name.startswith(".")]
    began = {path: next((event.wall_time for _, _, event in read_events(path)), 0.0) for path in files}
    files.sort(key=lambda path: (began[path], path.name))
    for position in range(len(files) - 2, -1, -1):
        if files[position].name > files[position + 1].name:
            files[position] = _made_older(files[position], files[position + 1])
    return files


def _made_older(path: Path, than: Path) -> Path:
    parts, limit = path.name.split("."), than.name.split(".")
    if len(parts) < 4 or len(limit) < 4 or not limit[3].isdigit():
        return path  # not named by a SummaryWriter; nothing is known about its order
    parts[3] = f"{int(limit[3]) - 1:010d}"
    return path.rename(path.with_name(".".join(parts)))
