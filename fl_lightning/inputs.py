"""What users hand to the trainer, sorted: server arguments, clients and evaluation data, compiled modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.algorithms import Algorithm

__all__ = [
    "check_strategy",
    "default_logger",
    "is_datamodule",
    "plain_module",
    "prepare_server_arguments",
    "sort_data",
]


def prepare_server_arguments(kwargs: dict[str, Any], max_rounds: int | None, algorithm: Algorithm) -> None:
    """Fill in what a federation decides for the outer Trainer."""
    kwargs["max_epochs"] = max_rounds
    if kwargs.get("barebones"):
        return
    if kwargs.get("log_every_n_steps") is None:
        kwargs["log_every_n_steps"] = 1
    logger = kwargs.get("logger")
    if logger is None or logger is True:
        root = os.path.join(kwargs.get("default_root_dir") or os.getcwd(), "logs")
        kwargs["logger"] = default_logger(root, type(algorithm).__name__.lower())


def default_logger(save_dir: str, name: str) -> Logger:
    """Return the logger of a federation without one of its own: ``logs/<name>/version_N`` in TensorBoard's format."""
    try:
        return TensorBoardLogger(save_dir, name=name, default_hp_metric=False)
    except ModuleNotFoundError:
        return CSVLogger(save_dir, name=name)


def sort_data(train: Any, val: Any, datamodule: Any) -> tuple[Any, Any]:
    """Return the clients and the server's validation data.

    Raises:
        MisconfigurationException: when there are no clients, or two kinds of them.
    """
    if train is not None and datamodule is not None:
        raise MisconfigurationException("fit got clients twice: train_dataloaders and datamodule. Pass one of them.")
    data = datamodule if datamodule is not None else train
    if data is None:
        raise MisconfigurationException(
            "fit got no clients. Pass a FederatedDataModule(MyDataModule(), Dirichlet(num_clients=100, alpha=0.3)), a "
            "data module with client_ids() and client_dataloader(id), or a mapping of client ids to train loaders."
        )
    if val is not None and not isinstance(data, Mapping):
        raise MisconfigurationException(
            f"fit got val_dataloaders beside {type(data).__name__}, whose val_dataloader() is the server's. Leave "
            "val_dataloaders out, or pass the clients as a mapping of loaders."
        )
    return data, val


def is_datamodule(data: Any) -> bool:
    """Return whether data came as a data module and not as loaders."""
    names = ("client_ids", "val_dataloader", "test_dataloader", "predict_dataloader")
    return not isinstance(data, Mapping) and any(callable(getattr(data, name, None)) for name in names)


def plain_module(model: Any) -> Any:
    """Return the module that ``torch.compile`` wrapped."""
    return getattr(model, "_orig_mod", model)


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that shard the model or end with their processes, and let DDP wrap nothing.

    Raises:
        MisconfigurationException: names the strategy to use.
    """
    if isinstance(strategy, DDPStrategy):
        # the gradient is no result of autograd: a DDP wrapper would wait for hooks that never run
        strategy.configure_ddp = lambda: None  # type: ignore[method-assign]
        if strategy._start_method != "popen":
            raise MisconfigurationException(
                f"strategy='ddp_{strategy._start_method}' would leave round_history and the weights in processes "
                "that end. Use strategy='ddp', which starts the script again for each device."
            )
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} shards the model, and a federation's server needs it whole. Use "
            "strategy='auto' or strategy='ddp' with devices=1, 2, 4 or 8: the cohort is split over the processes."
        )
