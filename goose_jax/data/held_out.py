"""Chooses what is held out of a stream of documents, without keeping the documents."""

import array
import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from goose_jax.data.documents import Document, choose_held_out, cut_end
from goose_jax.data.sources import no_text


@dataclasses.dataclass(frozen=True)
class HeldOutChoice:
    """What is held out of a stream of documents, and what is left out of it.

    Attributes:
      whole: numbers of the documents that are held out whole.
      repeated: numbers of the documents whose text occurred before; they are left out.
      cut: number of the document whose end is held out, and the number of bytes before that end;
        None if whole documents are held out.
      num_documents: number of documents in the stream.
    """

    whole: frozenset[int]
    repeated: frozenset[int]
    cut: tuple[int, int] | None
    num_documents: int


def choose_in_stream(
    documents: Iterable[Document], *, source: str, held_out_bytes: int, skipped: Sequence[str] = ()
) -> HeldOutChoice:
    """Chooses as `split_documents` does, but keeps only 16 bytes of each document in memory.

    Args:
      documents: the documents; a long one may be in pieces.
      source: what messages call them.
      held_out_bytes: how much to hold out at most; never more than a tenth of the text.
      skipped: for the error, what is wrong with each file that was left out; it may grow while
        documents are read.

    Raises:
      ValueError: if there is less than ten bytes of text.
    """
    sizes, digests = array.array("q"), array.array("Q")
    for size, digest in _measured(documents):
        sizes.append(size)
        digests.append(digest)
    if not any(sizes):
        raise ValueError(no_text(source, skipped))
    all_sizes = np.frombuffer(sizes, np.int64)
    _, first = np.unique(np.frombuffer(digests, np.uint64), return_index=True)
    unique: Int[np.ndarray, " N"] = np.sort(first)
    chosen, limit = choose_held_out(all_sizes[unique], source, held_out_bytes=held_out_bytes)
    repeated = np.setdiff1d(np.arange(len(all_sizes)), unique)
    cut = None
    if not chosen:
        longest = int(unique[np.argmax(all_sizes[unique])])
        cut = longest, int(all_sizes[longest]) - limit
    whole = frozenset(unique[chosen].tolist() if chosen else [])
    return HeldOutChoice(whole, frozenset(repeated.tolist()), cut, len(all_sizes))


def _measured(documents: Iterable[Document]) -> Iterator[tuple[int, int]]:
    """Yields the number of bytes and a checksum of each document."""
    size, digest = 0, hashlib.blake2b(digest_size=8)
    for piece in documents:
        data = piece.text.encode()
        size += len(data)
        digest.update(data)
        if not piece.continues:
            yield size, int.from_bytes(digest.digest(), "little")
            size, digest = 0, hashlib.blake2b(digest_size=8)


class HeldOutFilter:
    """Divides a stream of documents as a `HeldOutChoice` says.

    Args:
      choice: what is held out.

    Attributes:
      held_out: the documents held out. Read it when all documents of `training` have been read.
      num_documents: number of documents read.
    """

    def __init__(self, choice: HeldOutChoice):
        self._choice = choice
        self._pieces: dict[int, list[Document]] = collections.defaultdict(list)
        self.num_documents = 0

    @property
    def held_out(self) -> list[Document]:
        """The documents held out, each in one piece."""
        merged = []
        for pieces in self._pieces.values():
            text, counted, place = "", [], 0
            for piece in pieces:
                ranges = [(0, len(piece.text))] if piece.counted is None else piece.counted
                counted += [(place + start, place + stop) for start, stop in ranges]
                text += piece.text
                place = len(text)
            marked = any(piece.counted is not None for piece in pieces)
            merged.append(Document(pieces[0].name, text, tuple(counted) if marked else None))
        return merged

    def training[T](self, documents: Iterable[tuple[Document, T]]) -> Iterator[tuple[Document, T]]:
        """Yields the documents to train on, with what comes with each."""
        place = 0  # in bytes of the document
        for piece, position in documents:
            number, size = self.num_documents, piece.num_bytes
            if number in self._choice.whole:
                self._pieces[number].append(piece)
            elif self._choice.cut is not None and number == self._choice.cut[0]:
                for beginning in self._cut(piece, self._choice.cut[1] - place):
                    yield beginning, position
            elif number not in self._choice.repeated:
                yield piece, position
            place = place + size if piece.continues else 0
            self.num_documents += not piece.continues

    def _cut(self, piece: Document, left: int) -> Iterator[Document]:
        """Yields the part of a piece that belongs to its first `left` bytes; the rest is kept."""
        if left > piece.num_bytes:
            yield piece
            return
        end = piece
        if left > 0:
            beginning, end = piece, dataclasses.replace(piece, text="", counted=None)
            if left < piece.num_bytes:
                beginning, end = cut_end(piece, piece.num_bytes - left)
            yield dataclasses.replace(beginning, continues=False)
        if end.text:
            self._pieces[self.num_documents].append(end)


__all__ = ["HeldOutChoice", "HeldOutFilter", "choose_in_stream"]
