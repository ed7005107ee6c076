"""Progress bars that count rounds and clients, in place of Lightning's own two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from fl_lightning.reporting.progress_rich import FederatedRichProgressBar
from fl_lightning.reporting.progress_tqdm import FederatedTQDMProgressBar

__all__ = ["FederatedRichProgressBar", "FederatedTQDMProgressBar", "federated_progress_bar"]

_Bar = TypeVar("_Bar", bound=ProgressBar)


def federated_progress_bar(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks with Lightning's progress bar replaced by the one that counts rounds.

    A ``TQDMProgressBar`` or ``RichProgressBar`` gives its arguments to its successor. Any other bar, a subclass of
    these two included, is the user's own and stays.

    Args:
        callbacks: of a Trainer.

    Example:
        >>> [type(bar).__name__ for bar in federated_progress_bar([TQDMProgressBar(refresh_rate=5)])]
        ['FederatedTQDMProgressBar']
    """
    return [_successor(callback) for callback in callbacks]


def _successor(callback: Callback) -> Callback:
    if type(callback) is TQDMProgressBar:
        return _as_enabled(
            callback, FederatedTQDMProgressBar(callback.refresh_rate, callback.process_position, callback._leave)
        )
    if type(callback) is RichProgressBar:
        new = FederatedRichProgressBar(
            callback._refresh_rate, callback._leave, theme=callback.theme, console_kwargs=callback._console_kwargs
        )
        return _as_enabled(callback, new)
    return callback


def _as_enabled(old: ProgressBar, new: _Bar) -> _Bar:
    if not old._enabled:  # type: ignore[attr-defined]
        new.disable()
    return new
