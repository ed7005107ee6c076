"""Where each argument of ``lightning.Trainer`` goes in a federation."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["TRAINER_ARGUMENTS", "Argument", "divide"]

Side = Literal["server", "client", "both", "refused"]


class Argument(NamedTuple):
    """One row of the table: which side an argument belongs to, and why."""

    side: Side
    why: str


TRAINER_ARGUMENTS: dict[str, Argument] = {
    "accelerator": Argument("both", "places the federation; each client trains on one device of it"),
    "strategy": Argument("server", "splits the cohort over processes; FSDP, DeepSpeed and model-parallel are refused"),
    "devices": Argument("server", "processes that share the cohort"),
    "num_nodes": Argument("server", "nodes that share the cohort"),
    "precision": Argument(
        "both", "holds for clients and evaluation; the server's sums and weights stay float32 (float64)"
    ),
    "logger": Argument("server", "rounds; each client's curves go below the same folder"),
    "callbacks": Argument("server", "see rounds as epochs; callbacks of local training go to client_callbacks"),
    "fast_dev_run": Argument("both", "one round, two clients, one batch each"),
    "max_epochs": Argument("refused", "use max_rounds for rounds and local_epochs for the clients' epochs"),
    "min_epochs": Argument("server", "fewest rounds before early stopping may stop"),
    "max_steps": Argument("refused", "use max_rounds for rounds and local_steps for the clients' optimizer steps"),
    "min_steps": Argument("refused", "use min_epochs for the fewest rounds"),
    "max_time": Argument("server", "stops after the round in which the time runs out"),
    "limit_train_batches": Argument("client", "batches a client trains on per local epoch"),
    "limit_val_batches": Argument("both", "batches of the server's validation, and of a client that validates"),
    "limit_test_batches": Argument("server", "batches of the server's test"),
    "limit_predict_batches": Argument("server", "batches of the server's prediction"),
    "overfit_batches": Argument("client", "the same few batches in every local epoch"),
    "val_check_interval": Argument("refused", "a round is one step; use check_val_every_n_epoch for every n rounds"),
    "check_val_every_n_epoch": Argument("server", "validates every n rounds"),
    "num_sanity_val_steps": Argument("server", "validation batches before the first round"),
    "log_every_n_steps": Argument("both", "rounds on the server (1 unless given), local steps on a client's curve"),
    "enable_checkpointing": Argument("server", "checkpoints are of the global model"),
    "enable_progress_bar": Argument("server", "one bar for the rounds"),
    "enable_model_summary": Argument("server", "printed once"),
    "accumulate_grad_batches": Argument("client", "batches per local optimizer step"),
    "gradient_clip_val": Argument("client", "clips local gradients; the server's update is never clipped"),
    "gradient_clip_algorithm": Argument("client", "with gradient_clip_val"),
    "deterministic": Argument("both", "torch's deterministic algorithms"),
    "benchmark": Argument("both", "cuDNN's autotuner"),
    "inference_mode": Argument("both", "how evaluation runs"),
    "use_distributed_sampler": Argument(
        "server", "not used: every process evaluates all of the server's data, so values do not depend on devices"
    ),
    "profiler": Argument("server", "profiles rounds"),
    "detect_anomaly": Argument("client", "autograd's anomaly detection in local training"),
    "barebones": Argument("server", "rounds without logging, checkpoints and progress bar"),
    "plugins": Argument("both", "a precision plugin holds for the clients too; the others belong to the federation"),
    "sync_batchnorm": Argument(
        "refused", "clients do not train in step; use batch_norm='average', 'local' or 'recalibrate'"
    ),
    "reload_dataloaders_every_n_epochs": Argument("server", "reloads the server's evaluation data every n rounds"),
    "default_root_dir": Argument("server", "where logs/ is"),
    "enable_autolog_hparams": Argument("server", "the module's hyperparameters are logged once"),
    "model_registry": Argument("server", "uploads of the global model"),
}
"""Every argument of Lightning's Trainer; a test compares this table with the Trainer's signature."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "max_epochs": (None,),
    "max_steps": (-1, None),
    "min_steps": (None,),
    "val_check_interval": (None, 1.0),
    "sync_batchnorm": (False, None),
}
_CLIENT = [name for name, argument in TRAINER_ARGUMENTS.items() if argument.side == "client"]
_SHARED = ("precision", "deterministic", "benchmark", "inference_mode", "limit_val_batches", "log_every_n_steps")


def divide(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the clients' share out of Lightning's arguments.

    Args:
        arguments: what the user passed to the federation's Trainer; afterwards only the server's share.

    Returns:
        The arguments of the clients' Trainers.

    Raises:
        MisconfigurationException: for an argument that a federation refuses.

    Example:
        >>> server = {"gradient_clip_val": 1.0, "max_time": "00:01:00:00", "precision": "bf16-mixed"}
        >>> divide(server)
        {'gradient_clip_val': 1.0, 'precision': 'bf16-mixed'}
        >>> server
        {'max_time': '00:01:00:00', 'precision': 'bf16-mixed'}
    """
    for name, neutral in _NEUTRAL.items():
        value = arguments.pop(name, None)
        if value not in neutral and value is not None:
            raise MisconfigurationException(
                f"FederatedTrainer({name}={value!r}) has no meaning in a federation: {TRAINER_ARGUMENTS[name].why}."
            )
    client = {name: arguments.pop(name) for name in _CLIENT if arguments.get(name) is not None}
    for name in _CLIENT:
        arguments.pop(name, None)
    client.update({name: arguments[name] for name in _SHARED if arguments.get(name) is not None})
    return client
