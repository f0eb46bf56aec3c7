"""Tokens on disk in the format of RWKV-LM and Megatron: `NAME.bin` and `NAME.idx`.

`NAME.bin` holds the tokens of all items, one after another. `NAME.idx` holds, in little endian:

| bytes | what |
| --- | --- |
| 9 | `MMIDIDX`, 0, 0 |
| 8 | version: 1 |
| 1 | dtype of the tokens: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 |
| 8 | number of items, N |
| 8 | number of document bounds, D |
| 4 N | int32, number of tokens of each item |
| 8 N | int64, byte of `NAME.bin` at which each item begins |
| 8 D | int64, number of the first item of each document, and N at the end |

RWKV-LM makes one item of each document, with the id 0 at its end. Source: `binidx.py` and
`make_data.py` in https://github.com/BlinkDL/RWKV-LM.

Beside them, and unknown to RWKV-LM, may be `NAME.counted`: a byte for each token, 1 if the loss
counts it, else 0.
"""

import functools
import hashlib
import os
import struct
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_FLOATS = (6, 7)
_BLOCK = 2**20  # items that are checked, or bytes that are hashed, at once
_HASHED_BLOCKS = 1024  # of a file of tokens; all of a file up to 1 GiB


class Binidx:
    """The tokens of a `.bin` and `.idx`. They are mapped into memory, not read.

    Args:
      path: the path of both files without `.bin` and `.idx`, or the path of one of them.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if a file is damaged, or both do not fit each other. The message names the file,
        and the byte or item.

    Attributes:
      prefix: the path of both files without `.bin` and `.idx`.
      tokens: `[N]`, all tokens.
      sizes: `[items]` int32, number of tokens of each item.
      counted: `[N]` booleans, whether the loss counts a token; None counts all.
    """

    def __init__(self, path: Path | str):
        self.prefix = prefix_of(path)
        self._idx, self._bin = files_of(self.prefix)
        dtype, num_items, num_bounds = _read_header(self._idx)
        self.sizes: Int[np.ndarray, " items"] = _map(self._idx, np.int32, HEADER.size, num_items)
        self._pointers = _map(self._idx, np.int64, HEADER.size + 4 * num_items, num_items)
        bounds = _map(self._idx, np.int64, HEADER.size + 12 * num_items, num_bounds)
        num_bytes = self._bin.stat().st_size
        width = np.dtype(dtype).itemsize
        if num_bytes % width:
            raise ValueError(
                f"{self._bin} has {num_bytes} bytes, not a multiple of the {width} bytes of a token"
            )
        _check_items(self._idx, self._bin, self.sizes, self._pointers, width, num_bytes)
        _check_bounds(self._idx, bounds, num_items)
        self.tokens: Int[np.ndarray, " N"] = _map(self._bin, dtype, 0, num_bytes // width)
        self._stream = self._bin.open("rb")
        weakref.finalize(self, self._stream.close)
        self.counted = self._open_counted()

    def _open_counted(self) -> Bool[np.ndarray, " N"] | None:
        file = Path(f"{self.prefix}.counted")
        if not file.exists():
            return None
        if file.stat().st_size != len(self.tokens):
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, but {self._bin} has "
                f"{len(self.tokens)} tokens"
            )
        _check_counted(file)
        return _map(file, np.bool_, 0, len(self.tokens))

    def __reduce__(self) -> tuple[type["Binidx"], tuple[Path]]:
        return Binidx, (self.prefix,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: int) -> Int[np.ndarray, " N"]:
        """Returns the tokens of an item."""
        if not -len(self) <= item < len(self):
            raise IndexError(f"item must be in 0..{len(self) - 1}, got {item}")
        begin = int(self._pointers[item]) // self.tokens.itemsize
        return self.tokens[begin : begin + int(self.sizes[item])]

    def begins(self, first: int, end: int) -> list[int]:
        """Returns the numbers of the tokens, from `first` to `end - 1`, at which items begin."""
        width = self.tokens.itemsize
        low, high = np.searchsorted(self._pointers, [first * width, end * width])
        return [pointer // width for pointer in self._pointers[low:high].tolist()]

    def check_size(self) -> None:
        """Checks that the file of tokens is as long as it was when it was opened.

        Reading mapped tokens that have been cut off ends the process by a signal. A file that was
        removed or replaced can still be read as it was.

        Raises:
          ValueError: if the file has been cut.
        """
        size = os.fstat(self._stream.fileno()).st_size
        if size < self.tokens.nbytes:
            raise ValueError(
                f"{self._bin} has been cut to {size} bytes since it was opened with "
                f"{self.tokens.nbytes}"
            )

    @functools.cached_property
    def checksum(self) -> str:
        """Identifies the tokens: a SHA-256 of the index and the tokens, in hexadecimal digits.

        Of a `.bin` of more than 1 GiB only 1024 blocks of 1 MiB are hashed, spread evenly. A change
        between them that keeps the sizes of all items is not noticed.
        """
        digest = hashlib.sha256()
        for file in (self._idx, self._bin, Path(f"{self.prefix}.counted")):
            if file.exists():
                _hash_file(digest, file, whole=file == self._idx)
        return digest.hexdigest()


def _check_counted(file: Path) -> None:
    """Checks that each byte of a file is 0 or 1."""
    start = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            values = np.frombuffer(block, np.uint8)
            if values.max() > 1:
                at = int(np.argmax(values > 1))
                raise ValueError(f"{file}, byte {start + at}: must be 0 or 1, got {values[at]}")
            start += len(block)


def prefix_of(path: Path | str) -> Path:
    """Returns the path without `.bin` or `.idx` at its end."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def files_of(prefix: Path) -> tuple[Path, Path]:
    """Returns the paths of the index and of the tokens, in this order."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def is_binidx(path: Path | str) -> bool:
    """Returns whether a path names a `.bin` or `.idx`, or both of them without the ending."""
    path = Path(path)
    if path.suffix in (".bin", ".idx"):
        return True
    return not path.exists() and any(file.exists() for file in files_of(path))


def _map(file: Path, dtype: Any, offset: int, count: int) -> Any:
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, "r", offset, (count,))


