"""The picture of a partition: who has which labels, and how far that is from everyone's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.optional import require
from fl_lightning.data.partition import total_variation
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["partition_figure"]

_MAX_CLASSES = 20
_OTHER = "other"
_GREY = "#5f6368"


def partition_figure(
    client_ids: Sequence[ClientId],
    classes: Sequence[Any],
    counts: NDArray[np.int64],
    distances: NDArray[np.float64] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw label counts as stacked bars, one for each client, over the distance of its labels to everyone's.

    The first three arguments are what ``FederatedDataModule.label_counts()`` returns.

    Args:
        client_ids: the clients, in the order of the bars; up to a few hundred stay readable.
        classes: names of the classes; beyond 20, the rarest share one colour.
        counts: examples ``(clients, classes)``.
        distances: total variation distances in ``[0, 1]``; by default to the sum of ``counts``.
        title: of the picture.

    Returns:
        A figure that belongs to no window and no global state: ``figure.savefig(path)`` or
        ``tensorboard.add_figure(tag, figure)``.

    Raises:
        MisconfigurationException: when the shapes do not fit.
        ModuleNotFoundError: when matplotlib is missing.

    Example:
        >>> figure = partition_figure(["a", "b"], [0, 1], np.array([[5, 1], [0, 6]]))
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['examples', 'distance']
    """
    if counts.shape != (len(client_ids), len(classes)) or not counts.size:
        raise MisconfigurationException(
            f"partition_figure expected counts of shape ({len(client_ids)} clients, {len(classes)} classes) and at "
            f"least one of each, got {counts.shape}. Pass what label_counts() returns."
        )
    if distances is None:
        distances = total_variation(counts, counts.sum(axis=0))
    names, counts = _with_other([str(name) for name in classes], counts)
    figures = require("matplotlib.figure", "The picture of the partition", "matplotlib")
    figure: Figure = figures.Figure(figsize=(min(16.0, 7.0 + 0.05 * len(client_ids)), 5.0), layout="constrained")
    bars, line = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_counts(bars, names, counts)
    _draw_distances(line, distances, client_ids)
    bars.set_title(title or f"{len(client_ids)} clients, {int(counts.sum()):,} examples", loc="left", fontsize=11)
    handles, labels = bars.get_legend_handles_labels()
    handles, labels = handles[::-1], labels[::-1]  # from top to bottom, as the bars are stacked
    figure.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize=8, title="label", title_fontsize=9
    )
    return figure


def _draw_counts(axes: Axes, names: Sequence[str], counts: NDArray[np.int64]) -> None:
    colours = _colours(names)
    positions, bottom = np.arange(len(counts)), np.zeros(len(counts))
    width = 0.8 if len(counts) <= 60 else 1.0  # gaps between hundreds of bars are a moiré
    for column, name in enumerate(names):
        axes.bar(positions, counts[:, column], width, bottom, color=colours[column], label=name, linewidth=0)
        bottom += counts[:, column]
    axes.set_ylabel("examples")
    axes.set_xlim(-0.75, len(counts) - 0.25)
    _plain(axes)


def _draw_distances(axes: Axes, distances: NDArray[np.float64], client_ids: Sequence[ClientId]) -> None:
    positions = np.arange(len(distances))
    edges = np.append(positions - 0.5, positions[-1] + 0.5)
    axes.stairs(distances, edges, fill=True, color="#c6dafc")
    axes.stairs(distances, edges, color="#1967d2", linewidth=1.0)
    mean = float(distances.mean())
    axes.axhline(mean, color=_GREY, linewidth=0.8, linestyle="--")
    axes.annotate(
        f"mean {mean:.2f}", (1.0, mean), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        va="center", fontsize=8, color=_GREY,
    )  # fmt: skip
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel("distance")
    axes.set_xlabel("client   (distance: total variation between its labels and everyone's)", fontsize=9)
    step = -(-len(client_ids) // 25)  # at most 25 names fit
    shown = positions[::step]
    names = [_short(str(client_ids[position])) for position in shown]
    steep = max(map(len, names)) > 4
    axes.set_xticks(shown, names, rotation=45 if steep else 0, ha="right" if steep else "center", fontsize=8)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize=8)


def _colours(names: Sequence[str]) -> list[Any]:
    palettes = require("matplotlib", "The picture of the partition", "matplotlib").colormaps
    palette = palettes["tab10" if len(names) <= 10 else "tab20"]
    return ["#d0d0d0" if name == _OTHER else palette(number % palette.N) for number, name in enumerate(names)]


def _with_other(names: list[str], counts: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    if len(names) <= _MAX_CLASSES:
        return names, counts
    by_size = np.argsort(-counts.sum(axis=0), kind="stable")
    kept, rest = np.sort(by_size[: _MAX_CLASSES - 1]), by_size[_MAX_CLASSES - 1 :]
    merged = np.concatenate([counts[:, kept], counts[:, rest].sum(axis=1, keepdims=True)], axis=1)
    return [*(names[column] for column in kept), _OTHER], merged


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"
