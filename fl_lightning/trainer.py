"""``FederatedTrainer``: Lightning's Trainer, whose epochs are federated rounds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from fl_lightning.algorithms import Algorithm, FedAvg
from fl_lightning.algorithms.robust.little import colluding
from fl_lightning.arguments import divide
from fl_lightning.data import as_population
from fl_lightning.data.forwarding import as_lightning_datamodule
from fl_lightning.dispatching import check_schedule
from fl_lightning.engines import Engine, InProcessEngine
from fl_lightning.evaluating import EvaluatingTrainer
from fl_lightning.federation_settings import FederationSettings
from fl_lightning.fitting import FederatedFit
from fl_lightning.inputs import check_strategy, plain_module, prepare_server_arguments, sort_data
from fl_lightning.local.client_results import ClientResults
from fl_lightning.local.quiet import without_hints
from fl_lightning.local.settings import LocalSettings
from fl_lightning.personal_models import SavesPersonalModels
from fl_lightning.precision import ServerPrecision
from fl_lightning.reporting import federated_progress_bar
from fl_lightning.reporting.client_curves import is_logger
from fl_lightning.reporting.csv_history import continue_csv
from fl_lightning.resuming import last_to_fit, require_best, require_whole
from fl_lightning.retention import register
from fl_lightning.schedules import Sampler, Schedule, Timing, UniformSampler
from fl_lightning.server import RoundLoader, evaluate_whole, federated
from fl_lightning.transforms import Transform, all_transforms
from fl_lightning.types import RoundReport
from fl_lightning.validation import check_arguments, check_parts, warn_of_averaging

__all__ = ["FederatedTrainer"]


class FederatedTrainer(SavesPersonalModels, EvaluatingTrainer):
    """Trains a ``LightningModule`` on clients that keep their data.

    One epoch of this Trainer is one federated round: the global model goes to a cohort, every client trains it, and
    the negative mean update is the gradient of the server's optimizer. Checkpoints, early stopping, loggers, progress,
    profilers, devices and the command line are Lightning's own and apply to rounds.

    Args:
        algorithm: what clients contribute and what the server does with the sum; ``None`` is ``FedAvg()``.
        max_rounds: rounds to train; the federated name of ``max_epochs``.
        clients_per_round: cohort size, as a count, a fraction in (0, 1], or ``None`` for everyone.
        local_epochs: passes of a client over its data in a round; ``None`` is 1.
        local_steps: optimizer steps of a client in a round, instead of ``local_epochs``.
        local_loop: ``"lightning"`` trains each client in a real Trainer, ``"lean"`` in a direct loop for plain
            modules, ``"auto"`` takes the fastest that is exact for this module.
        group_size: clients trained at once by vmap in the lean loop, or ``"auto"``.
        memory_format: ``"channels_last"`` lays out the weights of convolutions by pixel in the clients' module, which
            many CPUs and GPUs convolve faster; its sums round differently. ``"contiguous"`` leaves torch's layout.
        client_state: ``"reset"`` starts a client's optimizers anew in each round; ``"keep"`` goes on with their state.
        client_callbacks: Lightning callbacks of local training, copied for each client.
        client_lr_schedule: round to a factor on the clients' learning rates.
        batch_norm: running statistics are ``"average"``-d, ``"local"`` to each client together with scale and shift
            (FedBN), or ``"recalibrate"``-d on the cohort's data after each round.
        transforms: what updates pass through between client and server, in order (``fl_lightning.transforms``).
        min_clients: fewest clients that must exist, take part and deliver.
        on_bad_update: ``"raise"`` stops at a client that fails or sends NaN; ``"skip"`` goes on and reports it.
        client_overrides: by client id, or a function of it, any of ``epochs``, ``steps``, ``lr``, ``batch_size``
            and (with ``HeteroFL``) ``width``.
        evaluate_clients: evaluate the global model on clients' own data: everyone, a count, or a fraction.
        evaluate_every_n_rounds: how often, among the rounds that validate.
        personalize_epochs: with ``evaluate_clients``, also evaluate what the model becomes after so many epochs on the
            client's own training data; the values stand beside the global model's as ``clients/personal/<name>``.
        log_clients: whose curves are kept: ``"auto"`` (at most 100), a count, ids, a pattern, ``True`` or ``False``.
        fleet: devices of the clients: how long each one takes, on a virtual clock.
        sampler: who takes part; ``None`` draws uniformly without replacement.
        schedule: who works when; ``None`` is the algorithm's own, or rounds in which everyone who was drawn reports.
        engine: where clients run; ``None`` is this process group.
        num_threads: torch threads of each process during the fit; ``None`` leaves torch's number. Results depend on
            it in the last bits.
        num_lanes: lanes of the cohort; the processes must divide it.
        **kwargs: every argument of ``lightning.Trainer``; ``fl_lightning.arguments.TRAINER_ARGUMENTS`` says where each
            one goes.

    Raises:
        MisconfigurationException: for arguments that exclude each other or have no meaning in a federation.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> from torch.utils.data import DataLoader
        >>> sites = {name: DataLoader(RandomDataset(32, 8), batch_size=4) for name in ("site-a", "site-b")}
        >>> trainer = FederatedTrainer(max_rounds=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                            enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel(), sites)
        >>> [report.num_steps for report in trainer.round_history]
        [4, 4]
    """

    callbacks: list[Callback]
    fast_dev_run: bool | int
    log_every_n_steps: int

    def __init__(
        self,
        *,
        algorithm: Algorithm | None = None,
        max_rounds: int | None = None,
        clients_per_round: int | float | None = None,
        local_epochs: int | None = None,
        local_steps: int | None = None,
        local_loop: Literal["auto", "lightning", "lean"] = "auto",
        group_size: int | Literal["auto"] = "auto",
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
        client_state: Literal["reset", "keep"] = "reset",
        client_callbacks: Callback | list[Callback] | None = None,
        client_lr_schedule: Callable[[int], float] | None = None,
        batch_norm: Literal["average", "local", "recalibrate"] = "average",
        transforms: Transform | list[Transform] | None = None,
        min_clients: int = 1,
        on_bad_update: Literal["raise", "skip"] = "raise",
        client_overrides: dict[Any, dict[str, Any]] | Callable[[Any], dict[str, Any] | None] | None = None,
        evaluate_clients: bool | int | float = False,
        evaluate_every_n_rounds: int = 1,
        personalize_epochs: int = 0,
        log_clients: bool | int | str | list[Any] = "auto",
        fleet: Timing | None = None,
        sampler: Sampler | None = None,
        schedule: Schedule | None = None,
        engine: Engine | None = None,
        num_threads: int | None = None,
        num_lanes: int = 8,
        **kwargs: Any,
    ) -> None:
        check_parts({"sampler": sampler, "engine": engine, "client_lr_schedule": client_lr_schedule}, client_callbacks)
        callbacks = [client_callbacks] if isinstance(client_callbacks, Callback) else client_callbacks or []
        algorithm, self._client_callbacks = colluding(algorithm if algorithm is not None else FedAvg(), callbacks)
        self.settings = FederationSettings(
            algorithm=algorithm,
            clients_per_round=clients_per_round,
            local_epochs=1 if local_epochs is None else local_epochs,
            local_steps=local_steps,
            min_clients=min_clients,
            on_bad_update=on_bad_update,
            client_overrides=client_overrides or {},
            client_lr_schedule=client_lr_schedule,
            batch_norm=batch_norm,
            transforms=all_transforms(transforms, client_callbacks),
            evaluate_clients=evaluate_clients,
            evaluate_every_n_rounds=evaluate_every_n_rounds,
            personalize_epochs=personalize_epochs,
            num_lanes=num_lanes,
        )
        self._local: dict[str, Any] = {
            "local_loop": local_loop, "client_state": client_state, "memory_format": memory_format,
            "group_size": group_size,
        }  # fmt: skip
        check_arguments(self.settings, max_rounds, kwargs, self._local, local_epochs)
        check_schedule(self.settings, fleet, sampler, schedule)
        self._client_arguments = divide(kwargs)
        self.log_clients, self.fleet, self.schedule, self.num_threads = log_clients, fleet, schedule, num_threads
        self.sampler = sampler if sampler is not None else UniformSampler()
        self.engine = engine if engine is not None else InProcessEngine()
        self.round_history: list[RoundReport] = []
        self._last_state: dict[str, Any] | None = None
        self._fit: FederatedFit | None = None
        prepare_server_arguments(kwargs, max_rounds, self.settings.algorithm)
        super().__init__(**kwargs)
        check_strategy(self.strategy)
        self.strategy.precision_plugin = ServerPrecision(self.strategy.precision_plugin)
        evaluate_whole(self)
        self.callbacks = federated_progress_bar(self.callbacks)
        warn_of_averaging(self.callbacks)

    # ---- the federation's names --------------------------------------------------------------------------------

    @property
    def max_rounds(self) -> int | None:
        """Rounds to train (``max_epochs`` of the outer Trainer)."""
        return self.max_epochs

    @property
    def algorithm(self) -> Algorithm:
        """The federated algorithm."""
        return self.settings.algorithm

    @property
    def local_epochs(self) -> int | None:
        """Passes of a client over its data in a round; ``None`` where ``local_steps`` counts."""
        return None if self.settings.local_steps is not None else self.settings.local_epochs

    @property
    def local_steps(self) -> int | None:
        """Optimizer steps of a client in a round; ``None`` where ``local_epochs`` counts."""
        return self.settings.local_steps

    @property
    def current_round(self) -> int:
        """The 0-based round that is running, or the number of finished ones."""
        return self.current_epoch

    @property
    def federated_fit(self) -> FederatedFit:
        """The fit that is running."""
        assert self._fit is not None, "no fit is running"
        return self._fit

    def federated_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the fit that is running, or else of the last one."""
        if self._fit is None and self._last_state is not None:
            return copy.deepcopy(self._last_state)
        return self.federated_fit.state_dict()

    def local_settings(self) -> LocalSettings:
        """Return how clients train, as far as the arguments say it."""
        arguments: dict[str, Any] = dict(self._client_arguments)
        if self.fast_dev_run:
            arguments.update(limit_train_batches=int(self.fast_dev_run), limit_val_batches=int(self.fast_dev_run))
        plugin = self.strategy.precision_plugin
        if isinstance(plugin, ServerPrecision) and "precision" not in arguments:
            arguments["plugins"] = [plugin.inner]
        return LocalSettings(
            trainer_arguments=arguments,
            callbacks=self._client_callbacks,
            **self._local,
        )

    # ---- Lightning's entry points ------------------------------------------------------------------------------

    def fit(
        self,
        model: pl.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train federated; afterwards the module that was passed holds the global weights.

        Args:
            model: an ordinary ``LightningModule`` of ``lightning`` or ``pytorch_lightning``.
            train_dataloaders: a mapping of client ids to train loaders, or a data module as in ``datamodule``.
            val_dataloaders: the server's validation data, beside a mapping.
            datamodule: a ``FederatedDataModule``, or any data module with ``client_ids()`` and
                ``client_dataloader(id)``.
            ckpt_path: a checkpoint to go on from; ``"last"`` finds the newest run of this name and goes on in its
                folder, ``"best"`` takes the best of the last fit.
            weights_only: as in Lightning.

        Raises:
            MisconfigurationException: for data without clients, or a checkpoint of another model or algorithm.
            ClientError: when a client fails and ``on_bad_update="raise"``.
            NotEnoughClientsError: when fewer than ``min_clients`` exist or deliver.
        """
        data, val = sort_data(train_dataloaders, val_dataloaders, datamodule)
        population = as_population(data)
        self._last_data = (data, val)
        if ckpt_path == "last":
            ckpt_path = last_to_fit(self.loggers, self.checkpoint_callbacks)
        elif ckpt_path == "best":
            require_best(self.checkpoint_callbacks)
        elif ckpt_path is not None:
            require_whole(ckpt_path)
        if ckpt_path is not None:
            for logger in self.loggers:
                if is_logger(logger, "CSVLogger"):
                    continue_csv(logger)  # Lightning's CSV logger would empty the file that it goes on with
        arguments: dict[str, Any] = {"datamodule": as_lightning_datamodule(data)}
        if isinstance(data, Mapping):
            arguments = {"train_dataloaders": RoundLoader(), "val_dataloaders": val}
        goes_on = self._last_state if ckpt_path is None and self._is_last(model) else None
        if ckpt_path is None and goes_on is None:
            self.round_history.clear()
        with ExitStack() as stack:
            self._fit = fit = FederatedFit(self, plain_module(model), population, goes_on)
            stack.callback(self._close_fit)
            stack.enter_context(self._threads())
            stack.enter_context(without_hints())
            server = stack.enter_context(federated(plain_module(model)))
            super().fit(server, ckpt_path=ckpt_path, weights_only=weights_only, **arguments)
            self._last_state = fit.state_dict() if fit.started else None

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint of the global model, from which ``fit(ckpt_path=...)`` goes on; also after a fit.

        Args:
            filepath: where.
            weights_only: leave out what only a resume needs.
            storage_options: as in Lightning.
        """
        with ExitStack() as stack:
            if self._fit is None and self._last_state is not None and self.lightning_module is not None:
                stack.enter_context(federated(self.lightning_module))
            super().save_checkpoint(filepath, weights_only, storage_options)
        # the clients' memory that it names stays as long as the file
        if self._fit is not None:
            self._fit.saved(filepath)
        elif self._last_state is not None and self.is_global_zero:
            register(Path(self._last_state["folder"]) / "memory", filepath)

    # ---- where Lightning and a federation differ ---------------------------------------------------------------

    def _run(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.fn == TrainerFn.FITTING:
            # whatever the data module offers for training belongs to the clients
            self.fit_loop._data_source.instance = RoundLoader()
            self.fit_loop.epoch_loop._results = ClientResults(training=True)  # a round's values cost a third in it
        return super()._run(model, *args, **kwargs)

    def _is_last(self, model: Any) -> bool:
        """Whether Lightning would count on from the last fit, which it does for a second fit of a module."""
        same = self.strategy._lightning_module is plain_module(model)
        return same and self.current_epoch > 0 and not self.fast_dev_run

    def _close_fit(self) -> None:
        if self._fit is not None:
            self._fit.close()
            self._fit = None

    def _threads(self) -> Any:
        stack = ExitStack()
        if self.num_threads is not None:
            before = torch.get_num_threads()
            torch.set_num_threads(self.num_threads)
            stack.callback(torch.set_num_threads, before)
        return stack
