"""Packages that only some data sets need: imported when used, with a message that says how to get them."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

__all__ = ["package_folder", "require"]


def require(module: str, purpose: str, install: str = "fl-lightning[data]") -> ModuleType:
    """Import and return ``module``.

    Args:
        module: dotted name, ``"sklearn.datasets"`` for example.
        purpose: who needs it; the subject of the error.
        install: what ``pip install`` must be given to bring it.

    Raises:
        ModuleNotFoundError: names the package and the command that installs it.

    Example:
        >>> require("json", "this example").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_message(error.name or module, purpose, install), name=error.name) from error


def package_folder(package: str, purpose: str, install: str = "fl-lightning[data]") -> Path:
    """Return the folder of an installed package without importing it (and so without its dependencies).

    Raises:
        ModuleNotFoundError: names the package and the command that installs it.

    Example:
        >>> package_folder("json", "this example").name
        'json'
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(_message(package, purpose, install), name=package)
    return Path(next(iter(spec.submodule_search_locations)))


def _message(package: str, purpose: str, install: str) -> str:
    return f"{purpose} needs the package {package!r}, which is not installed. Run: pip install '{install}'"
