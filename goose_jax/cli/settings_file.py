"""Converts the settings of `goose-jax train` to values of a YAML file, and back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAliasType, Union

from goose_jax.cli.train_settings import TrainSettings

NOT_RECORDED = (
    *("config", "resume"),
    *("cluster", "coordinator", "num_processes", "process_id"),
)
"""The settings that say where to find settings, or the other processes of the run."""
_PATHS_OF_THE_RUN = ("out",)  # the others are absolute in a record


def to_values(settings: TrainSettings) -> dict[str, Any]:
    """Returns all settings but `NOT_RECORDED`, as values that YAML can hold, by flag."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Path):
            value = str(value if field.name in _PATHS_OF_THE_RUN else value.absolute())
        if isinstance(value, tuple):
            value = list(value)
        if field.name not in NOT_RECORDED:
            values[field.name.rstrip("_")] = value
    return values


def from_values(values: Mapping[str, Any], source: Path) -> TrainSettings:
    """Returns the settings with these values; settings that are not named have their defaults.

    Args:
      values: settings by flag, with `-` or `_` between words.
      source: the file they come from, for the error.

    Raises:
      ValueError: if a setting is unknown, has a value of another type, or is out of range.
    """
    hints = typing.get_type_hints(TrainSettings)
    known = {name.rstrip("_"): name for name in hints if name not in NOT_RECORDED}
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = known.get(key.replace("-", "_").rstrip("_"))
        if name is None:
            raise ValueError(f"{source}: {key!r} is unknown here")
        try:
            given[name] = _convert(hints[name], value)
        except TypeError as error:
            raise ValueError(f"{source}: {key} must be {error}, got {value!r}") from None
    try:
        return TrainSettings(**given)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _convert(hint: Any, value: Any) -> Any:
    """Returns a value of the type of a setting.

    Raises:
      TypeError: if the value has another type. The message says what is expected.
    """
    if isinstance(hint, TypeAliasType):
        hint = hint.__value__
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if value is None and len(kinds) < len(typing.get_args(hint)):
            return None
        (hint,) = kinds
        return _convert(hint, value)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise TypeError(f"one of {', '.join(map(str, choices))}")
        return value
    if typing.get_origin(hint) is tuple:
        kind, _ = typing.get_args(hint)
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(kind, item) for item in items)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        names = {Path: "a path", str: "a text", int: "an integer", float: "a number"}
        raise TypeError(names.get(hint, "true or false"))
    return value


__all__ = ["NOT_RECORDED", "from_values", "to_values"]
