"""The programs on the pages about algorithms run, and every algorithm has a recipe."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from algorithm_zoo import Net, clients

import fl_lightning.algorithms
import fl_lightning.algorithms.robust
import fl_lightning.callbacks
import fl_lightning.schedules
from fl_lightning import FederatedTrainer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "algorithms" / f"{name}.md" for name in ("callbacks", "samplers")]
NAMES = sorted(set(fl_lightning.algorithms.__all__) - {"Algorithm"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs(page: Path) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet.update(accelerator="cpu", enable_checkpointing=False)
    names: dict[str, Any] = {"torch": torch}
    for part in (fl_lightning.algorithms, fl_lightning.callbacks, fl_lightning.schedules):
        names.update({name: getattr(part, name) for name in part.__all__})
    names.update(FederatedTrainer=partial(FederatedTrainer, **quiet), module=Net(), loader=clients()["site-0"])
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert blocks
    for block in blocks:
        code = block.replace("from lightning.pytorch import Trainer", "")
        exec(code, {**names, "Trainer": partial(pl.Trainer, **quiet)})


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_has_a_recipe(name: str) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / f"{name.lower()}.yaml").read_text())
    assert recipe["trainer"]["algorithm"]["class_path"] == f"fl_lightning.{name}"


ROBUST = {
    "CoordinateMedian": "median",
    "FLTrust": "fltrust",
    "GeometricMedian": "rfa",
    "Krum": "krum",
    "MultiKrum": "multikrum",
    "NormClipping": "norm_clipping",
    "TrimmedMean": "trimmed_mean",
}


@pytest.mark.parametrize("name", ROBUST)
def test_every_robust_rule_has_a_recipe_and_a_short_name(name: str) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / f"{ROBUST[name]}.yaml").read_text())
    assert recipe["trainer"]["algorithm"]["class_path"] == f"fl_lightning.{name}"
    assert recipe["trainer"]["client_callbacks"], "the recipe shows what the rule is against"


def test_no_robust_rule_is_forgotten() -> None:
    rules = {name for name in fl_lightning.algorithms.robust.__all__ if hasattr(fl_lightning, name)} | {"FLTrust"}
    beside = {"ALittleIsEnough", "Cohort", "RobustAlgorithm"}  # the attack, and what rules are made of
    assert rules == set(ROBUST)
    assert set(fl_lightning.algorithms.robust.__all__) - rules <= beside


@pytest.mark.parametrize("attack", ["LabelFlip", "LittleIsEnough", "ModelReplacement", "NoiseAttack", "SignFlip"])
def test_every_attack_is_in_a_recipe(attack: str) -> None:
    texts = [path.read_text() for path in (ROOT / "configs").glob("*.yaml")]
    assert any(f"class_path: fl_lightning.callbacks.attacks.{attack}\n" in text for text in texts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_of_many_say_how_they_differ(page: Path) -> None:
    assert "## How they differ from the papers" in page.read_text()
