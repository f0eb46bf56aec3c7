"""Writes `.pth` files that `torch.load` reads, without torch."""

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from goose_jax.checkpoints.atomic_write import atomic_path
from goose_jax.checkpoints.pth_tensor import STORAGE_NAMES

_ALIGNMENT = 64  # bytes; torch aligns storages in the file to this
_LOCAL_HEADER_SIZE = 30
_ZIP64_EXTRA_SIZE = 20
_ZIP64_FROM = 1 << 31
_PADDING = struct.Struct("<2sH")  # header of an extra field: its id and its length
_PREFIX = "archive"


def write_pth(path: Path | str, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes named tensors as `torch.save` writes a dict of tensors.

    Args:
      path: the file to create.
      tensors: names and values. An array that is not contiguous is copied, one at a time.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
      ValueError: if torch has no storage for a dtype.
    """
    _write(Path(path), tensors, named=True)


def write_pth_list(path: Path | str, tensors: Iterable[np.ndarray]) -> None:
    """Writes tensors as `torch.save` writes a list of tensors. Errors are those of `write_pth`."""
    _write(Path(path), (("", tensor) for tensor in tensors), named=False)


def _write(path: Path, tensors: Iterable[tuple[str, np.ndarray]], *, named: bool) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    descriptions = []
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        for key, (name, tensor) in enumerate(tensors):
            _add(archive, file.tell(), f"data/{key}", np.ascontiguousarray(tensor))
            prefix = _text(name) if named else b""
            descriptions.append(prefix + _tensor(str(key), tensor))
        empty, fill = (b"}", b"u") if named else (b"]", b"e")
        pickled = b"\x80\x02" + empty + b"(" + b"".join(descriptions) + fill + b"."
        entries = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
        for name, content in entries.items():
            _add(archive, file.tell(), name, np.frombuffer(content, np.uint8))


def _add(archive: zipfile.ZipFile, begin: int, name: str, content: np.ndarray) -> None:
    info = zipfile.ZipInfo(f"{_PREFIX}/{name}")
    large = content.nbytes >= _ZIP64_FROM
    begin += _LOCAL_HEADER_SIZE + len(info.filename) + _PADDING.size
    begin += _ZIP64_EXTRA_SIZE if large else 0
    padding = -begin % _ALIGNMENT
    info.extra = _PADDING.pack(b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as file:
        file.write(content.reshape(-1).view(np.uint8))


def _tensor(key: str, tensor: np.ndarray) -> bytes:
    """Returns pickle instructions that push a contiguous tensor with a storage of its own."""
    if tensor.dtype not in STORAGE_NAMES:
        raise ValueError(f"a .pth file cannot hold the dtype {tensor.dtype.name}")
    strides = [int(np.prod(tensor.shape[axis + 1 :])) for axis in range(tensor.ndim)]
    storage = b"(" + _text("storage") + _name("torch", STORAGE_NAMES[tensor.dtype])
    storage += _text(key) + _text("cpu") + _number(tensor.size) + b"tQ"
    no_hooks = _name("collections", "OrderedDict") + b")R"
    return (
        _name("torch._utils", "_rebuild_tensor_v2")
        + (b"(" + storage + _number(0) + _tuple(tensor.shape) + _tuple(strides))
        + (b"\x89" + no_hooks + b"tR")  # requires no gradient
    )


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _number(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


def _tuple(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
