"""What the documentation tells people to write runs as it stands there, with fewer rounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# every page with a program that is complete in itself; the tutorial has a test of its own, and docs/resume.md shows
# single lines only
PROGRAMS = (
    "README.md", "docs/index.md", "docs/data.md", "docs/metrics.md", "docs/reproducibility.md",
    "docs/algorithms/personal.md", "docs/devices.md",
)  # fmt: skip


def _blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def _shortened(code: str) -> str:
    """Cut the rounds: the text shows a real run, the test only has to see that every line works."""
    return re.sub(r"max_rounds=\d+", "max_rounds=1", code)


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_python_on_a_page_is_one_program_that_runs(page: str, repository: Path, tmp_path: Path) -> None:
    blocks = _blocks(repository / page, "python")
    assert blocks, f"{page} shows no Python any more"
    (tmp_path / "program.py").write_text(_shortened("\n".join(blocks)))
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_tutorial_runs_and_resumes_where_it_stopped(repository: Path, tmp_path: Path) -> None:
    """The last step of the tutorial goes on from the run before it, in the same folder."""
    code = "\n".join(_blocks(repository / "docs/tutorial.md", "python")).replace("max_rounds=5", "max_rounds=1")
    code += "\nimport json\nprint('\\n' + json.dumps([report.round for report in trainer.round_history]))\n"
    (tmp_path / "program.py").write_text(code)
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    # max_rounds=2, then max_rounds=4 with ckpt_path="last"
    assert json.loads(run.stdout.splitlines()[-1]) == [0, 1, 2, 3]


def test_the_configuration_on_the_command_line_page_runs(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(_blocks(repository / "docs/cli.md", "yaml")[0])
    changes = ["--trainer.max_rounds", "1", "--data.init_args.partitioner.init_args.alpha", "0.1"]
    command = [sys.executable, "-m", "fl_lightning", "fit", "--config", "shown.yaml", *changes]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "logs").is_dir()


def test_a_module_in_the_current_folder_is_found(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "my_project.py").write_text(
        "from fl_lightning.data import DigitsDataModule\n"
        "from fl_lightning.models import DigitsClassifier\n\n\n"
        "class MyModule(DigitsClassifier):\n    pass\n\n\n"
        "class MyDataModule(DigitsDataModule):\n    pass\n"
    )
    (tmp_path / "mine.yaml").write_text(_blocks(repository / "docs/cli.md", "yaml")[1])
    command = [sys.executable, "-m", "fl_lightning", "fit", "--config", "mine.yaml", "--trainer.fast_dev_run", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def test_links_between_the_pages_of_the_repository_lead_somewhere(repository: Path) -> None:
    links = [
        (page, target)
        for page in [*repository.glob("*.md"), *(repository / "docs").rglob("*.md")]
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", page.read_text())
        # docs/reference/ is made when the site is built, which fails on links of its own
        if not target.startswith("reference/")
    ]
    assert links
    assert [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()] == []
