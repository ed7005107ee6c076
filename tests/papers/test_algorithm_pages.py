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


OWN_PAGES = {
    "BufferedHeteroFL": "heterofl",
    **dict.fromkeys(("FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"), "fedopt"),
    **dict.fromkeys(
        ("ALittleIsEnough", "CoordinateMedian", "GeometricMedian", "Krum", "MultiKrum", "NormClipping", "TrimmedMean"),
        "robust",
    ),
}


@pytest.mark.parametrize("page", ["fedbn", "fine_tuning", "shared_subset", "lora"])
def test_what_is_no_algorithm_has_a_page_with_the_same_parts(page: str) -> None:
    """A policy, an evaluation, a cut of the data and adapters come from papers, too."""
    assert_complete(page)


def assert_complete(page: str) -> str:
    text = (Path(__file__).parents[2] / "docs" / "algorithms" / f"{page}.md").read_text()
    assert "$$" in text or re.search(r"\$[^$\n]*\\[a-z]", text), f"{page} has no formula"
    for heading in ("## When to use", "## How "):
        assert heading in text, f"{page} has no {heading!r}"
    assert re.search(r"^## How (it|they) differs? from the papers?", text, re.MULTILINE), page
    assert re.search(r"^```yaml$", text, re.MULTILINE), f"{page} shows no configuration"
    return text


def test_every_algorithm_has_a_page_with_formula_use_and_differences() -> None:
    modules = (fl_lightning.algorithms, fl_lightning.algorithms.robust)
    found = {
        name
        for module in modules
        for name in module.__all__
        if inspect.isclass(kind := getattr(module, name)) and issubclass(kind, Algorithm)
    } - {"Algorithm", "RobustAlgorithm"}
    assert {"FedAvg", "Scaffold", "MultiKrum"} <= found
    for name in sorted(found):
        page = OWN_PAGES.get(name, name.lower())
        assert re.search(rf"\b{name}\b", assert_complete(page)), f"{name} does not stand on its page {page}."
