"""Writes tokens as `.bin` and `.idx`, in a stream that can be interrupted and resumed."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from jaxtyping import Bool, Int

from goose_jax.data.binidx import DTYPES, HEADER, MAGIC, VERSION, files_of

_BLOCK = 2**20  # numbers that are converted at once


@dataclasses.dataclass(frozen=True)
class Written:
    """How much has been written.

    Attributes:
      tokens: number of tokens.
      items: number of complete items.
      pending: number of tokens of the last item, if it is not complete; else 0.
    """

    tokens: int = 0
    items: int = 0
    pending: int = 0


class BinidxWriter:
    """Writes a binidx under temporary names, which get their own names at the end.

    Nothing but the last piece is in memory. After `sync`, what has been written outlives the
    process, and another writer goes on from there.

    Args:
      prefix: path of the files, without `.bin` and `.idx`. Its folder exists.
      vocab_size: number of ids: up to 65,536 the tokens are uint16, else int32.
      written: how much an earlier writer had written at its last `sync`; what it wrote afterwards
        is removed.

    Raises:
      OSError: if a file cannot be written, or another process is writing it.
      ValueError: if the files of the earlier writer are shorter than they were.

    Example:
      >>> with BinidxWriter(Path("geese"), 257) as writer:
      ...     writer.write(np.array([72, 112, 0]), ends_item=True)
      ...     writer.finish()
    """

    def __init__(self, prefix: Path, vocab_size: int, written: Written | None = None):
        self._prefix = prefix
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
        self.written = written or Written()
        self._files: dict[str, BinaryIO] = {}
        sizes = {
            ".bin": self.written.tokens * self._dtype.itemsize,
            ".counted": self.written.tokens,
            ".sizes": self.written.items * 4,
        }
        try:
            for kind, size in sizes.items():
                self._files[kind] = _open_at(self._partial(kind), size)
        except BaseException:
            self.close()
            raise

    def write(
        self,
        tokens: Int[np.ndarray, " N"],
        counted: Bool[np.ndarray, " N"] | None = None,
        *,
        ends_item: bool,
    ) -> None:
        """Appends tokens.

        Args:
          tokens: `[N]` integers, ids below `vocab_size`.
          counted: `[N]`, whether the loss counts a token; None counts all.
          ends_item: whether these tokens are the last of their item.

        Raises:
          OSError: if the disk is full.
          ValueError: if an item has 2^31 tokens or more.
        """
        pending = self.written.pending + len(tokens)
        if pending >= 2**31:
            raise ValueError(
                f"item {self.written.items} has {pending} tokens, at most 2^31 - 1 fit"
            )
        counted = np.ones(len(tokens), bool) if counted is None else counted
        self._write(".bin", tokens.astype(self._dtype).tobytes())
        self._write(".counted", counted.astype(np.uint8).tobytes())
        if ends_item:
            self._write(".sizes", np.int32(pending).tobytes())
        self.written = Written(
            self.written.tokens + len(tokens),
            self.written.items + ends_item,
            0 if ends_item else pending,
        )

    def _write(self, kind: str, data: bytes) -> None:
        with errors_name(self._partial(kind)):
            self._files[kind].write(data)

    def sync(self) -> Written:
        """Forces what has been written to the disk, and returns how much that is.

        Raises:
          OSError: if the disk is full.
        """
        for kind, stream in self._files.items():
            with errors_name(self._partial(kind)):
                stream.flush()
                os.fsync(stream.fileno())
        return self.written

    def finish(self) -> None:
        """Writes the index and gives the files their names, the index last.

        Raises:
          OSError: if the disk is full.
          ValueError: if there are no tokens, or the last item is not complete.
        """
        if not self.written.tokens:
            raise ValueError(f"no token to write to {self._prefix}.bin")
        if self.written.pending:
            raise ValueError("the last item is not complete")
        self.sync()
        self._write_index()
        self.close()
        os.replace(self._partial(".bin"), f"{self._prefix}.bin")
        self.complete(self._prefix)

    @classmethod
    def complete(cls, prefix: Path) -> bool:
        """Gives the other files their names, if `.bin` has its name already, as in `finish`.

        A process may have been killed between these steps.

        Returns:
          Whether all files have their names now.
        """
        idx, bin_file = files_of(prefix)
        if not bin_file.exists() or _partial(prefix, ".bin").exists():
            return False
        counted = _partial(prefix, ".counted")
        if counted.exists() and _has_zero(counted):
            os.replace(counted, f"{prefix}.counted")
        counted.unlink(missing_ok=True)
        if _partial(prefix, ".idx").exists():
            os.replace(_partial(prefix, ".idx"), idx)
        _partial(prefix, ".sizes").unlink(missing_ok=True)
        return idx.exists()

    def _write_index(self) -> None:
        items, codes = self.written.items, {np.dtype(v): k for k, v in DTYPES.items()}
        with (
            errors_name(self._partial(".idx")),
            self._partial(".idx").open("wb") as index,
            self._partial(".sizes").open("rb") as sizes,
        ):
            index.write(HEADER.pack(MAGIC, VERSION, codes[self._dtype], items, items + 1))
            while block := sizes.read(4 * _BLOCK):
                index.write(block)
            sizes.seek(0)
            end = 0
            while block := sizes.read(4 * _BLOCK):
                ends = end + np.cumsum(np.frombuffer(block, np.int32), dtype=np.int64)
                begins = np.concatenate([[end], ends[:-1]])
                index.write((begins * self._dtype.itemsize).astype(np.int64).tobytes())
                end = int(ends[-1])
            for start in range(0, items + 1, _BLOCK):
                index.write(np.arange(start, min(start + _BLOCK, items + 1)).tobytes())
            index.flush()
            os.fsync(index.fileno())

    def close(self) -> None:
        """Closes the files; those that are not finished keep their temporary names.

        Raises:
          OSError: if the disk is full. All files are closed then, too.
        """
        with contextlib.ExitStack() as stack:
            for kind, stream in self._files.items():
                stack.enter_context(errors_name(self._partial(kind)))
                stack.callback(stream.close)
            self._files = {}

    def discard(self) -> None:
        """Removes the temporary files."""
        self.close()
        for kind in (".bin", ".counted", ".sizes", ".idx"):
            self._partial(kind).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _partial(self, kind: str) -> Path:
        return _partial(self._prefix, kind)


def _partial(prefix: Path, kind: str) -> Path:
    return Path(f"{prefix}{kind}.partial")


@contextlib.contextmanager
def errors_name(file: Path) -> Iterator[None]:
    """Puts the name of a file into an `OSError`, which lacks it where an open file is written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def _open_at(file: Path, size: int) -> BinaryIO:
    """Opens a file to append to its first `size` bytes; the rest is removed."""
    stream: Any = file.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise BlockingIOError(f"{file} is being written by another process") from error
    actual = stream.tell()
    if actual < size:
        stream.close()
        raise ValueError(f"{file} has {actual} bytes, and {size} had been written to it")
    stream.truncate(size)
    return stream


def _has_zero(file: Path) -> bool:
    with file.open("rb") as stream:
        return any(b"\0" in block for block in iter(lambda: stream.read(_BLOCK), b""))


__all__ = ["BinidxWriter", "Written", "errors_name"]
