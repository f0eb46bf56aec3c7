"""Flags and the names that they stand for."""

import re
from collections.abc import Iterable, Sequence


def option(name: str) -> str:
    """Returns the flag of an argument, such as "--batch-size" for "batch_size"."""
    return "--" + name.rstrip("_").replace("_", "-")


def name_flags(message: str, names: Iterable[str]) -> str:
    """Replaces names of arguments in an error by their flags, where `=` or `must` follows the name.

    Args:
      message: the error, as in "top_p must be in [0, 1]" or "self.head_size=64 must be at least 2".
      names: the arguments that have a flag.
    """
    known = set(names)

    def flag(match: re.Match[str]) -> str:
        return option(match["name"]) if match["name"] in known else match[0]

    return re.sub(r"(self\.)?(?<![-\w])(?P<name>[a-z]\w*)\b(?=\s*(=|must\b))", flag, message)


def typed_names(arguments: Sequence[str]) -> set[str]:
    """Returns the names of the arguments whose flags a command line holds."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


__all__ = ["name_flags", "option", "typed_names"]
