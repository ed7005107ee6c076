"""One ``fit``: the bridge between Lightning's hooks on the server and the federation behind them."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from fl_lightning.after_round import evaluate, recalibrate
from fl_lightning.asking import ask_losses
from fl_lightning.data import ClientPopulation
from fl_lightning.dispatching import Dispatcher, schedule_of
from fl_lightning.federation import Federation, RoundOutcome
from fl_lightning.federation_settings import rehearsal
from fl_lightning.local.client import ClientHalf
from fl_lightning.local.worker import copied_module
from fl_lightning.reporting import ClientCurves, DeviceCharts, RoundCharts, RoundsFile, cut_logs, flush_logs
from fl_lightning.resuming import old_folders, on_device
from fl_lightning.retention import Retention
from fl_lightning.seeding import root_seed
from fl_lightning.server import same_start, twin_of
from fl_lightning.server_optimization import server_optimization, step_on_plateau
from fl_lightning.store import ClientStore
from fl_lightning.traveling import Traveling, batch_norm_buffers
from fl_lightning.types import ClientId, RoundReport
from fl_lightning.validation import check_overrides, warn_of_strangers

if TYPE_CHECKING:
    from fl_lightning.trainer import FederatedTrainer

__all__ = ["FederatedFit"]

_FORMAT = 1


class FederatedFit:
    """Runs, commits, saves and resumes the rounds of one call of ``FederatedTrainer.fit``.

    Args:
        trainer: the federation's Trainer.
        module: the user's module before it becomes the server; clients train in a copy of it.
        population: the clients.
        goes_on: :meth:`state_dict` at the end of the fit before, when this one goes on with its rounds.
    """

    def __init__(
        self,
        trainer: FederatedTrainer,
        module: pl.LightningModule,
        population: ClientPopulation,
        goes_on: dict[str, Any] | None = None,
    ) -> None:
        self.trainer = trainer
        self.population = population
        self.worker = twin_of(copied_module(module))
        self._name = type(module).__name__
        self._restored = goes_on
        self._outcome: RoundOutcome | None = None
        self._open_report: RoundReport | None = None
        self._cut: tuple[int, dict[ClientId, int], float] | None = None
        self._federation: Federation | None = None
        self._from_clients: set[str] = set()
        self._given_callbacks = {id(callback) for callback in trainer.callbacks}

    @property
    def federation(self) -> Federation:
        assert self._federation is not None, "the fit has not started"
        return self._federation

    @property
    def started(self) -> bool:
        """Whether there is anything to save yet."""
        return self._federation is not None

    @property
    def newest_report(self) -> RoundReport | None:
        """The report of the round that ends, ``None`` while its clients train."""
        return self._open_report

    # ---- start and end -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Build the federation; Lightning has set the module up and loaded a checkpoint's weights into it."""
        trainer, module = self.trainer, self.trainer.lightning_module
        same_start(module)
        self._relax_module_callbacks()
        trainer.settings.seed = self._common_seed()
        check_overrides(trainer.settings.client_overrides, self.population.client_ids())
        self.curves = ClientCurves(trainer.loggers, trainer.log_clients, self.population.client_ids)
        self.charts = RoundCharts(trainer.loggers)
        settings = rehearsal(trainer.settings) if trainer.fast_dev_run else trainer.settings
        self._federation = federation = Federation(
            settings,
            Dispatcher(settings, self.population, trainer.sampler, schedule_of(trainer), trainer.fleet),
            trainer.engine,
            module,
            trainer.global_rank,
            trainer.world_size,
            trainer.strategy.root_device,
        )
        self.device_charts = DeviceCharts(self.charts, trainer.fleet, federation.dispatcher.schedule, self.population)
        folder = self._run_folder()
        federation.store = ClientStore(folder / "memory")
        asynchronous = isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
        self.retention = Retention(federation.store, asynchronous)
        federation.interrupted = lambda: trainer.received_sigterm
        federation.on_cohort, federation.on_client_end = self.curves.join, self._client_ended
        self.rounds = (
            RoundsFile(folder / "rounds.jsonl") if trainer.is_global_zero and not trainer.fast_dev_run else None
        )
        self._resume(folder)
        self._start_retention(folder)
        local = federation.local_settings(trainer.local_settings())
        warn_of_strangers([*local.callbacks, federation.algorithm], self.population.client_ids())
        local.save_dir, local.has_loggers = str(folder), bool(trainer.loggers)
        half = ClientHalf(
            self.worker, federation.algorithm, local, self.population, federation.store, self.curves.wants
        )
        trainer.engine.start(half)
        trainer.sampler.ask = partial(ask_losses, federation)
        if trainer.is_global_zero and self._restored is None:
            self.charts.partition(self.population.source)

    def close(self) -> None:
        """Release files and processes."""
        self.trainer.engine.close()
        if self._federation is not None:
            self.trainer.client_memory, self.trainer.client_population = self._federation.store, self.population
            self.trainer.sampler.ask = None
            self.curves.close()
            self._federation = None

    def _start_retention(self, folder: Path) -> None:
        if not self.trainer.is_global_zero:
            return  # one process deletes for all
        own = [getattr(callback, "dirpath", None) for callback in self.trainer.checkpoint_callbacks]
        path = self.trainer.ckpt_path
        self.retention.start([folder, folder / "checkpoints", *filter(None, own)], [] if path is None else [path])

    def _relax_module_callbacks(self) -> None:
        """Let the module's own early stopping wait in vain when the clients validate and the server does not."""
        if self.trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined():
            return
        for callback in self.trainer.callbacks:
            if isinstance(callback, EarlyStopping) and id(callback) not in self._given_callbacks:
                callback.strict = False

    def _common_seed(self) -> int:
        if self._restored is not None:
            return int(self._restored["seed"])
        seed: int = self.trainer.strategy.broadcast(root_seed())
        return seed

    def _run_folder(self) -> Path:
        if self.trainer.loggers and not self.trainer.fast_dev_run:
            folder = self.trainer.log_dir or self.trainer.default_root_dir
        elif self.trainer.checkpoint_callbacks and not self.trainer.fast_dev_run:
            folder = os.path.join(self.trainer.default_root_dir, "federation")
        else:  # nothing is to stay on disk, but `trainer.save_checkpoint` may still come after the fit
            folder = tempfile.mkdtemp(prefix="fl_lightning-")
            weakref.finalize(self.trainer, shutil.rmtree, folder, ignore_errors=True)
        return Path(self.trainer.strategy.broadcast(str(folder)))

    # ---- a round, in the order in which Lightning calls --------------------------------------------------------

    def open_round(self) -> None:
        """Start a round: clients may have come or gone."""
        if self._cut is not None:  # Lightning has logged hyperparameters again, which now stand twice
            cut_logs(self.trainer.loggers, *self._cut)
            self._cut = None
        self.curves.update_population(self.population.client_ids())
        self.federation.seed_server(self.trainer.current_epoch)

    def run_round(self) -> None:
        """Let the clients train; the result waits for the server's step."""
        if self._outcome is not None and self._outcome.report.round == self.trainer.current_epoch:
            return  # an optimizer that asks for the closure twice gets the same round
        at_most = 2 if self.trainer.fast_dev_run else None
        self._outcome = outcome = self.federation.run_round(self.trainer.current_epoch, at_most)
        self._from_clients.update(outcome.report.metrics)
        log_values(self.trainer.lightning_module, outcome.report.metrics)

    def write_gradient(self) -> None:
        """Write the pseudo-gradient where the server's optimizer reads it."""
        assert self._outcome is not None
        own = dict(self.trainer.lightning_module.named_parameters())
        for name, gradient in self._outcome.gradient.items():
            own[name].grad = gradient.to(own[name].dtype)

    def commit_round(self) -> None:
        """Make the round's results last: the server has stepped."""
        outcome, federation = self._outcome, self.federation
        assert outcome is not None
        replaced = federation.accept(outcome)
        if self.trainer.is_global_zero:
            self.retention.committed(replaced, outcome.report.round)
        if self.trainer.settings.batch_norm == "recalibrate" and batch_norm_buffers(self.trainer.lightning_module):
            recalibrate(federation, list(dict.fromkeys(outcome.report.cohort)), outcome.report.round)
        curves = federation.count_steps(outcome.results, self.curves.wants)
        if self.trainer.is_global_zero:
            self.curves.write(outcome.report.round, curves)
        self._evaluate_clients(outcome.report)
        if self.trainer.is_global_zero and self._charts_are_due():
            self.charts.round(outcome.report, outcome.results)
            self.device_charts.round(outcome.report)
        self._notify("on_round_end", outcome.report)
        outcome.results = []
        self._outcome, self._open_report = None, outcome.report
        self.trainer.lightning_module.zero_grad()

    def _charts_are_due(self) -> bool:
        every = self.trainer.log_every_n_steps
        return bool(every > 0 and (self.trainer.current_epoch + 1) % every == 0)

    def _evaluate_clients(self, report: RoundReport) -> None:
        trainer, settings = self.trainer, self.trainer.settings
        every = trainer.check_val_every_n_epoch or 1
        due = (report.round + 1) % every == 0 and (report.round + 1) % settings.evaluate_every_n_rounds == 0
        if settings.evaluate_clients is False or not due:
            return
        exact, own = evaluate(self.federation, report.round, 2 if trainer.fast_dev_run else None)
        metrics = {f"clients/{name}": value for name, value in exact.items()}
        for name, values in own.items():
            metrics.update(self.charts.spread(f"clients/{name}", values))
            metrics.update(self.device_charts.by_class(f"clients/{name}", values))
        report.metrics.update(metrics)
        log_values(trainer.lightning_module, metrics)

    def close_round(self) -> None:
        """Add what validation logged to the report and write it; the first of epoch end and checkpoint does it."""
        report, self._open_report = self._open_report, None
        if report is None:
            return
        if self.trainer.fit_loop.epoch_loop._should_check_val_epoch():
            # Lightning keeps the values of the last validation; they are this round's only if it validated
            old = set() if report.cohort else self._from_clients  # nobody trained, so these are of rounds before
            for name, value in self.trainer.callback_metrics.items():
                if not name.startswith(("clients/", "devices/")) and name not in old:
                    report.metrics.setdefault(name, float(value))
        every = self.trainer.settings.evaluate_every_n_rounds * (self.trainer.check_val_every_n_epoch or 1)
        step_on_plateau(self.trainer, report, every)
        self.trainer.round_history.append(report)
        if self.rounds is not None:
            self.rounds.append(report)
            self.charts.over_time(report)

    def _client_ended(self, client_id: ClientId, done: int, total: int, num_examples: int) -> None:
        self._notify("on_client_end", client_id, done, total, num_examples)

    def _notify(self, hook: str, *arguments: Any) -> None:
        for callback in self.trainer.callbacks:
            notify = getattr(callback, hook, None)
            if notify is not None:
                notify(self.trainer, *arguments)

    # ---- the server's optimizer --------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        settings, module = self.trainer.settings, self.trainer.lightning_module
        algorithm = settings.algorithm
        traveling = Traveling.of(module, algorithm, settings.batch_norm).parameters
        own = dict(module.named_parameters())
        return server_optimization(algorithm, [own[name] for name in traveling])

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def saved(self, path: str | Path) -> None:
        """A checkpoint was written: the memory that it names stays as long as the file."""
        if self._federation is not None and self.trainer.is_global_zero:
            self.retention.saved(path)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps under ``"fl_lightning"``: tensors and primitives only."""
        self.close_round()
        flush_logs(self.trainer.loggers)
        federation = self.federation
        offset, digest = self.rounds.offset_and_hash() if self.rounds is not None else (0, "")
        assert federation.store is not None
        return {
            "format": _FORMAT,
            "algorithm": type(federation.algorithm).__name__,
            "server_optimizer": type(self.trainer.optimizers[0]).__name__,
            "round": len(self.trainer.round_history),
            "seed": self.trainer.settings.seed,
            "state": copy.deepcopy(federation.state),
            **federation.dispatcher.state_dict(),
            "memory": federation.store.state_dict(),
            "rounds": {"offset": offset, "sha256": digest},
            "folder": str(federation.store.folder.parent),
            "num_lanes": self.trainer.settings.num_lanes,
            "num_threads": torch.get_num_threads(),
        }

    def check_and_take(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint is this federation's before anything is loaded from it.

        Raises:
            MisconfigurationException: for a checkpoint of another model, of another algorithm or of no federation.
        """
        saved = checkpoint.get("fl_lightning")
        module = self.trainer.lightning_module
        if saved is None:
            raise MisconfigurationException(
                "ckpt_path names a checkpoint that no FederatedTrainer wrote. To start a federation from its weights, "
                f"use trainer.fit({self._name}.load_from_checkpoint(path), ...) without ckpt_path."
            )
        own, other = dict(module.state_dict()), checkpoint["state_dict"]
        wrong = sorted(
            n for n in own.keys() | other.keys() if n not in own or n not in other or own[n].shape != other[n].shape
        )
        if wrong and module.strict_loading:
            raise MisconfigurationException(
                f"The checkpoint is of another model: {len(wrong)} tensors differ from {self._name} in "
                f"name or shape, the first is {wrong[0]!r}. Build the module with the checkpoint's hyperparameters."
            )
        algorithm = type(self.trainer.settings.algorithm).__name__
        if saved["algorithm"] != algorithm:
            raise MisconfigurationException(
                f"The checkpoint was written by {saved['algorithm']}, and this trainer runs {algorithm}. Resume with "
                f"algorithm={saved['algorithm']}(...), or start anew from its weights with load_from_checkpoint."
            )
        if saved["num_threads"] != torch.get_num_threads():
            rank_zero_warn(
                f"The checkpoint was written with {saved['num_threads']} threads per process and this process has "
                f"{torch.get_num_threads()}: results will differ in the last bits. "
                f"Pass num_threads={saved['num_threads']} to repeat them exactly."
            )
        self._restored = saved

    def _require_same_optimizer(self, saved: dict[str, Any]) -> None:
        now, before = type(self.trainer.optimizers[0]).__name__, saved["server_optimizer"]
        if now != before:
            raise MisconfigurationException(
                f"The checkpoint holds the state of the server optimizer {before}, and this trainer has {now}. Resume "
                f"with server_optimizer={before}, or start anew from the checkpoint's weights: "
                f"trainer.fit({self._name}.load_from_checkpoint(path), ...)."
            )

    def _resume(self, folder: Path) -> None:
        saved, federation = self._restored, self.federation
        if saved is None:
            if self.rounds is not None:
                self.rounds.truncate_to(0, None)
            return
        self._require_same_optimizer(saved)
        if saved["state"]:
            federation.state = on_device(saved["state"], federation.device)
        versions = on_device(saved.get("versions", {}), federation.device)
        federation.dispatcher.load_state_dict({**saved, "versions": versions})
        self.curves.join(saved["client_steps"])
        folders = old_folders(saved["folder"], self.trainer.ckpt_path)
        old = folders[0] if folders else None
        assert federation.store is not None
        for source in folders:  # a copied run still has what the original may have deleted since
            if source.resolve() != folder.resolve() and saved["memory"]:
                federation.store.adopt(ClientStore(source / "memory"), saved["memory"])
        self.trainer.strategy.barrier("client memory")
        federation.store.load_state_dict(saved["memory"])
        self._restore_history(old, folder, saved)

    def _restore_history(self, old: Path | None, folder: Path, saved: dict[str, Any]) -> None:
        history: list[RoundReport] = []
        if self.rounds is not None:
            source = old / "rounds.jsonl" if old is not None else None
            offset, digest = saved["rounds"]["offset"], saved["rounds"]["sha256"]
            if offset and (source is None or not source.is_file()):
                rank_zero_warn("rounds.jsonl of the run is gone: round_history starts with the resumed round.")
            elif offset and source is not None:
                self.rounds.continue_from(source, offset, digest)
                history = self.rounds.read()
            if old is not None and old.resolve() == folder.resolve():
                self._cut = saved["round"], saved["client_steps"], saved.get("clock", 0.0)
        self.trainer.round_history[:] = self.trainer.strategy.broadcast(history)
        rank_zero_info(f"Going on with round {saved['round']}.")


def log_values(module: pl.LightningModule, values: dict[str, float]) -> None:
    """Log a round's values: on the step, because a round is one step of the server."""
    if module.trainer.barebones:
        return  # it refuses `self.log`; the round's report has the values all the same
    for name, value in values.items():
        module.log(name, float(value), on_step=True, on_epoch=False, rank_zero_only=False, add_dataloader_idx=False)
