"""Sources of documents: files, folders and data sets, which are read one document after another."""

import dataclasses
import functools
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from goose_jax.data.documents import Document
from goose_jax.data.json_lines import RenderConversation, document_of_record, read_json_lines
from goose_jax.data.saved_dataset import is_saved_dataset, open_saved_dataset, read_rows
from goose_jax.data.text_files import list_files, read_pieces, text_problem

type Kind = Literal["text", "jsonl", "dataset"]

_JSON_LINES = (".jsonl", ".ndjson")
# Tests, tables, and packages that differ from machine to machine.
_LEFT_OUT_OF_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in a source, between two documents or two pieces of a text.

    Attributes:
      item: number of the file or data set.
      offset: bytes into the unpacked file, or rows into the data set.
      line: number of the next line of a JSONL file.
    """

    item: int = 0
    offset: int = 0
    line: int = 1


@dataclasses.dataclass(frozen=True)
class Item:
    """A file or a data set.

    Attributes:
      path: path of the file or folder.
      kind: how it is read.
      named: whether the user named it, and did not only name a folder that it is in.
    """

    path: Path
    kind: Kind
    named: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentSource:
    """Documents on disk, always in the same order. Only one of them at a time is in memory.

    - A text file is one document. A file that is not UTF-8 text is left out if it was found in a
      folder, and is an error if it was named or `strict` is set. A long file is read in pieces.
    - Each line of a JSONL file (`.jsonl`, `.ndjson`) is a document: an object with a text, or with
      a conversation, which `render` makes a text of.
    - Each row of a data set that `datasets` saved is a document, with the same fields.
    - Files whose names end in `.gz` are unpacked.

    Attributes:
      source: what messages call it.
      items: the files and data sets.
      field: the field that holds the text or conversation; None takes "text", "messages" or
        "conversations".
      render: makes texts of conversations, such as `goose_jax.chat.render_conversation`; None
        refuses conversations.
      strict: whether a file in a folder that is not text is an error.
    """

    source: str
    items: tuple[Item, ...]
    field: str | None = None
    render: RenderConversation | None = None
    strict: bool = False

    def __iter__(self) -> Iterator[Document]:
        """Yields all documents; raises what `read` raises."""
        return (document for document, _ in self.read())

    def read(
        self,
        start: Position | None = None,
        *,
        on_skipped: Callable[[Path, str], None] | None = None,
    ) -> Iterator[tuple[Document, Position]]:
        """Yields documents, each with the position after it.

        Args:
          start: where to begin: a position that `read` gave before; None for the beginning.
          on_skipped: called with each file that is left out, and what is wrong with it.

        Raises:
          OSError: if a file cannot be read.
          ValueError: if a file, line or row is wrong. The message names it.
        """
        start = Position() if start is None else start
        for number in range(start.item, len(self.items)):
            at = start if number == start.item else Position(number)
            item = self.items[number]
            if item.kind == "text":
                yield from self._read_text(item, at, on_skipped)
            elif item.kind == "jsonl":
                yield from self._read_json_lines(item, at)
            else:
                yield from self._read_rows(item, at)

    def _read_text(
        self, item: Item, at: Position, on_skipped: Callable[[Path, str], None] | None
    ) -> Iterator[tuple[Document, Position]]:
        problem = None if at.offset else text_problem(item.path)
        if problem is not None:
            if item.named or self.strict:
                raise ValueError(f"{item.path} {problem}")
            if on_skipped is not None:
                on_skipped(item.path, problem)
            return
        for text, end, continues in read_pieces(item.path, at.offset):
            following = Position(at.item, end) if continues else Position(at.item + 1)
            yield Document(str(item.path), text, continues=continues), following

    def _read_json_lines(self, item: Item, at: Position) -> Iterator[tuple[Document, Position]]:
        for record, line, end in read_json_lines(item.path, at.offset, at.line):
            name = f"{item.path}, line {line}"
            document = document_of_record(name, record, field=self.field, render=self.render)
            yield document, Position(at.item, end, line + 1)

    def _read_rows(self, item: Item, at: Position) -> Iterator[tuple[Document, Position]]:
        for record, row in read_rows(item.path, at.offset):
            name = f"{item.path}, row {row}"
            document = document_of_record(name, record, field=self.field, render=self.render)
            yield document, Position(at.item, row + 1)

    @property
    def num_bytes(self) -> int:
        """The size of all files on disk, in bytes; of packed files, the packed size."""
        return sum(self._sizes)

    def bytes_before(self, position: Position) -> int:
        """Returns how much of `num_bytes` lies before a position, as far as that is known.

        A `.gz` file counts only when it has been read to its end.
        """
        whole = sum(self._sizes[: position.item])
        if position.item == len(self.items) or position.offset == 0:
            return whole
        item, size = self.items[position.item], self._sizes[position.item]
        if item.kind == "dataset":
            return whole + size * position.offset // self._num_rows[position.item]
        return whole + (0 if item.path.suffix == ".gz" else position.offset)

    def holds(self, position: Position) -> bool:
        """Returns whether a position is in the source or at its end, as far as that is known.

        The unpacked size of a `.gz` file is not.
        """
        if position.item >= len(self.items):
            return position == Position(len(self.items))
        item = self.items[position.item]
        if item.kind == "dataset":
            return position.offset <= self._num_rows[position.item]
        return item.path.suffix == ".gz" or position.offset <= self._sizes[position.item]

    @functools.cached_property
    def _num_rows(self) -> dict[int, int]:
        return {
            i: max(1, len(open_saved_dataset(item.path)))
            for i, item in enumerate(self.items)
            if item.kind == "dataset"
        }

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [sum(file.stat().st_size for file in self._files(item)) for item in self.items]

    @property
    def fingerprint(self) -> str:
        """Changes if a file comes, goes, or has another size or time of change.

        Raises:
          OSError: if a file has vanished.
        """
        of_items = [file for item in self.items for file in self._files(item)]
        files = [(str(file.absolute()), file.stat()) for file in of_items]
        facts = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
        settings = [self.field, self.strict, self.render is not None]
        return hashlib.sha256(json.dumps([facts, settings]).encode()).hexdigest()

    @staticmethod
    def _files(item: Item) -> list[Path]:
        return list_files(item.path, ["*"]) if item.kind == "dataset" else [item.path]


def open_documents(
    path: Path | str,
    *,
    patterns: Sequence[str] = ("*",),
    field: str | None = None,
    render: RenderConversation | None = None,
    strict: bool = False,
) -> DocumentSource:
    """Opens a file, a folder of files, or a data set saved by `datasets`, as `DocumentSource` says.

    Args:
      path: a file or a folder. In a folder and the folders below it all files are read, sorted by
        path, but those whose names start with a dot.
      patterns: in a folder, only files whose names fit one of these are read, as in "*.txt".
      field: see `DocumentSource`.
      render: see `DocumentSource`.
      strict: see `DocumentSource`.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ValueError: if no file fits, or `path` is neither a file nor a folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder at {path}")
    if path.is_file():
        items = [Item(path, _kind(path), named=True)]
    elif not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")
    elif is_saved_dataset(path):
        items = [Item(path, "dataset", named=True)]
    else:
        files = list_files(path, patterns)
        items = [Item(file, _kind(file), named=False) for file in files]
        if not items:
            names = " or ".join(map(repr, patterns))
            raise ValueError(f"{path} does not hold a file with text whose name fits {names}")
    return DocumentSource(
        source=str(path), items=tuple(items), field=field, render=render, strict=strict
    )