def _read_header(idx: Path) -> tuple[type[np.integer[Any]], int, int]:
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        data = stream.read(HEADER.size)
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise ValueError(f"{idx} is not the index of a binidx: it begins with {data[:9]!r}")
    if len(data) < HEADER.size:
        raise ValueError(
            f"{idx} is truncated: {size} bytes, and the header alone has {HEADER.size}"
        )
    _, version, code, num_items, num_bounds = HEADER.unpack(data)
    if version != VERSION:
        raise ValueError(f"{idx}, byte 9: version {version}, and only {VERSION} is read")
    if code in _FLOATS:
        raise ValueError(f"{idx}, byte 17: the dtype {code} is of floating-point numbers")
    if code not in DTYPES:
        raise ValueError(
            f"{idx}, byte 17: the dtype {code} is none of {', '.join(map(str, DTYPES))}"
        )
    expected = HEADER.size + 12 * num_items + 8 * num_bounds
    if size != expected:
        kind = "is truncated" if size < expected else "is too long"
        raise ValueError(
            f"{idx} {kind}: {size} bytes, and {num_items} items and {num_bounds} bounds of "
            f"documents need {expected}"
        )
    if num_items == 0:
        raise ValueError(f"{idx} has no items")
    return DTYPES[code], num_items, num_bounds


def _check_items(
    idx: Path,
    bin_file: Path,
    sizes: Int[np.ndarray, " items"],
    pointers: Int[np.ndarray, " items"],
    width: int,
    num_bytes: int,
) -> None:
    """Checks that items have sizes, follow each other and fill the file of tokens."""
    end = 0  # in bytes
    for start in range(0, len(sizes), _BLOCK):
        block = np.asarray(sizes[start : start + _BLOCK], np.int64)
        if block.min() < 0:
            item = start + int(np.argmax(block < 0))
            raise ValueError(f"{idx}, item {item}: the number of tokens is {sizes[item]}")
        ends = end + np.cumsum(block) * width
        begins = np.concatenate([[end], ends[:-1]])
        actual = pointers[start : start + _BLOCK]
        if (wrong := actual != begins).any():
            item = start + int(np.argmax(wrong))
            place = HEADER.size + 4 * len(sizes) + 8 * item
            raise ValueError(
                f"{idx}, byte {place}: item {item} begins at byte {pointers[item]} of {bin_file}, "
                f"and the items before it end at {begins[item - start]}"
            )
        if ends[-1] > num_bytes:
            item = start + int(np.argmax(ends > num_bytes))
            raise ValueError(
                f"{idx}, item {item}: points past the end of {bin_file}, to byte "
                f"{ends[item - start]} of {num_bytes}"
            )
        end = int(ends[-1])
    if end != num_bytes:
        raise ValueError(f"{bin_file} has {num_bytes} bytes, and the items of {idx} end at {end}")
    if end == 0:
        raise ValueError(f"{bin_file} is empty")


def _check_bounds(idx: Path, bounds: Int[np.ndarray, " D"], num_items: int) -> None:
    place = HEADER.size + 12 * num_items
    for start in range(0, len(bounds), _BLOCK):
        block = bounds[start : start + _BLOCK + 1]  # each block sees the first bound of the next
        wrong = (block < 0) | (block > num_items)
        wrong[1:] |= block[1:] < block[:-1]
        if wrong.any():
            number = start + int(np.argmax(wrong))
            raise ValueError(
                f"{idx}, byte {place + 8 * number}: bound {number} of a document is item "
                f"{bounds[number]}, after {bounds[number - 1] if number else 0} and of {num_items}"
            )


def _hash_file(digest: Any, file: Path, *, whole: bool) -> None:
    size = file.stat().st_size
    digest.update(f"{file.suffix} {size} ".encode())
    blocks = -(-size // _BLOCK)
    step = 1 if whole else max(1, blocks / _HASHED_BLOCKS)
    with file.open("rb") as stream:
        place = 0.0
        while place < blocks:
            stream.seek(int(place) * _BLOCK)
            digest.update(stream.read(_BLOCK))
            place += step
        stream.seek(max(0, size - _BLOCK))
        digest.update(stream.read(_BLOCK))


__all__ = ["Binidx", "files_of", "is_binidx", "prefix_of"]
