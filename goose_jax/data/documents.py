"""Documents, and their division into text to train on and text to measure on."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from goose_jax.text import Tokenizer, encode_continuation
from pallas_kernels.validation import check_positive


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, or a piece of a long one.

    Attributes:
      name: where the text comes from, such as its path; messages name it.
      text: the text.
      counted: ranges of characters `(start, end)`, in ascending order, that the loss counts: in a
        conversation what the assistant says. None counts all.
      continues: whether the next document is the next piece of the same text.
    """

    name: str
    text: str
    counted: tuple[tuple[int, int], ...] | None = None
    continues: bool = False

    @property
    def num_bytes(self) -> int:
        """The length of the text's UTF-8."""
        return len(self.text.encode())

    @property
    def num_counted_bytes(self) -> int:
        """The length in UTF-8 of what the loss counts."""
        if self.counted is None:
            return self.num_bytes
        return sum(len(self.text[start:stop].encode()) for start, stop in self.counted)


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
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(document.text, document)
    unique = list(first.values())
    sizes = np.array([document.num_bytes for document in unique], np.int64)
    chosen, limit = choose_held_out(
        sizes, documents[0].name, held_out_bytes=held_out_bytes, seed=seed
    )
    if chosen:
        training = [document for i, document in enumerate(unique) if i not in chosen]
        return training, [unique[i] for i in chosen]
    longest = int(np.argmax(sizes))
    beginning, end = cut_end(unique[longest], limit)
    return [*unique[:longest], beginning, *unique[longest + 1 :]], [end]


def choose_held_out(
    sizes: Int[np.ndarray, " N"], source: str, *, held_out_bytes: int, seed: int = 0
) -> tuple[list[int], int]:
    """Draws documents to hold out, by their numbers of bytes.

    Args:
      sizes: `[N]`, bytes of each document.
      source: what messages call the documents.
      held_out_bytes: how much to hold out at most; never more than a tenth of the text.
      seed: another seed holds out other documents.

    Returns:
      chosen: numbers of the documents, in ascending order; none if no document is small enough.
      limit: number of bytes that may be held out.

    Raises:
      ValueError: if there is less than ten bytes of text, or nothing to hold out.
    """
    check_positive("held_out_bytes", held_out_bytes)
    total = int(sizes.sum())
    if total < 10:
        raise ValueError(f"{source} is too short to hold a tenth of it out")
    limit = room = min(held_out_bytes, total // 10)
    chosen: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        if 0 < sizes[index] <= room:
            chosen.append(index)
            room -= int(sizes[index])
    return sorted(chosen), limit


def cut_end(document: Document, num_bytes: int) -> tuple[Document, Document]:
    """Cuts a document in two. The end has `num_bytes`, or a few more to keep a character whole."""
    data = document.text.encode()
    place = len(data[:-num_bytes].decode(errors="ignore"))
    return _slice(document, 0, place), _slice(document, place, len(document.text))


def _slice(document: Document, start: int, stop: int) -> Document:
    counted = document.counted
    if counted is not None:
        moved = [(max(a, start) - start, min(b, stop) - start) for a, b in counted]
        counted = tuple((a, b) for a, b in moved if a < b)
    return dataclasses.replace(document, text=document.text[start:stop], counted=counted)


def encode_document(
    document: Document, tokenizer: Tokenizer, *, follows: bool = False
) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Encodes a document, or a piece of one. The last piece ends with `end_of_document`.

    The text is cut where counted ranges begin and end, so that each token is counted or not.

    Args:
      document: the document.
      tokenizer: the tokenizer. If it has no end of a document, none is added.
      follows: whether the document goes on where another one ended that `continues`.

    Returns:
      tokens: `[N]` int32.
      counted: `[N]`, whether the loss counts a token. The end of a document is counted if the
        document's last character is.

    Raises:
      ValueError: if the text cannot be encoded, or the tokenizer gives an id outside its
        vocabulary. The message names the document.
    """
    ids: list[int] = []
    counted: list[bool] = []
    is_counted = True
    for start, stop, is_counted in _parts(document):
        text = document.text[start:stop]
        try:
            if start or follows:
                part = encode_continuation(tokenizer, text)
            else:
                part = tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"{document.name} cannot be encoded: {error}") from error
        ids += part
        counted += [is_counted] * len(part)
    if tokenizer.end_of_document is not None and not document.continues:
        ids.append(tokenizer.end_of_document)
        counted.append(is_counted)
    wrong = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise ValueError(
            f"{document.name}: the tokenizer gave id {wrong[0]}, outside its vocabulary of "
            f"{tokenizer.vocab_size=}"
        )
    return np.array(ids, np.int32), np.array(counted, bool)


def _parts(document: Document) -> Iterator[tuple[int, int, bool]]:
    """Yields the ranges of a document that are counted and those between them, in order."""
    length = len(document.text)
    if document.counted is None:
        yield 0, length, True
        return
    place = 0
    for start, stop in document.counted:
        if start > place:
            yield place, start, False
        yield start, stop, True
        place = stop
    if place < length:
        yield place, length, False


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Int[np.ndarray, " N"]:
    """Encodes all documents as one row of tokens, with `end_of_document` around each document.

    The one before the first document lets the model predict the document's first token. If the
    tokenizer has no such id, documents follow each other directly.

    Returns:
      `[N]` int32.

    Raises:
      ValueError: if the tokenizer gives an id outside its vocabulary, or no id at all.
    """
    return encode_counted(documents, tokenizer)[0]


def encode_counted(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Encodes documents as `encode_documents` does, and says which tokens the loss counts.

    Returns:
      tokens: `[N]` int32.
      counted: `[N]`.

    Raises:
      ValueError: if the tokenizer gives an id outside its vocabulary, or no id at all.
    """
    end = tokenizer.end_of_document
    before = [] if end is None else [end]
    tokens, counted = [np.array(before, np.int32)], [np.ones(len(before), bool)]
    follows = False
    for document in documents:
        of_document = encode_document(document, tokenizer, follows=follows)
        tokens.append(of_document[0])
        counted.append(of_document[1])
        follows = document.continues
    row = np.concatenate(tokens)
    if not row.size:
        raise ValueError("the tokenizer made no token of the documents")
    return row, np.concatenate(counted)


__all__ = [
    "Document",
    "choose_held_out",
    "cut_end",
    "encode_counted",
    "encode_document",
    "encode_documents",
    "split_documents",
]
