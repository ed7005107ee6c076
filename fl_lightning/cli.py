"""The command line: Lightning's own, with rounds for epochs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fl_lightning import __version__
from fl_lightning.trainer import FederatedTrainer

__all__ = ["FederatedCLI", "main"]

_DESCRIPTION = (
    "Federated learning for people who already have a LightningModule. "
    "Start with: fl-lightning fit --config configs/fedavg.yaml; go on after a stop with --ckpt_path last; "
    "see every setting with --print_config."
)


class FederatedCLI(LightningCLI):
    """``LightningCLI`` with :class:`FederatedTrainer`: any module and any data module by ``class_path``."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=FederatedTrainer,
            # a resumed run goes on in its folder, where its config.yaml already is
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "fl-lightning", "description": _DESCRIPTION, "version": __version__},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def after_fit(self) -> None:
        """Print what a user looks for after a run: how good, where, and how to look at it."""
        trainer = self.trainer
        assert isinstance(trainer, FederatedTrainer)
        # asked on every process: Lightning agrees on the folder by a broadcast
        folder = trainer.log_dir if trainer.loggers else None
        _print_summary(trainer, folder)


@rank_zero_only
def _print_summary(trainer: FederatedTrainer, folder: str | None) -> None:
    lines = [""]
    if trainer.round_history:
        last = trainer.round_history[-1]
        shown = {name: value for name, value in last.metrics.items() if "/" not in name and not name.endswith("_step")}
        lines.append(f"Round {last.round + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if checkpoint:
        lines.append(f"Checkpoint:  {checkpoint}")
    if folder:
        lines.append(f"TensorBoard: tensorboard --logdir {folder}")
    sys.stdout.write("\n".join(lines) + "\n")


def _require_yaml(args: Sequence[str]) -> None:
    """Raise for a configuration file that is no YAML; the parser would say where, but not in which file."""
    for position, argument in enumerate(args):
        name, _, value = argument.partition("=")
        path = Path(value or next(iter(args[position + 1 :]), ""))
        if name not in ("--config", "-c") or not path.is_file():
            continue
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = str(error).replace("<unicode string>", str(path))
            raise MisconfigurationException(
                f"{path} is no YAML: {where}. Mend it, or start from the output of `fl-lightning fit --print_config`."
            ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Run ``fl-lightning``; a wrong configuration ends it with one message and exit code 2."""
    sys.path.insert(0, "")  # a module in the current folder is found by its name
    try:
        _require_yaml(sys.argv[1:] if args is None else args)
        FederatedCLI(args=list(args) if args is not None else None)
    except MisconfigurationException as error:
        sys.stderr.write(f"\nfl-lightning: error: {error}\n")
        sys.exit(2)
