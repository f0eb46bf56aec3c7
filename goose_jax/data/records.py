"""Reads the small files of JSON that are kept beside tokens, and checks what they hold."""

import dataclasses
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from goose_jax.data.documents import Document
from goose_jax.data.json_lines import short

_LARGEST = 2**63 - 1


def read_object(file: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it holds something else. The message does not name the file.
    """
    try:
        value = json.loads(file.read_bytes().decode())
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it must hold a JSON object, got {short(value)}")
    return value


def check_fields(value: Any, fields: Iterable[str], name: str) -> None:
    """Checks that a value is an object with just these fields.

    Raises:
      ValueError: if it is not; the message begins with `name`.
    """
    fields = list(fields)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {short(value)}")
    if set(value) != set(fields):
        raise ValueError(f"{name} must have the fields {', '.join(fields)}, got {short([*value])}")


def check_size(value: Any, name: str) -> int:
    """Returns a value that is an integer from 0 to 2^63 - 1.

    Raises:
      ValueError: if it is something else; the message begins with `name`.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{name} must be an integer from 0 to 2^63 - 1, got {short(value)}")
    return value


def sizes_from_object[T](kind: type[T], value: Any, name: str) -> T:
    """Returns the dataclass that `dataclasses.asdict` made an object of.

    Args:
      kind: a dataclass whose fields are integers of at least 0, or such dataclasses.
      value: the object.
      name: what messages call it.

    Raises:
      ValueError: if a field is missing, unknown, or no such integer.
    """
    kinds = typing.get_type_hints(kind)
    check_fields(value, kinds, name)
    given: dict[str, Any] = {}
    for field, of in kinds.items():
        make = sizes_from_object if dataclasses.is_dataclass(of) else None
        inner = f"{name}.{field}"
        given[field] = make(of, value[field], inner) if make else check_size(value[field], inner)
    return kind(**given)


def document_from_object(value: Any, name: str) -> Document:
    """Returns the document that `dataclasses.asdict` made an object of.

    Args:
      value: the object.
      name: what messages call it.

    Raises:
      ValueError: if a field is missing, unknown or of another type, the text cannot be encoded, or
        the counted ranges are not in ascending order within the text.
    """
    check_fields(value, [field.name for field in dataclasses.fields(Document)], name)
    for field, kind in (("name", str), ("text", str), ("continues", bool)):
        if type(value[field]) is not kind:
            what = "a text" if kind is str else "true or false"
            raise ValueError(f"{name}.{field} must be {what}, got {short(value[field])}")
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}.text holds half of a surrogate pair at character {error.start}"
        ) from error
    counted = value["counted"]
    if counted is not None:
        counted = _ranges(counted, len(value["text"]), f"{name}.counted")
    return Document(value["name"], value["text"], counted, value["continues"])


def _ranges(value: Any, length: int, name: str) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be null or a list of ranges, got {short(value)}")
    ranges: list[tuple[int, int]] = []
    end = 0
    for number, pair in enumerate(value):
        is_pair = isinstance(pair, list) and [type(place) for place in pair] == [int, int]
        if not is_pair or not end <= pair[0] <= pair[1] <= length:
            raise ValueError(
                f"{name}[{number}] must be a range of characters from {end} to {length}, "
                f"got {short(pair)}"
            )
        ranges.append((pair[0], pair[1]))
        end = pair[1]
    return tuple(ranges)


__all__ = [
    "check_fields",
    "check_size",
    "document_from_object",
    "read_object",
    "sizes_from_object",
]
