"""`goose-jax tokenize`: from documents to files of tokens."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import tqdm
import tyro

from goose_jax.cli.data_settings import DocumentSettings, check_field
from goose_jax.cli.flags import IfGiven
from goose_jax.cli.skipped_files import SkippedFiles
from goose_jax.cli.train_checks import check_folder
from goose_jax.data import DocumentSource, TokenizeProgress
from goose_jax.data import tokenize as tokenize_documents
from goose_jax.data.binidx import is_binidx, prefix_of
from goose_jax.text import get_tokenizer

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} passed, ETA {remaining}{postfix}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeFlags(DocumentSettings):
    """Which documents are encoded, how, and where the tokens go.

    Attributes:
      out: path of the files, without .bin and .idx.
      tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file.
      workers: number of processes that encode; by default one for each CPU. 0 encodes in the
        process that reads.
    """

    out: Path
    tokenizer: str = "world"
    workers: IfGiven[int] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers must be at least 0, got {self.workers}")
        if self.tokenizer == "":
            raise ValueError("--tokenizer must be a name or a path, got ''")
        if self.data is not None and is_binidx(self.data):
            raise ValueError(f"--data {self.data} holds tokens already")


def tokenize(flags: Annotated[TokenizeFlags, tyro.conf.arg(name="")]) -> None:
    """Encodes documents once, for training: OUT.bin and OUT.idx, as RWKV-LM reads them.

    Each text file, line of JSONL or row of a data set is a document. Of conversations a file
    OUT.counted says which tokens are the assistant's. After an interruption the same command
    goes on where it stopped.

    In use:
      goose-jax tokenize --data my-texts.jsonl --out my-texts
      goose-jax tokenize --data my-texts/ --pattern "*.md" "*.txt" --tokenizer byte --out my-texts
      goose-jax train --data my-texts.bin --tokenizer world
    """
    source, out = flags.open_documents(), prefix_of(flags.out)
    check_field(flags.field, [source])
    check_folder(f"--out {flags.out}", out.parent)
    tokenizer = get_tokenizer(flags.tokenizer)
    workers = len(os.sched_getaffinity(0)) if flags.workers is None else flags.workers
    report, skipped = _Report(source), SkippedFiles()
    try:
        with report:
            data = tokenize_documents(
                source,
                tokenizer,
                out,
                workers=workers,
                on_progress=report.on_progress,
                on_skipped=skipped,
            )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    skipped.tell_count()
    print(
        f"{source.source}: {len(data)} documents, {len(data.tokens)} tokens in {out}.bin and "
        f"{out}.idx"
    )
    if data.counted is not None:
        print(f"the loss counts the assistant's turns: {out}.counted")


class _Report:
    """A progress bar: how much of the source is encoded, and the speed since the start."""

    def __init__(self, source: DocumentSource):
        self._source = source
        self._start = time.perf_counter()
        self._before: TokenizeProgress | None = None

    def __enter__(self) -> None:
        self._bar = tqdm.tqdm(total=self._source.num_bytes, desc="tokenizing", bar_format=_BAR)

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def on_progress(self, progress: TokenizeProgress) -> None:
        if self._before is None:  # the beginning, or what an interrupted call had done
            self._before = progress
        seconds = max(time.perf_counter() - self._start, 1e-9)
        tokens = (progress.tokens - self._before.tokens) / seconds
        megabytes = (progress.num_bytes - self._before.num_bytes) / seconds / 1e6
        self._bar.set_postfix_str(
            f"{progress.documents:,} documents, {progress.tokens:,} tokens, "
            f"{tokens:,.0f} tokens/s, {megabytes:.1f} MB/s",
            refresh=False,
        )
        self._bar.update(self._source.bytes_before(progress.position) - self._bar.n)


__all__ = ["TokenizeFlags", "tokenize"]