def read_documents(
    path: Path | str,
    *,
    patterns: Sequence[str] = ("*",),
    field: str | None = None,
    render: RenderConversation | None = None,
    strict: bool = False,
    on_skipped: Callable[[Path, str], None] | None = None,
) -> list[Document]:
    """Reads all documents of `open_documents`, which has the same arguments, into memory.

    Empty documents are left out. `on_skipped` is called with each file that is left out, and what
    is wrong with it.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      OSError: if a file cannot be read.
      ValueError: if a file, line or row is wrong, or there is no text.
    """
    source = open_documents(path, patterns=patterns, field=field, render=render, strict=strict)
    return _all_with_text(source, on_skipped)


def open_standard_library() -> DocumentSource:
    """Opens the modules of the running Python's standard library, without tests and tables.

    This text needs no download. It depends on the version of Python, but not on the machine.

    Raises:
      ValueError: if this Python was installed without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    items = tuple(
        Item(file, "text", named=True)
        for file in list_files(folder, ["*.py"])
        if _LEFT_OUT_OF_LIBRARY.isdisjoint(file.relative_to(folder).parts)
    )
    if not items:
        raise ValueError(f"{folder} holds no Python sources; give a text of your own")
    return DocumentSource(source="the standard library of this Python", items=items)


def standard_library() -> list[Document]:
    """Reads the documents of `open_standard_library` into memory.

    Raises:
      ValueError: if this Python was installed without its sources.
    """
    return _all_with_text(open_standard_library())


def _all_with_text(
    source: DocumentSource, on_skipped: Callable[[Path, str], None] | None = None
) -> list[Document]:
    documents: list[Document] = []
    skipped: list[str] = []

    def skip(file: Path, why: str) -> None:
        skipped.append(f"{file} {why}")
        if on_skipped is not None:
            on_skipped(file, why)

    follows = False
    for piece, _ in source.read(on_skipped=skip):
        if follows:
            text, continues = documents[-1].text + piece.text, piece.continues
            documents[-1] = dataclasses.replace(piece, text=text, continues=continues)
        elif piece.text:
            documents.append(piece)
        follows = piece.continues
    if not documents:
        raise ValueError(no_text(source.source, skipped))
    return documents


def no_text(source: str, skipped: Sequence[str]) -> str:
    """Returns what an error says of a source without text.

    Args:
      source: what messages call the source.
      skipped: what is wrong with each file that was left out.
    """
    message = f"{source} does not hold any text"
    return f"{message}; {len(skipped)} files were left out: {skipped[0]}" if skipped else message


def _kind(file: Path) -> Kind:
    name = file.name.removesuffix(".gz")
    return "jsonl" if name.endswith(_JSON_LINES) else "text"


__all__ = [
    "DocumentSource",
    "Item",
    "Position",
    "no_text",
    "open_documents",
    "open_standard_library",
    "read_documents",
    "standard_library",
]
