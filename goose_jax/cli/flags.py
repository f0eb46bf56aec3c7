"""Flags, the names that they stand for, and the range of their integers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

_T = TypeVar("_T")
IfGiven = Annotated[_T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="")]
"""The type of a flag that may be left out: it is None then, and its help says what that means."""

_INT32 = 2**31 - 1
_NAME = re.compile(r"(?<![^\s(])(self\.)?(?P<name>[a-z]\w*)\b(?=\s*(=|must\b))")


def option(name: str) -> str:
    """Returns the flag of an argument, such as "--batch-size" for "batch_size"."""
    return "--" + name.rstrip("_").replace("_", "-")


def name_flags(message: str, names: Iterable[str], values: Iterable[str] = ()) -> str:
    """Replaces names of arguments in an error by their flags, where `=` or `must` follows the name.

    Args:
      message: the error, as in "top_p must be in [0, 1]" or "self.head_size=64 must be at least 2".
      names: the arguments that have a flag.
      values: what the user typed, such as the path "steps=3": it is not changed.
    """
    values = set(values)
    known = set(names) - values

    def flag(match: re.Match[str]) -> str:
        return option(match["name"]) if match["name"] in known else match[0]

    kept = sorted((value for value in values if _NAME.search(value)), key=len, reverse=True)
    if not kept:
        return _NAME.sub(flag, message)
    parts = re.split("(" + "|".join(map(re.escape, kept)) + ")", message)
    return "".join(part if i % 2 else _NAME.sub(flag, part) for i, part in enumerate(parts))


def typed_names(arguments: Sequence[str]) -> set[str]:
    """Returns the names of the arguments whose flags a command line holds."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def typed_values(arguments: Sequence[str]) -> set[str]:
    """Returns the values that a command line holds, also as messages write them, as paths."""
    pairs = (a.partition("=") if a.startswith("--") else ("", "=", a) for a in arguments)
    values = {value for _, equals, value in pairs if equals and value}
    return values | {str(Path(value)) for value in values}


def check_integers(values: Mapping[str, Any], most: Mapping[str, int] | None = None) -> None:
    """Checks that integers are not too large: 32 bits with a sign hold most of them.

    Args:
      values: values by name; those that are no integers are passed over.
      most: the largest values of integers with another limit, by name.

    Raises:
      ValueError: if an integer is larger; the message names its flag and the value.
    """
    for name, value in values.items():
        limit = (most or {}).get(name, _INT32)
        if isinstance(value, int) and value > limit:
            raise ValueError(f"{option(name)} must be at most {limit}, got {value}")


__all__ = ["check_integers", "name_flags", "option", "typed_names", "typed_values"]
