"""Encodes a stream of documents, in several processes, and gives the tokens in the same order."""

import collections
import contextlib
import dataclasses
import hashlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from jaxtyping import Bool, Int

from goose_jax.data.documents import Document, encode_document
from goose_jax.data.prefetch import exit_with_parent
from goose_jax.data.sources import Position
from goose_jax.text import Tokenizer

_TASK_CHARACTERS = 2**20
_TASK_DOCUMENTS = 1024
_TASKS_PER_WORKER = 3  # that are waiting or done, so that no worker waits for the others

_PROBE = 'The goose\'s 12 eggs: 鹅 🦢, é\r\n\t{"a": [1.5e-3]}  ?\n\nUser: Привет'

type Encode = Callable[[list[Document], bool], "list[EncodedDocument]"]


@dataclasses.dataclass(frozen=True)
class EncodedDocument:
    """The tokens of a document, or of a piece of one.

    Attributes:
      tokens: `[N]` int32.
      counted: `[N]`, whether the loss counts a token; None counts all.
      ends: whether these are the last tokens of the document.
      num_bytes: length of the text's UTF-8.
    """

    tokens: Int[np.ndarray, " N"]
    counted: Bool[np.ndarray, " N"] | None
    ends: bool
    num_bytes: int


def encode_stream(
    documents: Iterable[tuple[Document, Position]],
    tokenizer: Tokenizer,
    *,
    workers: int = 0,
    follows: bool = False,
) -> Iterator[tuple[list[EncodedDocument], Position]]:
    """Encodes documents, some at a time. Few of them are in memory, however many there are.

    Args:
      documents: documents, each with the position after it.
      tokenizer: the tokenizer.
      workers: number of processes that encode; 0 encodes in this one.
      follows: whether the first document is the next piece of a text that began before.

    Yields:
      Encoded documents, in the order of the documents, and the position after the last of them.

    Raises:
      ValueError: if a text cannot be encoded; the message names it.
      OSError: if a process was killed, for example because memory ran out.
    """
    with _encoder(tokenizer, workers) as submit:
        waiting: collections.deque[tuple[Callable[[], list[EncodedDocument]], Position]]
        waiting = collections.deque()
        for task, task_follows, position in _tasks(documents, follows):
            waiting.append((submit(task, task_follows), position))
            if len(waiting) > workers * _TASKS_PER_WORKER:
                result, position = waiting.popleft()
                yield result(), position
        while waiting:
            result, position = waiting.popleft()
            yield result(), position


def _tasks(
    documents: Iterable[tuple[Document, Position]], follows: bool
) -> Iterator[tuple[list[Document], bool, Position]]:
    """Yields documents for one task, whether the first follows a piece, and the position after."""
    task: list[Document] = []
    size, position = 0, Position()
    for document, position in documents:
        task.append(document)
        size += len(document.text)
        if size >= _TASK_CHARACTERS or len(task) >= _TASK_DOCUMENTS:
            yield task, follows, position
            follows = document.continues
            task, size = [], 0
    if task:
        yield task, follows, position


@contextlib.contextmanager
def _encoder(
    tokenizer: Tokenizer, workers: int
) -> Iterator[Callable[[list[Document], bool], Callable[[], list[EncodedDocument]]]]:
    """Gives a function that begins to encode documents, and returns a function for the result."""
    if workers == 0:
        yield lambda task, follows: lambda: _encode(task, follows, tokenizer)
        return
    # Processes that are forked from one with threads, as JAX has, may block.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer,),
    )
    try:
        yield lambda task, follows: _result_of(pool.submit(_encode_in_worker, task, follows))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result_of(future: Future[list[EncodedDocument]]) -> Callable[[], list[EncodedDocument]]:
    def result() -> list[EncodedDocument]:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that encodes text was killed; if memory ran out, take fewer workers"
            ) from error

    return result


_tokenizer_of_worker: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer_of_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this
    _tokenizer_of_worker = tokenizer
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _encode_in_worker(documents: list[Document], follows: bool) -> list[EncodedDocument]:
    assert _tokenizer_of_worker is not None
    return _encode(documents, follows, _tokenizer_of_worker)


def _encode(
    documents: list[Document], follows: bool, tokenizer: Tokenizer
) -> list[EncodedDocument]:
    encoded = []
    for document in documents:
        tokens, counted = encode_document(document, tokenizer, follows=follows)
        follows = document.continues
        encoded.append(
            EncodedDocument(
                tokens,
                None if document.counted is None else counted,
                not document.continues,
                document.num_bytes,
            )
        )
    return encoded


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns a checksum of a tokenizer: of the bytes of all ids, and of how it encodes a text."""
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {tokenizer.end_of_document} ".encode())
    for token in range(tokenizer.vocab_size):
        data = tokenizer.decode_bytes([token])
        digest.update(f"{len(data)} ".encode() + data)
    try:
        digest.update(repr(tokenizer.encode(_PROBE)).encode())
    except ValueError as error:  # a vocabulary without some of its characters
        digest.update(str(error).encode())
    return digest.hexdigest()


__all__ = ["EncodedDocument", "encode_stream", "tokenizer_fingerprint"]
