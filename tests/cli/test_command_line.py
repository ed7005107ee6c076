"""The command line as a user has it: recipes, a module of one's own, errors, and a run that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fl_lightning import FederatedTrainer, __version__
from fl_lightning.cli import FederatedCLI, main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FEDAVG = str(Path(__file__).parents[2] / "configs" / "fedavg.yaml")
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
OWN_MODULE = """
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

class Net(lightning.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

class Data(lightning.LightningDataModule):
    def loader(self):
        inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=5)

    def train_dataloader(self):
        return self.loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""


def own_arguments() -> list[str]:
    return [
        "--seed_everything=1",
        "--model=own_module.Net",
        "--data=fl_lightning.FederatedDataModule",
        "--data.datamodule=own_module.Data",
        "--data.partitioner=fl_lightning.IID",
        "--data.partitioner.num_clients=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_rounds=2",
        *QUIET,
    ]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_module.py").write_text(OWN_MODULE)
    yield tmp_path
    sys.modules.pop("own_module", None)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run ``fl-lightning`` in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["fl-lightning", *arguments])
        main()

    return run


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fl_lightning", "fit", "--config", FEDAVG, *QUIET, *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_runs_a_round(
    command: Callable[..., None], config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command("fit", "--config", str(config), "--trainer.max_rounds=1", "--trainer.limit_train_batches=1", *QUIET)
    (rounds,) = tmp_path.glob("logs/*/version_0/rounds.jsonl")
    report = json.loads(rounds.read_text())
    assert report["num_steps"] > 0
    assert report["cohort"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's own, for a checkpoint of another run
def test_a_module_in_the_current_folder_goes_through_all_four_commands(
    command: Callable[..., None], own_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("fit", *own_arguments())
    printed = capsys.readouterr().out
    (checkpoint,) = own_module.glob("logs/fedavg/version_0/checkpoints/*.ckpt")
    assert str(checkpoint) in printed
    assert "val_loss" in printed
    assert "tensorboard --logdir" in printed
    config = str(own_module / "logs/fedavg/version_0/config.yaml")
    for name in ("validate", "test", "predict"):
        command(name, "--config", config, "--ckpt_path", str(checkpoint))
    assert "val_loss" in capsys.readouterr().out


def test_print_config_is_a_config(
    command: Callable[..., None], own_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        command("fit", *own_arguments(), "--print_config")
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_rounds"] == 2
    assert {"algorithm", "clients_per_round", "precision", "gradient_clip_val"} <= set(printed["trainer"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_epochs=3"], "max_rounds=2 and max_epochs=3"),
        (["--trainer.clients_per_round=5"], "more clients than exist"),
        (["--trainer.strategy=fsdp"], "server needs it whole|FSDP|fsdp"),
        (["--trainer.local_epochs=0"], "local_epochs to be an integer >= 1"),
    ],
)
def test_a_wrong_configuration_is_one_message_and_exit_code_2(
    command: Callable[..., None],
    own_module: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        command("fit", *own_arguments(), *arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert re.search(message, printed)


def test_a_broken_yaml_names_its_line(
    command: Callable[..., None], own_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_module / "broken.yaml").write_text("trainer: [\n")
    with pytest.raises(SystemExit) as exit_:
        command("fit", "--config", "broken.yaml")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "broken.yaml is no YAML" in error
    assert "line 2" in error


def test_version_and_help(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    for flag, text in (("--version", __version__), ("--help", "fit")):
        with pytest.raises(SystemExit) as exit_:
            command(flag)
        assert exit_.value.code == 0
        assert text in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command("fit", "--help")
    assert "--trainer.clients_per_round" in capsys.readouterr().out


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rounds(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "logs/fedavg/version_0/rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


ARGUMENTS = ["--trainer.max_rounds=5", "--trainer.clients_per_round=4", "--trainer.evaluate_clients=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *ARGUMENTS)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return folder


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_run_that_is_stopped_in_a_round_goes_on_as_if_it_never_was(
    whole: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    process = start(tmp_path, *ARGUMENTS)
    history = tmp_path / "logs/fedavg/version_0/rounds.jsonl"
    deadline = time.monotonic() + 120
    while not (history.is_file() and history.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, process.communicate()[0]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(stop)
    process.communicate(timeout=120)
    assert len(rounds(tmp_path)) < 5
    process = start(tmp_path, *ARGUMENTS, "--ckpt_path", "last")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert os.listdir(tmp_path / "logs/fedavg") == ["version_0"]
    a, b = (folder / "logs/fedavg/version_0" for folder in (whole, tmp_path))
    weights = [torch.load(f / "checkpoints/round-4.ckpt", weights_only=True)["state_dict"] for f in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert rounds(whole) == rounds(tmp_path)
    assert scalars(a) == scalars(b)
    clients = sorted(path.name for path in (a / "clients").iterdir())
    assert clients == sorted(path.name for path in (b / "clients").iterdir())
    assert all(scalars(a / "clients" / name) == scalars(b / "clients" / name) for name in clients)


def test_the_trainer_of_the_command_line_is_the_federated_one(
    own_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(own_module)
    monkeypatch.setattr(sys, "argv", ["fl-lightning", "fit", *own_arguments()])
    cli = FederatedCLI()
    assert isinstance(cli.trainer, FederatedTrainer)
    assert len(cli.trainer.round_history) == 2
