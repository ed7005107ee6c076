"""What the README promises about installing, running and testing agrees with the files that do it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fl_lightning

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture
def project(repository: Path) -> dict[str, object]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture
def pins(repository: Path) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (repository / "constraints.txt").read_text().splitlines()]
    return {_canonical(pin.name): pin for pin in map(Requirement, filter(None, lines))}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(project: dict[str, object], *extras: str) -> list[Requirement]:
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [Requirement(line) for line in lines]


def test_everything_that_ci_installs_is_pinned_inside_its_range(
    project: dict[str, object], pins: dict[str, Requirement]
) -> None:
    for requirement in _requirements(project, "data", "dev", "docs"):
        pin = pins.get(_canonical(requirement.name))
        assert pin is not None, f"{requirement.name} is installed by CI and not pinned in constraints.txt"
        (exact,) = pin.specifier
        assert exact.operator == "==", f"constraints.txt: {pin} is no exact version"
        assert requirement.specifier.contains(exact.version), f"{pin} is outside {requirement} of pyproject.toml"


def test_the_lightning_that_runs_is_the_one_that_is_pinned(pins: dict[str, Requirement]) -> None:
    import lightning
    import torch

    for name, version in (("torch", torch.__version__), ("lightning", lightning.__version__)):
        assert pins[name].specifier.contains(Version(version).public), (
            f"tests ran {name} {version}, pinned: {pins[name]}"
        )


def test_version_is_a_version_and_stands_in_one_place(project: dict[str, object]) -> None:
    assert Version(fl_lightning.__version__)
    assert project["dynamic"] == ["version"]
    assert "version" not in project


def test_every_install_command_in_the_documentation_is_constrained(repository: Path) -> None:
    pages = [*repository.glob("*.md"), *(repository / "docs").rglob("*.md"), repository / "Makefile"]
    commands = [
        line for page in pages for line in page.read_text().splitlines() if re.search(r"\bpip\b.* install ", line)
    ]
    # the environments of other libraries are theirs: what this project pins is not in them
    commands = [line for line in commands if not line.strip().startswith("FOLDER/")]
    assert commands
    assert [line for line in commands if "-c constraints.txt" not in line] == []


def test_the_readme_names_the_targets_of_the_makefile(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    text = (repository / "README.md").read_text() + (repository / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", text, re.MULTILINE))
    assert {name for pair in named for name in pair if name} <= targets
    assert {"run", "test", "check", "docs", "setup"} <= targets


def _run_ci_with_a_make_that(script: str, repository: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run ``.ci/run`` with a ``make`` that writes down its arguments; installing for real is CI's own business."""
    (tmp_path / "make").write_text(f'#!/bin/sh\necho "make $*" >> "{tmp_path}/calls"\n{script}\n')
    (tmp_path / "make").chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CI": "true"}
    command = ["bash", str(repository / ".ci" / "run")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_ci_fails_when_the_tests_fail(repository: Path, tmp_path: Path) -> None:
    run = _run_ci_with_a_make_that('case "$*" in *test*) echo "1 failed"; exit 2;; esac', repository, tmp_path)
    assert run.returncode != 0


def test_ci_fails_when_the_lint_fails(repository: Path, tmp_path: Path) -> None:
    run = _run_ci_with_a_make_that('case "$*" in *lint*) exit 2;; esac', repository, tmp_path)
    assert run.returncode != 0


def test_ci_checks_everything_and_ends_with_the_test_command_of_the_readme(repository: Path, tmp_path: Path) -> None:
    run = _run_ci_with_a_make_that('case "$*" in *test*) echo "3 passed in 0.1s";; esac', repository, tmp_path)
    assert run.returncode == 0
    assert run.stdout.splitlines()[-1] == "3 passed in 0.1s"
    *checks, last = (tmp_path / "calls").read_text().split("\n")[:-1]
    assert {"lint", "types", "docs"} <= set(" ".join(checks).split())
    assert [word for word in last.split() if not word.startswith("-")] == ["make", "test"]


def test_logs_are_kept_as_an_empty_folder(repository: Path) -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "logs/fedavg/version_0/hparams.yaml", "logs/.gitkeep"],
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert ignored.stdout.split() == ["logs/fedavg/version_0/hparams.yaml"]
    assert (repository / "logs" / ".gitkeep").exists()
