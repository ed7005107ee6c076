"""Every algorithm has a page, and what the page tells people to configure can be built."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import fl_lightning.algorithms
import fl_lightning.algorithms.robust
from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import Algorithm

PAGES = sorted((Path(__file__).parents[2] / "docs" / "algorithms").glob("*.md"))
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def recipes() -> list[Any]:
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(BLOCK.findall(page.read_text()))
        if "algorithm:" in block
    ]


@pytest.mark.parametrize("recipe", recipes())
def test_the_command_line_accepts_what_a_page_shows(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(recipe)
    config["seed_everything"] = 1
    config["trainer"] = {**config["trainer"], "max_rounds": 1, "accelerator": "cpu", "logger": False}
    config["model"] = {"class_path": "fl_lightning.models.DigitsClassifier"}
    config["data"] = {
        "class_path": "fl_lightning.FederatedDataModule",
        "init_args": {
            "datamodule": {"class_path": "fl_lightning.data.DigitsDataModule"},
            "partitioner": {"class_path": "fl_lightning.IID", "init_args": {"num_clients": 10}},
        },
    }
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["fl-lightning"])  # LightningCLI warns of arguments that are pytest's
    cli = LightningCLI(
        pl.LightningModule, pl.LightningDataModule, trainer_class=FederatedTrainer, save_config_callback=None,
        subclass_mode_model=True, subclass_mode_data=True, run=False, args=["--config", "shown.yaml"],
    )  # fmt: skip
    trainer: Any = cli.trainer
    assert isinstance(trainer, FederatedTrainer)
    name = config["trainer"]["algorithm"]["class_path"].rsplit(".", 1)[1]
    assert type(trainer.algorithm).__name__ == name
    for argument, value in config["trainer"]["algorithm"]["init_args"].items():
        if isinstance(value, bool | int | float | str):
            assert getattr(trainer.algorithm, argument, value) == value


def test_every_algorithm_has_a_page_with_formula_use_and_differences() -> None:
    modules = (fl_lightning.algorithms, fl_lightning.algorithms.robust)
    found = {
        name
        for module in modules
        for name in module.__all__
        if inspect.isclass(kind := getattr(module, name)) and issubclass(kind, Algorithm)
    } - {"Algorithm", "RobustAlgorithm"}
    assert {"FedAvg", "Scaffold", "MultiKrum"} <= found
    pages = {page: page.read_text() for page in PAGES}
    for name in sorted(found):
        complete = [
            page.name
            for page, text in pages.items()
            if re.search(rf"\b{name}\b", text) and "## When to use" in text and "differ" in text and "$" in text
        ]
        assert complete, f"{name} stands on no page of docs/algorithms with a formula, its use and its differences."
