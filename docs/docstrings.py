"""What mkdocstrings does not know of our docstrings: `Example:`, doctests without a section, Sphinx's roles."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Turn `Example:` into the section that holds doctests, lone doctests into code blocks, and roles into code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was read from the source."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE | re.DOTALL)
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
