"""What MkDocs builds from the code: the reference pages and the table of Trainer arguments."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PACKAGE = Path(__file__).parent.parent / "fl_lightning"
TABLE = "<!-- trainer arguments -->"
# What users meet first comes first; everything else follows by name.
FIRST = ("trainer", "data", "algorithms", "transforms", "callbacks", "models", "types")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the reference to the navigation."""
    assert config.nav is not None, "mkdocs.yml has no nav"
    config.nav.append({"Reference": [{unit: f"reference/{unit}.md"} for unit in _units()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add one reference page for each file and folder at the top of the package."""
    for unit in _units():
        # a folder that exports names is shown by them; its files would show each a second time
        exports = "__all__" in (PACKAGE / unit / "__init__.py").read_text() if (PACKAGE / unit).is_dir() else False
        options = f"      show_root_heading: false\n      show_submodules: {str(not exports).lower()}\n"
        page = f"# {unit}\n\n::: fl_lightning.{unit}\n    options:\n{options}"
        files.append(File.generated(config, f"reference/{unit}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Put the table of Trainer arguments where a page asks for it."""
    return markdown.replace(TABLE, _argument_table()) if TABLE in markdown else markdown


def _units() -> list[str]:
    names = {path.stem for path in PACKAGE.glob("[!_]*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    public = [name for name in names if _has_content(name)]
    return sorted(public, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def _has_content(unit: str) -> bool:
    """Return whether a part exports anything; an empty folder would be an empty page."""
    files = [PACKAGE / f"{unit}.py", *(PACKAGE / unit).rglob("*.py")]
    return any("__all__" in file.read_text() for file in files if file.exists())


def _argument_table() -> str:
    """Return the table of ``fl_lightning/arguments.py``, read from its source so that no torch is needed to build."""
    tree = ast.parse((PACKAGE / "arguments.py").read_text())
    table = next(node for node in tree.body if _names(node) == "TRAINER_ARGUMENTS")
    assert isinstance(table, ast.Assign | ast.AnnAssign), "TRAINER_ARGUMENTS is assigned"
    assert isinstance(table.value, ast.Dict), "TRAINER_ARGUMENTS is a literal dictionary"
    rows = ["| argument | where | why |", "|---|---|---|"]
    for key, value in zip(table.value.keys, table.value.values, strict=True):
        parts = value.args if isinstance(value, ast.Call) else value.elts if isinstance(value, ast.Tuple) else []
        assert key is not None, "TRAINER_ARGUMENTS has no ** in it"
        side, why = (str(ast.literal_eval(part)) for part in parts)
        rows.append(f"| `{ast.literal_eval(key)}` | {side} | {why} |")
    return "\n".join(rows)


def _names(node: ast.stmt) -> str | None:
    target = (
        node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
    )
    return target.id if isinstance(target, ast.Name) else None
