"""The logger of a client's Trainer: it keeps what is logged until the server commits the round."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = ["ClientLogger", "Record", "scalar_of"]

Record = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A call to replay on a writer: its method, its arguments and its keyword arguments."""

_IGNORED = frozenset({"add_graph", "add_hparams", "add_onnx_graph", "add_custom_scalars", "close", "flush", "reopen"})


class ClientLogger(Logger):
    """Buffers one client's metrics and its calls on ``self.logger.experiment``.

    Nothing is written while a client trains: a round that is lost leaves no point behind, and a process that is not
    the first can hand its clients' curves over. Records are plain and picklable: tensors and arrays are copied when
    they are logged (the next optimizer step would change them) and figures are drawn.

    Args:
        enabled: a client whose curves nobody keeps swallows every call.
        save_dir: the federation's log folder, for modules that write files beside their curves.
        name: the federation's run name.
        version: the federation's version.
        step_offset: optimizer steps of the client's earlier rounds. Lightning's own step already counts on from them;
            what a module passes to ``self.logger.experiment`` as ``global_step`` starts at 0 in every round, so it is
            added there. A call without a step stands at the start of the round.

    Example:
        >>> logger = ClientLogger(step_offset=100)
        >>> logger.log_metrics({"loss": 0.5, "epoch": 0}, step=101)
        >>> logger.experiment.add_scalar("grad_norm", 2.0, global_step=3)
        >>> logger.records
        [('add_scalar', ('loss', 0.5, 101), {}), ('add_scalar', ('grad_norm', 2.0), {'global_step': 103})]
    """

    def __init__(
        self,
        enabled: bool = True,
        save_dir: str | None = None,
        name: str = "lightning_logs",
        version: int | str = 0,
        step_offset: int = 0,
    ) -> None:
        super().__init__()
        self.enabled = enabled
        self.records: list[Record] = []
        self._save_dir = save_dir
        self._name = name
        self._version = version
        self._step_offset = step_offset

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        return self._version

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def root_dir(self) -> str | None:
        return self._save_dir

    @property
    def log_dir(self) -> str | None:
        return self._save_dir

    @property
    def experiment(self) -> Any:
        """What stands for a ``SummaryWriter``: any method of it may be called."""
        return _Recording(self)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not self.enabled:
            return
        step = self._step_offset if step is None else step
        for name, value in metrics.items():
            if name == "epoch":
                continue  # Lightning's own, which starts again in every round
            if isinstance(value, Mapping):
                self.records += [("add_scalar", (f"{name}/{k}", float(v), step), {}) for k, v in value.items()]
            else:
                self.records.append(("add_scalar", (name, float(value), step), {}))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: hyperparameters are the federation's and logged once."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Do nothing: the graph is the server module's."""

    def take(self) -> list[Record]:
        """Return the records and start anew."""
        records, self.records = self.records, []
        return records

    def clear(self) -> None:
        """Forget what was recorded."""
        self.records = []

    def record(self, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keep one call on the experiment, with its step on the client's own axis."""
        if not self.enabled or method in _IGNORED:
            return
        arguments, named = _with_step(method, arguments, dict(named), self._step_offset)
        if method == "add_figure":
            method, arguments, named = _drawn(arguments, named)
        self.records.append((method, _snapshot(arguments), _snapshot(named)))


def scalar_of(record: Record) -> tuple[str, float, int] | None:
    """Return name, value and step of a record that is a point of a curve, ``None`` for any other."""
    method, arguments, named = record
    if method != "add_scalar":
        return None
    call = {**dict(zip(("tag", "scalar_value", "global_step"), arguments, strict=False)), **named}
    return call["tag"], float(call["scalar_value"]), int(call.get("global_step") or 0)


class _Recording:
    """Stands for ``logger.experiment``: a call of any method becomes a record."""

    def __init__(self, logger: ClientLogger) -> None:
        self._logger = logger

    @property
    def log_dir(self) -> str | None:
        return self._logger.log_dir

    def get_logdir(self) -> str | None:
        return self._logger.log_dir

    def __getattr__(self, method: str) -> Callable[..., None]:
        if method.startswith("_"):  # copy and pickle ask for what is not there
            raise AttributeError(method)

        def record(*arguments: Any, **named: Any) -> None:
            self._logger.record(method, arguments, named)

        return record


def _snapshot(values: Any) -> Any:
    values = apply_to_collection(values, Tensor, lambda tensor: tensor.detach().cpu().clone())
    return apply_to_collection(values, np.ndarray, np.copy)


@cache
def _step_position(method: str) -> int | None:
    """Return where ``SummaryWriter.<method>`` takes its ``global_step``, ``None`` when it takes none."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed only by modules that call it

    function = getattr(SummaryWriter, method, None)
    names = list(inspect.signature(function).parameters) if callable(function) else []
    return names.index("global_step") - 1 if "global_step" in names else None


def _with_step(
    method: str, arguments: tuple[Any, ...], named: dict[str, Any], offset: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    position = _step_position(method)
    if position is None and "global_step" not in named:
        return arguments, named
    if position is not None and len(arguments) > position:
        step = int(arguments[position] or 0) + offset
        return (*arguments[:position], step, *arguments[position + 1 :]), named
    named["global_step"] = int(named.get("global_step") or 0) + offset
    return arguments, named


def _drawn(arguments: tuple[Any, ...], named: dict[str, Any]) -> Record:
    """Turn a figure into pixels: figures neither travel between processes nor stay as they were logged."""
    from torch.utils.tensorboard import _utils

    names = ("tag", "figure", "global_step", "close", "walltime")
    call = {**dict(zip(names, arguments, strict=False)), **named}
    draw: Callable[..., Any] = _utils.figure_to_image
    image = draw(call["figure"], close=call.get("close", True))
    layout = "NCHW" if image.ndim == 4 else "CHW"  # a list of figures is a batch
    return "add_image", (call["tag"], image, call.get("global_step"), call.get("walltime"), layout), {}
