"""Files of text on disk: listed, checked, unpacked, and read in pieces of bounded size."""

import codecs
import contextlib
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

PIECE_BYTES = 2**20
"""A longer text file is read in pieces of at most this size."""

_LINE_BEGINS = re.compile(rb"\n(?=[A-Za-z0-9])")


class DamagedFileError(ValueError):
    """A compressed file cannot be unpacked. The message names the file."""


def list_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Returns the files in a folder and the folders below it whose names fit one of the patterns.

    Files and folders whose names start with a dot are left out. The list is sorted by path.

    Raises:
      ValueError: if there is no pattern, or one cannot be the pattern of a name.
    """
    check_patterns(patterns)
    found = {file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()}
    visible = [
        file
        for file in found
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    return sorted(visible, key=lambda file: file.relative_to(folder).parts)


def check_patterns(patterns: Sequence[str]) -> None:
    """Checks that there are patterns, and that each can fit files in a folder.

    Raises:
      ValueError: if not; the message has the pattern.
    """
    if not patterns:
        raise ValueError("patterns must hold at least one pattern")
    for pattern in patterns:
        if not pattern:
            raise ValueError(f"{pattern=} must fit names in a folder, as in '*.txt'")
        try:
            next(Path(os.devnull).rglob(pattern), None)
        except (ValueError, NotImplementedError) as error:
            reason = f"{error}".rstrip(".")
            raise ValueError(
                f"pattern={pattern!r} must fit names in a folder, as in '*.txt': {reason}"
            ) from error


@contextlib.contextmanager
def open_unpacked(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading bytes; those of a `.gz` file are unpacked.

    Raises:
      OSError: if the file cannot be read.
      DamagedFileError: if it is a damaged `.gz` file; also while it is read.
    """
    if file.suffix != ".gz":
        with file.open("rb") as stream:
            yield stream
        return
    try:
        with gzip.open(file) as stream:
            yield stream  # type: ignore[misc]  # a GzipFile reads like a file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedFileError(f"{file} cannot be unpacked: {error}") from error


def text_problem(file: Path) -> str | None:
    """Says what keeps a file from being UTF-8 text, or returns None; it reads the whole file.

    Raises:
      OSError: if the file cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with open_unpacked(file) as stream:
            while True:
                data = stream.read(PIECE_BYTES)
                zero = data.find(b"\0")
                if zero >= 0:
                    return f"is not a text file: byte {offset + zero} is zero"
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    wrong = error.object[error.start]
                    place = offset - pending + error.start
                    return f"is not a UTF-8 text file: byte {place} is 0x{wrong:02x}"
                if not data:
                    return None
                offset += len(data)
    except DamagedFileError as error:
        return str(error).removeprefix(f"{file} ")


def read_pieces(file: Path, start: int = 0) -> Iterator[tuple[str, int, bool]]:
    """Reads a text file in pieces.

    A file is cut where a line begins with an ASCII letter or digit, if there is such a place. No
    token of the World vocabulary spans such a cut, so the tokens of the pieces are those of the
    whole text.

    Args:
      file: UTF-8 text, which `text_problem` has checked.
      start: number of bytes of unpacked text to leave out: the end of a piece.

    Yields:
      The text of a piece, the number of bytes up to its end, and whether another one follows.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if the file has changed, and is no longer UTF-8 text.
    """
    with open_unpacked(file) as stream:
        stream.seek(start)
        data = b""
        # One byte more than a piece tells whether another piece follows.
        while data := data + stream.read(PIECE_BYTES + 1 - len(data)):
            cut = len(data) if len(data) <= PIECE_BYTES else _place_to_cut(data)
            try:
                text = data[:cut].decode()
            except UnicodeDecodeError as error:
                place = start + error.start
                raise ValueError(
                    f"{file} has changed: byte {place} is no longer UTF-8 text"
                ) from error
            start += cut
            data = data[cut:]
            yield text, start, bool(data)


def _place_to_cut(data: bytes) -> int:
    """Returns where to cut text of which more follows."""
    last = None
    for last in _LINE_BEGINS.finditer(data, len(data) // 2):  # noqa: B007  # only the last counts
        pass
    if last is not None:
        return last.end()
    cut = len(data) - 1
    while cut > 0 and data[cut] & 0xC0 == 0x80:  # in the middle of a character
        cut -= 1
    return cut or len(data)


__all__ = [
    "PIECE_BYTES",
    "DamagedFileError",
    "check_patterns",
    "list_files",
    "open_unpacked",
    "read_pieces",
    "text_problem",
]
