"""Settings in YAML files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_LONGEST = 200  # characters of a message of the parser


class _Loader(yaml.SafeLoader):
    """Reads `6e-4` as a number, as YAML 1.2 does; PyYAML by itself reads a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the settings in a YAML file; JSON is YAML, too.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it does not hold values by name; the message names the file and the place.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:_LONGEST]
        raise ValueError(f"{path} is damaged, or no YAML: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold settings by name, as in `steps: 1000`")
    return values


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes settings, in the order in which they are given."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


__all__ = ["read_yaml", "write_yaml"]
