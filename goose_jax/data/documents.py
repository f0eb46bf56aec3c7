"""Documents to train on: the user's files, or the sources of Python's standard library."""

import dataclasses
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from goose_jax.text import Tokenizer
from pallas_kernels.validation import check_positive

# Tests, tables, and packages that differ from machine to machine.
_LEFT_OUT_OF_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      name: where the text comes from, such as its path; messages name it.
      text: the text.
    """

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """The length of the text's UTF-8."""
        return len(self.text.encode())


def read_documents(path: Path | str, *, pattern: str = "*") -> list[Document]:
    """Reads a text file, or every text file in a folder and the folders below it.

    Files and folders whose names start with a dot are left out, and so are empty files. Documents
    are sorted by path.

    Args:
      path: a file or a folder.
      pattern: in a folder, only files whose names fit it are read, as in "*.txt".

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ValueError: if a file is not UTF-8 text, or there is no text; it names the file or folder.
      OSError: if a file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder at {path}")
    if path.is_file():
        documents = [Document(str(path), _read_text(path))]
    elif path.is_dir():
        documents = [Document(str(file), _read_text(file)) for file in _files(path, pattern)]
    else:
        raise ValueError(f"{path} is neither a file nor a folder")
    documents = [document for document in documents if document.text]
    if not documents:
        where = f"a file with text whose name fits {pattern=}" if path.is_dir() else "any text"
        raise ValueError(f"{path} does not hold {where}")
    return documents


def standard_library() -> list[Document]:
    """Reads the modules of the running Python's standard library, without tests and tables.

    This text needs no download. It depends on the version of Python, but not on the machine.

    Raises:
      ValueError: if this Python was installed without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in _files(folder, "*.py")
        if _LEFT_OUT_OF_LIBRARY.isdisjoint(file.relative_to(folder).parts)
    ]
    documents = [Document(str(file), _read_text(file)) for file in files]
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"{folder} holds no Python sources; give a text of your own")
    return documents


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    found = [file for file in folder.rglob(pattern) if file.is_file()]
    for file in sorted(found, key=lambda file: file.relative_to(folder).parts):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    zero = data.find(b"\0")
    if zero >= 0:
        raise ValueError(f"{file} is not a text file: byte {zero} is zero")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not a UTF-8 text file: byte {error.start} is 0x{data[error.start]:02x}"
        ) from error


def split_documents(
    documents: Sequence[Document], *, held_out_bytes: int, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Divides documents into those to train on and those held out.

    Documents are drawn at random and held out whole, as long as they fit into `held_out_bytes`. If
    none fits, as with a single file, the end of the longest document is held out instead. A text
    that occurs several times is used once, so that nothing held out is also trained on.

    Args:
      documents: at least one.
      held_out_bytes: how much to hold out at most; never more than a tenth of the text.
      seed: another seed holds out other documents.

    Returns:
      training: the documents to train on, at least one.
      held_out: the documents held out, at least one.

    Raises:
      ValueError: if there is less than ten bytes of text, or nothing to hold out.
    """
    check_positive("held_out_bytes", held_out_bytes)
    unique = list({document.text: document for document in reversed(documents)}.values())[::-1]
    sizes = [document.num_bytes for document in unique]
    if sum(sizes) < 10:
        raise ValueError(f"{documents[0].name} is too short to hold a tenth of it out")
    limit = min(held_out_bytes, sum(sizes) // 10)
    chosen: list[int] = []
    room = limit
    for index in np.random.default_rng(seed).permutation(len(unique)):
        if sizes[index] <= room:
            chosen.append(int(index))
            room -= sizes[index]
    if chosen:
        training = [document for i, document in enumerate(unique) if i not in chosen]
        return training, [unique[i] for i in sorted(chosen)]
    longest = int(np.argmax(sizes))
    beginning, end = _cut_end(unique[longest], limit)
    return [*unique[:longest], beginning, *unique[longest + 1 :]], [end]


def _cut_end(document: Document, num_bytes: int) -> tuple[Document, Document]:
    """Cuts a document in two. The end has `num_bytes`, or a few more to keep a character whole."""
    data = document.text.encode()
    beginning = data[:-num_bytes].decode(errors="ignore")
    end = document.text[len(beginning) :]
    return dataclasses.replace(document, text=beginning), dataclasses.replace(document, text=end)


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Int[np.ndarray, " N"]:
    """Encodes all documents as one row of tokens, with `end_of_document` around each document.

    The one before the first document lets the model predict the document's first token. If the
    tokenizer has no such id, documents follow each other directly.

    Returns:
      `[N]` int32.

    Raises:
      ValueError: if the tokenizer gives an id outside its vocabulary, or no id at all.
    """
    end = tokenizer.end_of_document
    separator = np.array([] if end is None else [end], np.int32)
    pieces = [separator]
    for document in documents:
        pieces += [np.array(tokenizer.encode(document.text), np.int32), separator]
    tokens = np.concatenate(pieces)
    if not tokens.size:
        raise ValueError("the tokenizer made no token of the documents")
    if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer gave ids from {tokens.min()} to {tokens.max()}, "
            f"outside its vocabulary of {tokenizer.vocab_size=}"
        )
    return tokens


__all__ = [
    "Document",
    "encode_documents",
    "read_documents",
    "split_documents",
    "standard_library",
]
