"""The logger of a client's Trainer: it keeps what is logged until the server commits the round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

__all__ = ["ClientLogger", "Record"]

Record = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A call to replay on a writer: its method, its arguments and its keyword arguments."""


class _Recording:
    """Stands for ``logger.experiment``: any method call on it becomes a record."""

    def __init__(self, records: list[Record]) -> None:
        self._records = records

    def __getattr__(self, method: str) -> Callable[..., None]:
        if method.startswith("__"):
            raise AttributeError(method)

        def record(*arguments: Any, **named: Any) -> None:
            self._records.append((method, arguments, named))

        return record


class ClientLogger(Logger):
    """Buffers one client's metrics and calls on ``self.logger.experiment``.

    A round that is lost leaves no point behind, and a process that is not the first can hand its clients' curves over.

    Args:
        save_dir: the federation's log folder, for modules that write files beside their curves.
    """

    def __init__(self, save_dir: str | None = None) -> None:
        super().__init__()
        self.records: list[Record] = []
        self._save_dir = save_dir

    @property
    def name(self) -> str:
        return "client"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def log_dir(self) -> str | None:
        return self._save_dir

    @property
    def experiment(self) -> Any:
        return _Recording(self.records)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # Lightning adds its own "epoch", which starts again in every round
        for name, value in metrics.items():
            if name != "epoch":
                self.records.append(("add_scalar", (name, float(value), step), {}))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are the federation's, logged once."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """The graph is the server module's."""

    def take(self) -> list[Record]:
        """Return the records and start anew."""
        records, self.records = self.records, []
        return records
