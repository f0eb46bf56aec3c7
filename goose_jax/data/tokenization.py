"""Turns a source of documents into a binidx, in a stream that can be interrupted and resumed."""

import bisect
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from goose_jax.data.binidx import Binidx, files_of
from goose_jax.data.binidx_writer import BinidxWriter, Written, errors_name
from goose_jax.data.encoding import encode_stream, tokenizer_fingerprint
from goose_jax.data.json_lines import short
from goose_jax.data.records import read_object, sizes_from_object
from goose_jax.data.sources import DocumentSource, Position, no_text
from goose_jax.text import Tokenizer

_SAVE_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class TokenizeProgress:
    """How far a tokenization has come.

    Attributes:
      documents: number of complete documents.
      tokens: number of tokens.
      num_bytes: bytes of text, in UTF-8.
      skipped: number of files that were left out, because they are not text.
      position: the place in the source.
      written: what the files hold.
    """

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    skipped: int = 0
    position: Position = dataclasses.field(default_factory=Position)
    written: Written = dataclasses.field(default_factory=Written)


def tokenize(
    source: DocumentSource,
    tokenizer: Tokenizer,
    prefix: Path | str,
    *,
    workers: int = 0,
    on_progress: Callable[[TokenizeProgress], None] | None = None,
    on_skipped: Callable[[Path, str], None] | None = None,
) -> Binidx:
    """Encodes all documents of a source into `PREFIX.bin` and `PREFIX.idx`.

    Each document becomes an item, which ends with the tokenizer's `end_of_document`. With the World
    vocabulary the files are those that `make_data.py` of RWKV-LM makes of the same documents in the
    same order. If the source has conversations, `PREFIX.counted` says which tokens the loss counts.

    The files have temporary names until they are complete. `PREFIX.progress.json` says how far they
    are; after an interruption, an error or a kill the same call goes on from there. A kill and a
    full disk lose the work of up to 20 seconds.

    Args:
      source: the documents.
      tokenizer: the tokenizer.
      prefix: path of the files, without `.bin` and `.idx`.
      workers: number of processes that encode; 0 encodes in this one.
      on_progress: called at the beginning, now and then, and at the end.
      on_skipped: called with each file that is left out, and what is wrong with it.

    Raises:
      FileExistsError: if the files are there already.
      OSError: if a file cannot be read or written.
      ValueError: if the source is damaged, a text cannot be encoded, or an interrupted call had
        another source or tokenizer.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    record = _Record(prefix, source, tokenizer)
    progress = record.load()
    idx, bin_file = files_of(prefix)
    if progress is not None and BinidxWriter.complete(prefix):
        record.remove()
        return Binidx(prefix)
    for file in (idx, bin_file):
        if file.exists():
            raise FileExistsError(f"{file} exists already, and is not written over")
    _run(source, tokenizer, record, progress, workers, on_progress, on_skipped)
    record.remove()
    return Binidx(prefix)


def _run(
    source: DocumentSource,
    tokenizer: Tokenizer,
    record: "_Record",
    progress: TokenizeProgress | None,
    workers: int,
    on_progress: Callable[[TokenizeProgress], None] | None,
    on_skipped: Callable[[Path, str], None] | None,
) -> None:
    skipped: list[str] = []
    number = {item.path: i for i, item in enumerate(source.items)}
    skipped_items: list[int] = []  # ascending

    def skip(file: Path, why: str) -> None:
        skipped.append(f"{file} {why}")
        skipped_items.append(number[file])
        if on_skipped is not None:
            on_skipped(file, why)

    progress = TokenizeProgress() if progress is None else progress
    before = progress.skipped
    documents = source.read(progress.position, on_skipped=skip)
    with BinidxWriter(record.prefix, tokenizer.vocab_size, progress.written) as writer:
        record.save(dataclasses.replace(progress, written=writer.sync()))
        stream = encode_stream(
            documents, tokenizer, workers=workers, follows=progress.written.pending > 0
        )
        saved = time.monotonic()
        if on_progress is not None:
            on_progress(progress)
        try:
            for encoded, position in stream:
                for document in encoded:
                    writer.write(document.tokens, document.counted, ends_item=document.ends)
                progress = dataclasses.replace(
                    progress,
                    documents=writer.written.items,
                    tokens=writer.written.tokens,
                    num_bytes=progress.num_bytes + sum(piece.num_bytes for piece in encoded),
                    skipped=before + bisect.bisect_left(skipped_items, position.item),
                    position=position,
                    written=writer.written,
                )
                if time.monotonic() - saved > _SAVE_SECONDS:
                    writer.sync()
                    record.save(progress)
                    saved = time.monotonic()
                if on_progress is not None:
                    on_progress(progress)
        except (KeyboardInterrupt, OSError, ValueError):
            with contextlib.suppress(OSError):  # if the disk is full, the last record stays
                writer.sync()
                record.save(progress)
            raise
        if not progress.tokens:
            writer.discard()
            record.remove()
            raise ValueError(no_text(source.source, skipped))
        progress = dataclasses.replace(progress, skipped=before + len(skipped))
        writer.sync()
        record.save(progress)
        if on_progress is not None:
            on_progress(progress)
        writer.finish()


class _Record:
    """The file that says how far a tokenization is."""

    def __init__(self, prefix: Path, source: DocumentSource, tokenizer: Tokenizer):
        self.prefix = prefix
        self._file = Path(f"{prefix}.progress.json")
        parts = [source.fingerprint, tokenizer_fingerprint(tokenizer)]
        self._of = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._documents = source

    def load(self) -> TokenizeProgress | None:
        if not self._file.exists():
            return None
        try:
            values = read_object(self._file)
            of = values.pop("of", None)
            if not isinstance(of, str):
                raise ValueError(f"of must be a text, got {short(of)}")
            progress = sizes_from_object(TokenizeProgress, values, "progress")
        except ValueError as error:
            raise self._damaged(error) from error
        if of != self._of:
            raise ValueError(
                f"{self._file} is of another tokenization: {self._documents.source}, the tokenizer "
                "or a flag has changed since; remove it to begin anew"
            )
        try:
            self._check(progress)
        except ValueError as error:
            raise self._damaged(error) from error
        return progress

    def _check(self, progress: TokenizeProgress) -> None:
        """Checks that numbers fit each other and the source; else documents would be left out."""
        written, position = progress.written, progress.position
        if (progress.documents, progress.tokens) != (written.items, written.tokens):
            raise ValueError(
                f"it tells of {progress.documents} documents and {progress.tokens} tokens, but of "
                f"{written.items} and {written.tokens} that are written"
            )
        if written.pending > written.tokens:
            raise ValueError(f"{written.pending} tokens are pending of {written.tokens}")
        if not self._documents.holds(position):
            raise ValueError(f"{self._documents.source} has no place {position}")

    def _damaged(self, error: ValueError) -> ValueError:
        return ValueError(f"{self._file} is damaged: {error}; remove it to begin anew")

    def save(self, progress: TokenizeProgress) -> None:
        temporary = self._file.with_suffix(".tmp")
        values = dataclasses.asdict(progress) | {"of": self._of}
        with errors_name(temporary), temporary.open("w") as stream:
            json.dump(values, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self._file)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)


__all__ = ["TokenizeProgress", "tokenize"]
