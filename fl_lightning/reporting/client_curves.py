"""Curves of single clients: a run for each in TensorBoard, bounded names in other loggers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger

from fl_lightning.local.recorder import Record, scalar_of
from fl_lightning.reporting.client_names import AUTO_CLIENTS, LogClients, client_filter, first_wanted, safe_name
from fl_lightning.types import ClientId

if TYPE_CHECKING:
    from fl_lightning.reporting.event_files import AppendingSummaryWriter

__all__ = ["CLIENT_EVENTS", "ClientCurves", "is_logger", "tensorboard_dir"]

CLIENT_EVENTS = "events.out.tfevents.0000000000.client"
"""The one event file of a client; its name holds no time, so every process goes on in it."""


def is_logger(logger: Logger, kind: str) -> bool:
    """Return whether a logger is of a kind, by name: ``pytorch_lightning`` has the same loggers as other classes."""
    return any(parent.__name__ == kind for parent in type(logger).__mro__)


def tensorboard_dir(logger: Logger) -> Path | None:
    """Return the local folder of a TensorBoard logger, ``None`` for other loggers and for folders on a remote store."""
    if not is_logger(logger, "TensorBoardLogger") or logger.log_dir is None or "://" in str(logger.log_dir):
        return None
    return Path(logger.log_dir)


class ClientCurves:
    """Decides whose curves are kept, and writes them when a round is committed.

    A TensorBoard logger gets one run a client, ``<log_dir>/clients/<id>``, with the module's own tag names and the
    client's own steps; each is one file for ever, however many processes write to it, and no file stays open. Every
    other logger gets ``client/<id>/<name>`` in its one run, for at most 100 clients.

    Args:
        loggers: the federation's loggers.
        log_clients: ``"auto"`` (all clients of a population of at most 100, else the first 100 that take part), a count
            (the first so many), a list of ids, a glob (``"site-*"``) or ``"re:<regular expression>"`` over ``str(id)``,
            ``True`` or ``False``.
        client_ids: the population, or a function that returns it; only its first ids are looked at.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> curves = ClientCurves([CSVLogger("logs")], "site-*", ["site-a", "hub"])
        >>> curves.wants("site-a"), curves.wants("hub")
        (True, False)
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        log_clients: LogClients = "auto",
        client_ids: Sequence[ClientId] | Callable[[], Sequence[ClientId]] = (),
    ) -> None:
        self.log_clients = log_clients
        self._loggers = [logger for logger in loggers if not is_logger(logger, "DummyLogger")]
        self._writer: AppendingSummaryWriter | None = None
        self._joined: dict[ClientId, None] = {}
        self.update_population(client_ids() if callable(client_ids) else client_ids)

    def update_population(self, client_ids: Sequence[ClientId]) -> None:
        """Apply the rule to the clients that exist now."""
        if self.log_clients == "auto" and len(client_ids) > AUTO_CLIENTS:
            # the first ids of a million would hardly ever take part
            self._wants: Callable[[ClientId], bool] = self._joined.__contains__
            self._named: Container[ClientId] = self._joined
            return
        self._wants = client_filter(self.log_clients, client_ids)
        self._named = first_wanted(self.log_clients, client_ids, self._wants, AUTO_CLIENTS)

    def join(self, client_ids: Iterable[ClientId]) -> None:
        """Say who takes part, in an order that is the same in every process; ``"auto"`` keeps the first of them."""
        for client_id in client_ids:
            if len(self._joined) == AUTO_CLIENTS:
                return
            self._joined[client_id] = None

    def wants(self, client_id: ClientId) -> bool:
        """Return whether this client's curves are kept: a pure rule, the same in every process and every round."""
        return bool(self._loggers) and self._wants(client_id)

    def write(self, round: int, records: Mapping[ClientId, Sequence[Record]]) -> None:
        """Write what the clients of a round logged. To be called on rank zero, when the round is committed.

        Args:
            round: the 0-based round, for errors.
            records: by client, as ``ClientLogger.take()`` gave them; clients that are not wanted are passed over.
        """
        wanted = {client_id: calls for client_id, calls in records.items() if calls and self.wants(client_id)}
        for logger in self._loggers:
            folder = tensorboard_dir(logger)
            for client_id, calls in wanted.items():
                if folder is not None:
                    self._replay(folder / "clients" / safe_name(client_id) / CLIENT_EVENTS, calls, round)
                elif client_id in self._named:
                    _log_named(logger, client_id, calls)
        self.close()

    def close(self) -> None:
        """Write what is pending; no file is open between two rounds."""
        if self._writer is not None:
            self._writer.close()

    def _replay(self, path: Path, calls: Sequence[Record], round: int) -> None:
        if self._writer is None:
            from fl_lightning.reporting.event_files import AppendingSummaryWriter  # TensorBoard is slow to import

            self._writer = AppendingSummaryWriter()
        self._writer.open(path)
        for method, arguments, named in calls:
            # a module may have called what only its usual logger offers (`log_artifact`): a writer has no place for it
            call = getattr(self._writer, method, None) if method.startswith("add_") else None
            if call is None:
                continue
            try:
                call(*arguments, **named)
            except Exception as error:
                raise RuntimeError(
                    f"Client {path.parent.name} logged something in round {round} that TensorBoard does not take: "
                    f"{method} of {arguments[:1]!r} raised {error!r}. Mend the call in the module."
                ) from error


def _log_named(logger: Logger, client_id: ClientId, calls: Iterable[Record]) -> None:
    for step, metrics in _steps(calls):
        prefix = f"client/{safe_name(client_id)}/"
        logger.log_metrics({prefix + name: value for name, value in metrics.items()}, step)


def _steps(calls: Iterable[Record]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the scalars of each step, in the order in which the steps were logged."""
    steps: dict[int, dict[str, float]] = {}
    for name, value, step in filter(None, map(scalar_of, calls)):
        steps.setdefault(step, {})[name] = value
    yield from steps.items()
