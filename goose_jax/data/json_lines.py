"""Records of JSONL files and of data sets: a text, or a conversation."""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from goose_jax.data.documents import Document
from goose_jax.data.text_files import open_unpacked

type Ranges = tuple[tuple[int, int], ...]
type RenderConversation = Callable[[Sequence[Any]], tuple[str, Ranges]]
"""Returns the text of a conversation, and the ranges of characters that the loss counts.

It raises a ValueError that says what is wrong with the conversation.
"""

FIELDS = ("text", "messages", "conversations")
"""The fields that are looked for, if none is named."""

MAX_LINE_BYTES = 2**28
"""A longer line is an error."""


def read_json_lines(
    file: Path, start: int = 0, line: int = 1
) -> Iterator[tuple[Mapping[str, Any], int, int]]:
    """Reads the records of a JSONL file, one line at a time. Lines without text are passed over.

    Args:
      file: the file; a name that ends in `.gz` is unpacked.
      start: number of (unpacked) bytes to leave out: the beginning of a line.
      line: number of that line.

    Yields:
      The record, the number of its line, and the number of bytes up to the end of the line.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if a line is too long, is not UTF-8, is not JSON, or is no object. The message
        names the file, and the line or byte.
    """
    with open_unpacked(file) as stream:
        stream.seek(start)
        while data := stream.readline(MAX_LINE_BYTES + 1):
            if len(data) > MAX_LINE_BYTES:
                raise ValueError(f"{file}, line {line}: longer than {MAX_LINE_BYTES} bytes")
            begin, start = start, start + len(data)
            if begin == 0:
                data = data.removeprefix(codecs.BOM_UTF8)
            if data.strip():
                yield _record(data, f"{file}, line {line}", begin), line, start
            line += 1


def _record(data: bytes, name: str, begin: int) -> Mapping[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8: byte {begin + error.start} of the file is "
            f"0x{data[error.start]:02x}"
        ) from error
    try:
        record = json.loads(text.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{name}: must be a JSON object, got {short(record)}")
    return record


def document_of_record(
    name: str,
    record: Mapping[str, Any],
    *,
    field: str | None = None,
    render: RenderConversation | None = None,
) -> Document:
    """Returns the document of a record: its text, or its conversation in the form of chats.

    Args:
      name: name of the document; messages begin with it.
      record: values by field. A text is used as it is; a list is a conversation.
      field: the field to use; None takes the one of `FIELDS` that the record has.
      render: makes a text of a conversation; None refuses conversations.

    Raises:
      ValueError: if the field is missing or not clear, or its value is neither a text nor a
        conversation.
    """
    if field is None:
        present = [key for key in FIELDS if record.get(key) is not None]
        if len(present) != 1:
            found = " and ".join(present) or f"only {short(list(record))}"
            raise ValueError(
                f"{name}: needs one of the fields {', '.join(FIELDS)}, has {found}; name the field"
            )
        field = present[0]
    value = record.get(field)
    if isinstance(value, str):
        text, counted = value, None
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        if render is None:
            raise ValueError(f"{name}: {field} holds a conversation, and only text is read here")
        try:
            text, counted = render(value)
        except ValueError as error:
            raise ValueError(f"{name}: {field}: {error}") from error
    elif field not in record:
        raise ValueError(f"{name}: has no field {field!r}, only {short(list(record))}")
    else:
        raise ValueError(
            f"{name}: {field} must be a text or a list of messages, got {short(value)}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: {field} holds half of a surrogate pair at character {error.start}"
        ) from error
    return Document(name, text, counted)


def short(value: Any) -> str:
    """Returns a value as Python writes it, cut to a length that fits an error message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


__all__ = [
    "FIELDS",
    "MAX_LINE_BYTES",
    "Ranges",
    "RenderConversation",
    "document_of_record",
    "read_json_lines",
    "short",
]
