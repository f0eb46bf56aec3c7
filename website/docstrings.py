"""Lets the reference understand the headings of our docstrings."""

import re
from typing import Any

import griffe


class Headings(griffe.Extension):
    """Calls a section "Example" "Examples", as Griffe does, which then shows it as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object before it is read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
