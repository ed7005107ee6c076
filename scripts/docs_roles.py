"""Docstrings hold reStructuredText roles and formulas, the site is Markdown: this turns the one into the other."""

from __future__ import annotations

import re
from typing import Any

import griffe

_MATH = re.compile(r":math:`([^`]+)`", re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^([ \t]*)Example:[ \t]*$", re.MULTILINE)
_BLOCK = re.compile(r"^([ \t]*)\.\. math::[ \t]*(.*(?:\n(?:\1[ \t]+\S.*|[ \t]*(?=\n\1[ \t]+\S)))*)", re.MULTILINE)


class RolesToMarkdown(griffe.Extension):
    """Rewrites every docstring once, when its object has been loaded."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Turn roles into code and math into what the page's math renderer reads."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    r"""Return ``text`` with roles as code, formulas between dollars, and examples under griffe's own heading.

    Under ``Example:`` griffe would read ``x["a"][0]`` of a doctest as a Markdown link.

    Example:
        >>> to_markdown(":func:`to_vector` of :math:`w_t`")
        '`to_vector` of $w_t$'
        >>> print(to_markdown("The mean.\n\n.. math:: a = b\n\nMore."))
        The mean.
        <BLANKLINE>
        $$
        a = b
        $$
        <BLANKLINE>
        More.
    """
    text = _BLOCK.sub(lambda m: f"{m[1]}$$\n{m[1]}{' '.join(m[2].split())}\n{m[1]}$$", text)
    text = _EXAMPLE.sub(r"\1Examples:", text)
    text = _MATH.sub(lambda m: f"${m[1]}$", text)
    return _ROLE.sub(lambda m: f"`{m[1]}`", text)
