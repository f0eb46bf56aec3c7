"""The data of a training run on disk: tokens to train on, and held-out documents."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import Int

from goose_jax.data.binidx import Binidx
from goose_jax.data.binidx_writer import BinidxWriter
from goose_jax.data.documents import Document
from goose_jax.data.encoding import encode_stream, tokenizer_fingerprint
from goose_jax.data.held_out import HeldOutFilter, choose_in_stream
from goose_jax.data.json_lines import short
from goose_jax.data.records import check_fields, check_size, document_from_object, read_object
from goose_jax.data.samplers import (
    BinidxBatches,
    MagicPrimeWindows,
    PackedDocuments,
    RandomBinidxWindows,
)
from goose_jax.data.sources import DocumentSource, no_text
from goose_jax.text import Tokenizer

type Sampling = Literal["windows", "packed", "magic-prime"]
"""How batches are made of tokens: `RandomBinidxWindows`, `PackedDocuments`, `MagicPrimeWindows`."""

_RECORD = "record.json"
_FORMAT = 1
_CHECKED_TOKENS = 2**24
_CONTINUATIONS = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))  # of UTF-8


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrainingData:
    """Tokens on disk to train on, and held-out documents to measure on.

    Attributes:
      source: what messages call the data, such as its path.
      data: the tokens.
      num_tokens: number of tokens to train on, from the first.
      held_out: the documents to measure on.
      tokenizer: the tokenizer of the tokens.
      num_skipped: number of files that were left out, because they are not text.
    """

    source: str
    data: Binidx
    num_tokens: int
    held_out: Sequence[Document]
    tokenizer: Tokenizer
    num_skipped: int = 0

    @property
    def tokens(self) -> Int[np.ndarray, " N"]:
        """The tokens to train on, which stay on disk."""
        return self.data.tokens[: self.num_tokens]

    def batches(
        self,
        sampling: Sampling,
        *,
        vocab_size: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        microbatches: int = 1,
        magic_prime: int | None = None,
    ) -> BinidxBatches:
        """Returns batches of the tokens.

        Args:
          sampling: how they are made.
          vocab_size: number of ids of the model.
          batch_size: B, rows of each microbatch.
          sequence_length: T, tokens of a row.
          seed: another seed gives other batches, but "magic-prime" has none.
          microbatches: A; 1 gives batches without the leading axis.
          magic_prime: the prime of "magic-prime"; None takes the default.

        Raises:
          ValueError: if the tokens do not fill a row, `magic_prime` does not fit them, or some of
            them are held out with "magic-prime", which reads all tokens.
        """
        common: dict[str, Any] = {
            "data": self.data,
            "source": self.source,
            "num_tokens": self.num_tokens,
            "vocab_size": vocab_size,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "microbatches": microbatches,
        }
        if sampling == "windows":
            return RandomBinidxWindows(**common, seed=seed)
        if sampling == "packed":
            start = self.tokenizer.end_of_document
            return PackedDocuments(**common, seed=seed, start_token=start)
        if self.num_tokens < len(self.data.tokens):
            raise ValueError(
                f"the magic prime reads every token of {self.source}, so that none can be held "
                "out of them: give other text to measure on (--held-out)"
            )
        return MagicPrimeWindows(**common, magic_prime=magic_prime)


def open_tokens(
    path: Path | str,
    tokenizer: Tokenizer,
    *,
    held_out_bytes: int,
    held_out: Sequence[Document] | None = None,
) -> TrainingData:
    """Opens a binidx as training data.

    Args:
      path: path of the binidx, with or without `.bin` or `.idx`.
      tokenizer: the tokenizer that made the tokens.
      held_out_bytes: how much text to hold out at most; never more than a tenth of the tokens.
      held_out: documents to measure on. None holds out the last items, as many as fit whole, or
        else the last tokens.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if a file is damaged, too short to hold something out, or has other ids than the
        tokenizer among its first tokens.
    """
    data = Binidx(path)
    total = len(data.tokens)
    _check_first_tokens(data, tokenizer)
    if held_out is not None:
        return TrainingData(
            source=str(path),
            data=data,
            num_tokens=total,
            held_out=held_out,
            tokenizer=tokenizer,
        )
    num_tokens = _last_items(data, tokenizer, held_out_bytes)
    begins = [*data.begins(num_tokens, total), total]
    begins = begins if begins[0] == num_tokens else [num_tokens, *begins]
    documents = [
        _decode(f"{path}, token {start}", data, start, stop, tokenizer)
        for start, stop in itertools.pairwise(begins)
    ]
    return TrainingData(
        source=str(path),
        data=data,
        num_tokens=num_tokens,
        held_out=[document for document in documents if document.text],
        tokenizer=tokenizer,
    )


def _check_first_tokens(data: Binidx, tokenizer: Tokenizer) -> None:
    """Checks ids before training starts; a batch checks its own tokens again."""
    first = np.asarray(data.tokens[:_CHECKED_TOKENS])
    wrong = np.flatnonzero((first < 0) | (first >= tokenizer.vocab_size))
    if wrong.size:
        raise ValueError(
            f"--data {data.prefix}.bin: token number {wrong[0]} is {first[wrong[0]]}, but the "
            f"tokenizer has the ids 0..{tokenizer.vocab_size - 1}; give the --tokenizer that made "
            "the tokens"
        )


def _last_items(data: Binidx, tokenizer: Tokenizer, held_out_bytes: int) -> int:
    """Returns the number of tokens before those that are held out."""
    total = len(data.tokens)
    room, most = held_out_bytes, total // 10
    num_tokens = total
    for item in range(len(data) - 1, 0, -1):
        start, size = num_tokens - int(data.sizes[item]), len(_bytes(data[item], tokenizer))
        if size > room or start < total - most:
            break
        room, num_tokens = room - size, start
    if held_out_bytes - room > 0:
        return num_tokens
    num_tokens = total - min(held_out_bytes, most)
    while len(_bytes(data.tokens[num_tokens:], tokenizer)) > held_out_bytes:
        num_tokens += max(1, (total - num_tokens) // 8)
    # Held-out text begins with a whole character.
    while _bytes(data.tokens[num_tokens : num_tokens + 1], tokenizer)[:1] in _CONTINUATIONS:
        num_tokens += 1
    if not _bytes(data.tokens[num_tokens:], tokenizer):
        raise ValueError(f"{data.prefix} is too short to hold a tenth of it out")
    return num_tokens


def _bytes(tokens: Int[np.ndarray, " N"], tokenizer: Tokenizer) -> bytes:
    return tokenizer.decode_bytes(tokens.tolist())


def _decode(name: str, data: Binidx, start: int, stop: int, tokenizer: Tokenizer) -> Document:
    """Returns the document of some tokens, with the ranges that the loss counts."""
    tokens = data.tokens[start:stop]
    if data.counted is None:
        return Document(name, tokenizer.decode(tokens.tolist()))
    counted = np.asarray(data.counted[start:stop])
    borders = [0, *(np.flatnonzero(np.diff(counted)) + 1).tolist(), len(tokens)]
    text, ranges = "", []
    for first, end in itertools.pairwise(borders):
        part = _bytes(tokens[first:end], tokenizer).decode(errors="replace")
        if counted[first] and part:
            ranges.append((len(text), len(text) + len(part)))
        text += part
    return Document(name, text, tuple(ranges))


def prepare_documents(
    source: DocumentSource,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    held_out_bytes: int,
    held_out: Sequence[Document] | None = None,
    workers: int = 0,
) -> TrainingData:
    """Encodes documents for a training run, once: the tokens are kept in a folder.

    Text is held out as `split_documents` does, and a text that occurs several times is used once.
    The folder has a folder for each combination of files (by their paths, sizes and times of
    change), tokenizer and settings, and may be removed at any time but while a run uses it. Of
    several processes that call this at once, one encodes, and the others wait for it.

    Args:
      source: the documents.
      tokenizer: the tokenizer of the model.
      folder: where tokens are kept.
      held_out_bytes: how much to hold out at most; never more than a tenth of the text.
      held_out: documents to measure on. None holds out documents of the source.
      workers: number of processes that encode; 0 encodes in this one.

    Raises:
      OSError: if a file cannot be read or written.
      ValueError: if the source is damaged or too short, or changes while it is read.
    """
    facts = [_FORMAT, source.fingerprint, tokenizer_fingerprint(tokenizer)]
    facts += [held_out_bytes if held_out is None else None]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    kept = Path(folder) / key
    if not kept.is_dir():
        own = held_out is None
        _keep(source, tokenizer, kept, held_out_bytes if own else None, workers)
    data = Binidx(kept / "tokens")
    kept_held_out, num_skipped = _read_record(kept / _RECORD)
    if held_out is None and not kept_held_out:
        raise ValueError(f"{kept / _RECORD} is damaged: held_out is empty; remove {kept}")
    return TrainingData(
        source=source.source,
        data=data,
        num_tokens=len(data.tokens),
        held_out=kept_held_out if held_out is None else held_out,
        tokenizer=tokenizer,
        num_skipped=num_skipped,
    )


def _keep(
    source: DocumentSource,
    tokenizer: Tokenizer,
    kept: Path,
    held_out_bytes: int | None,
    workers: int,
) -> None:
    """Encodes documents into a new folder, which has its name only when it is complete.

    If several processes want the same folder, one of them encodes and the others wait for it.
    """
    missing = [folder for folder in (kept.parent, kept.parent.parent) if not folder.exists()]
    temporary = kept.with_name(f".{kept.name}")
    try:
        with _locked(kept.with_name(f".{kept.name}.lock")):
            if kept.is_dir():
                return
            shutil.rmtree(temporary, ignore_errors=True)  # left behind by a killed process
            temporary.mkdir()
            try:
                _encode(source, tokenizer, temporary, held_out_bytes, workers)
                os.rename(temporary, kept)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Waits until no other process is in this context. The file exists only while one is."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream, file):  # the process that had the lock has removed its file
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _is_at(stream: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _encode(
    source: DocumentSource,
    tokenizer: Tokenizer,
    folder: Path,
    held_out_bytes: int | None,
    workers: int,
) -> None:
    before, skipped = source.fingerprint, []
    documents = source.read(on_skipped=lambda file, why: skipped.append(f"{file} {why}"))
    if held_out_bytes is not None:
        read = (document for document, _ in documents)
        choice = choose_in_stream(
            read, source=source.source, held_out_bytes=held_out_bytes, skipped=skipped
        )
        chosen = HeldOutFilter(choice)
        documents = chosen.training(source.read())
    with BinidxWriter(folder / "tokens", tokenizer.vocab_size) as writer:
        for encoded, _ in encode_stream(documents, tokenizer, workers=workers):
            for document in encoded:
                if len(document.tokens) or not document.ends:
                    writer.write(document.tokens, document.counted, ends_item=document.ends)
        if not writer.written.tokens:
            raise ValueError(no_text(source.source, skipped))
        writer.finish()
    held_out = [] if held_out_bytes is None else chosen.held_out
    values = [dataclasses.asdict(document) for document in held_out]
    record = {"held_out": values, "num_skipped": len(skipped)}
    (folder / _RECORD).write_text(json.dumps(record))
    if source.fingerprint != before or (
        held_out_bytes is not None and chosen.num_documents != choice.num_documents
    ):
        raise ValueError(f"{source.source} has changed while it was read")


def _read_record(file: Path) -> tuple[list[Document], int]:
    """Returns the held-out documents, and the number of files that were left out."""
    try:
        record = read_object(file)
        check_fields(record, ("held_out", "num_skipped"), "it")
        values = record["held_out"]
        if not isinstance(values, list):
            raise ValueError(f"held_out must be a list of documents, got {short(values)}")
        documents = [
            document_from_object(value, f"held_out[{number}]")
            for number, value in enumerate(values)
        ]
        return documents, check_size(record["num_skipped"], "num_skipped")
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; remove {file.parent}") from error


__all__ = ["Sampling", "TrainingData", "open_tokens", "prepare_documents"]
