"""The flags that say which data is read, and how."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from goose_jax.chat import render_conversation
from goose_jax.cli.flags import IfGiven, check_integers
from goose_jax.cli.skipped_files import SkippedFiles
from goose_jax.data import (
    BatchSource,
    Document,
    DocumentSource,
    PrefetchedBatches,
    Sampling,
    TrainingData,
    open_documents,
    open_standard_library,
    open_tokens,
    prepare_documents,
    read_documents,
)
from goose_jax.data.binidx import is_binidx
from goose_jax.text import Tokenizer
from pallas_kernels.validation import check_positive

_KEPT_TOKENS = ".tokens"
_LONG = (
    *("held_out_bytes", "magic_prime"),
    *("log_every", "evaluate_every", "save_every", "keep", "keep_every"),
)
_TAKING_MEMORY = ("prefetch", "data_workers", "workers")
_MOST = dict.fromkeys(_LONG, 2**63 - 1) | dict.fromkeys(_TAKING_MEMORY, 2**16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentSettings:
    """Which documents are read, and how.

    Attributes:
      data: a text file, a JSONL file, a folder of both, or a folder that `save_to_disk` of Hugging
        Face's datasets wrote; `.gz` files are unpacked. By default the sources of this Python's
        standard library.
      pattern: which files of a folder are read: all whose names fit one of these, as in "*.txt".
      field: the field of JSONL and data sets that holds the text or the conversation; by default
        text, messages or conversations.
      strict: treat a file of a folder that is not UTF-8 text as an error. Without it, such files
        are left out.
    """

    data: IfGiven[Path] = None
    pattern: tuple[str, ...] = ("*",)
    field: IfGiven[str] = None
    strict: bool = False

    def __post_init__(self) -> None:
        check_pattern_given(self.pattern)
        values = {name: value for name, value in vars(self).items() if name != "seed"}
        check_integers(values, _MOST)  # a seed has a range of its own

    def open_documents(self) -> DocumentSource:
        """Opens the documents.

        Raises:
          OSError: if there is nothing at `data`.
          ValueError: if no file fits.
        """
        if self.data is None:
            return open_standard_library()
        return open_documents(
            self.data,
            patterns=self.pattern,
            field=self.field,
            render=render_conversation,
            strict=self.strict,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(DocumentSettings):
    """The data of a training run, and how batches are made of it.

    Attributes:
      data: a text file, a JSONL file, a folder of both, a folder that `save_to_disk` of Hugging
        Face's datasets wrote, or the .bin of tokens that goose-jax tokenize or RWKV-LM made. By
        default the sources of this Python's standard library.
      held_out: a file or folder with text to measure bits per byte on; by default a part of the
        data.
      held_out_bytes: without --held-out, bytes of the data that are not trained on, but used to
        measure bits per byte; at most a tenth of it.
      sampling: how batches are made. windows: windows at random, which may span several documents;
        packed: documents side by side, each a segment of its own, all of them in each epoch;
        magic-prime: the windows of the official training code, in its order.
      magic_prime: with --sampling magic-prime, the prime that determines the order; by default the
        one that make_data.py of RWKV-LM prints.
      prefetch: number of batches that are made ahead, by each process that makes batches; 0 makes
        each batch when it is needed.
      data_workers: number of processes that encode text and make batches; 0 does it in threads of
        the process that trains.
    """

    held_out: IfGiven[Path] = None
    held_out_bytes: int = 32768
    sampling: Sampling = "windows"
    magic_prime: IfGiven[int] = None
    prefetch: int = 4
    data_workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("--held-out-bytes", self.held_out_bytes)
        for flag, value in (("--prefetch", self.prefetch), ("--data-workers", self.data_workers)):
            if value < 0:
                raise ValueError(f"{flag} must be at least 0, got {value}")
        if self.magic_prime is not None and self.sampling != "magic-prime":
            raise ValueError("--magic-prime needs --sampling magic-prime")
        if self.data_workers and not self.prefetch:
            raise ValueError("--data-workers needs --prefetch of at least 1, got 0")
        if self.sampling == "magic-prime" and self.held_out is None:
            raise ValueError(
                "--sampling magic-prime trains on all of the data: give --held-out, a file or "
                "folder with text to measure on"
            )

    def open_data(self, tokenizer: Tokenizer, out: Path) -> TrainingData:
        """Opens the data, and encodes it if it is text that was not encoded before.

        Args:
          tokenizer: the tokenizer of the model.
          out: folder of the runs, in which the tokens of texts are kept.

        Raises:
          OSError: if a file is missing, or cannot be read or written.
          ValueError: if a file is damaged, or the data is too short.
        """
        held_out = None
        if self.held_out is not None:
            held_out = read_texts(
                self.held_out, pattern=self.pattern, field=self.field, strict=self.strict
            )
        if self.data is not None and is_binidx(self.data):
            return open_tokens(
                self.data, tokenizer, held_out_bytes=self.held_out_bytes, held_out=held_out
            )
        return prepare_documents(
            self.open_documents(),
            tokenizer,
            out / _KEPT_TOKENS,
            held_out_bytes=self.held_out_bytes,
            held_out=held_out,
            workers=self.data_workers,
        )

    def open_batches(
        self,
        data: TrainingData,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        microbatches: int,
    ) -> BatchSource:
        """Returns the batches of the data, made ahead; arguments as for `TrainingData.batches`.

        Raises:
          ValueError: if the data is too short, or the magic prime does not fit it.
        """
        batches = data.batches(
            self.sampling,
            vocab_size=data.tokenizer.vocab_size,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=seed,
            microbatches=microbatches,
            magic_prime=self.magic_prime,
        )
        if not self.prefetch:
            return batches
        return PrefetchedBatches(batches, ahead=self.prefetch, workers=self.data_workers)


def check_pattern_given(pattern: Sequence[str]) -> None:
    """Checks that `--pattern` has a value."""
    if not pattern:
        raise ValueError("--pattern needs at least one pattern, as in --pattern '*.txt'")


def check_field(field: str | None, sources: Sequence[DocumentSource]) -> None:
    """Checks that `--field`, if it is given, names a field of something that is read.

    Raises:
      ValueError: if all sources are texts or there is none; the message names the flag.
    """
    items = [item for source in sources for item in source.items]
    if field is not None and all(item.kind == "text" for item in items):
        names = " and ".join(source.source for source in sources) or "the data"
        raise ValueError(
            f"--field {field!r} is for JSONL files and data sets, and {names} holds none"
        )


def read_texts(
    path: Path, *, pattern: tuple[str, ...], field: str | None, strict: bool
) -> list[Document]:
    """Reads documents into memory, and tells on stderr which files are left out.

    The arguments are those of `DocumentSettings`.

    Raises:
      OSError: if there is nothing at `path`, or a file cannot be read.
      ValueError: if a file is damaged, or there is no text.
    """
    skipped = SkippedFiles()
    documents = read_documents(
        path,
        patterns=pattern,
        field=field,
        render=render_conversation,
        strict=strict,
        on_skipped=skipped,
    )
    skipped.tell_count()
    return documents


__all__ = [
    "DataSettings",
    "DocumentSettings",
    "check_field",
    "check_pattern_given",
    "read_texts",
]
