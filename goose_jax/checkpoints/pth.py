"""Reads `.pth` files, torch's format for saved tensors, without torch.

A `.pth` file is a zip archive. It has an uncompressed entry for each storage, and an entry
`data.pkl` that describes the tensors in the storages. Before torch 1.6 the file was a sequence of
pickles and storages. The bytes of a tensor are mapped into memory when the tensor is read, and stay
mapped only while its array is in use.
"""

import functools
import io
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from goose_jax.checkpoints.errors import CheckpointError, cause, list_names, shorten_name
from goose_jax.checkpoints.pth_pickle import describe_pickle
from goose_jax.checkpoints.pth_tensor import PickleError, Storage, TensorView
from goose_jax.checkpoints.stored_tensor import StoredTensor, map_file

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra
_ENCRYPTED, _UTF_8 = 0x61, 0x800  # flags of an entry: encrypted, patched; its name is UTF-8
_SIGNATURE = b"PK\x03\x04"
_PICKLE_SIGNATURES = (b"\x80\x02", b"\x80\x03", b"\x80\x04")  # the beginnings of pickles
_MAX_PICKLE = 8 << 20  # bytes; the objects of a pickle may take 70 times as much
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LEGACY_SIZE = struct.Struct("<q")  # number of elements before the bytes of a storage
_WRAPPERS = ("module", "state_dict", "model", "model_state_dict", "params", "weights")
_MAX_DEPTH = 8  # of dicts in dicts


def is_pth(beginning: bytes) -> bool:
    """Returns whether a file that begins with these bytes has a format of torch."""
    return beginning.startswith((_SIGNATURE, *_PICKLE_SIGNATURES))


def read_pth(path: Path | str) -> dict[str, StoredTensor] | list[StoredTensor]:
    """Returns the tensors of a `.pth` file, by name or as a list. Values are not read yet.

    No code in the file is executed. If dicts lie in dicts, as in the checkpoints of training
    programs, the one with the most tensors is taken, but one that a key such as "module" or
    "state_dict" leads to goes before others of up to twice its size. Everything else is left out.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: if there is no file.
      CheckpointError: if the file is damaged, has another format, is refused because it may be
        malicious, holds no tensors, or holds several models.
    """
    path = Path(path)
    try:
        content, locate = _open(path)
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from None
    if isinstance(content, list):
        wrong = [k for k, value in enumerate(content) if not isinstance(value, TensorView)]
        if wrong:
            kind = type(content[wrong[0]]).__name__
            raise CheckpointError(f"{path}: item {wrong[0]} of a list is a {kind}, not a tensor")
        return [_stored(path, view, locate) for view in content]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not tensors")
    views = _find_tensors(content, path)
    return {name: _stored(path, view, locate) for name, view in views.items()}


def _open(path: Path) -> tuple[Any, Callable[[Storage], int]]:
    """Returns what a file holds, and a function that gives the position of a storage's bytes."""
    with path.open("rb") as file:
        beginning = file.read(len(_SIGNATURE))
        if beginning.startswith(_PICKLE_SIGNATURES):
            file.seek(0)
            return _open_legacy(path, file)
        if beginning != _SIGNATURE:
            raise CheckpointError(f"{path} is no .pth file: it begins with {beginning!r}")
    archive = _Archive(path)
    return describe_pickle(archive.read("data.pkl")), archive.locate


def _find_tensors(content: dict[Any, Any], path: Path) -> dict[str, TensorView]:
    """Returns the tensors of the dict that has the most of them.

    A dict that a known key leads to goes before others of up to twice its size, such as the states
    of an optimizer.
    """
    found: list[tuple[str, dict[str, TensorView]]] = []
    seen: set[int] = set()

    def search(node: dict[Any, Any], key: str, depth: int) -> None:
        if id(node) in seen or depth > _MAX_DEPTH:
            return
        seen.add(id(node))
        tensors = {
            name: value
            for name, value in node.items()
            if isinstance(name, str) and isinstance(value, TensorView)
        }
        if tensors:
            found.append((key, tensors))
        for name, value in node.items():
            if isinstance(value, dict):
                search(value, str(name), depth + 1)

    search(content, "", 0)
    if not found:
        kinds = (f"{shorten_name(name)} is a {type(x).__name__}" for name, x in content.items())
        raise CheckpointError(f"{path} holds no tensors: {list_names(kinds) or 'it is empty'}")
    most = max(len(tensors) for _, tensors in found)
    known = [item for item in found if item[0] in _WRAPPERS and 2 * len(item[1]) >= most]
    most = max(len(tensors) for _, tensors in known or found)
    largest = [item for item in known or found if len(item[1]) == most]
    if len(largest) > 1:
        keys = list_names(repr(key) for key, _ in largest)
        raise CheckpointError(f"{path} holds several models, and no rule chooses one: {keys}")
    return largest[0][1]


def _stored(path: Path, view: TensorView, locate: Callable[[Storage], int]) -> StoredTensor:
    dtype = view.storage.dtype
    begin, size = locate(view.storage), view.storage.size * dtype.itemsize
    strides = tuple(stride * dtype.itemsize for stride in view.strides)

    def read() -> np.ndarray:
        mapped, skipped = map_file(path, begin, size)
        return np.ndarray(
            view.shape, dtype, mapped, skipped + view.offset * dtype.itemsize, strides
        )

    return StoredTensor(view.shape, dtype, read)


class _Archive:
    """The entries of a zip file, mapped into memory."""

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as file:
            try:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
            except (
                *(zipfile.BadZipFile, NotImplementedError, OSError, ValueError),
                *(struct.error, EOFError, OverflowError),
            ) as error:
                raise CheckpointError(f"{path} is damaged: {cause(error)}") from error
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise CheckpointError(f"{path} is damaged: entries of the archive share a name")
        self._prefix = self._find_prefix()
        byte_order = f"{self._prefix}/byteorder"
        if byte_order in self._entries and self.read("byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine")

    def read(self, name: str) -> bytes:
        begin, size = self._place(name)
        if size > _MAX_PICKLE:
            raise CheckpointError(
                f"{self._path}: the entry {name} has {size:,} bytes, more than are read"
            )
        return self._bytes[begin : begin + size]

    def locate(self, storage: Storage) -> int:
        """Returns the position of a storage in the file."""
        begin, size = self._place(f"data/{storage.key}")
        _check_size(self._path, storage, size)
        return begin

    def _find_prefix(self) -> str:
        end = "/data.pkl"
        found = [name.removesuffix(end) for name in self._entries if name.endswith(end)]
        if len(found) != 1 or f"{found[0]}/constants.pkl" in self._entries:
            raise CheckpointError(
                f"{self._path} is a zip file, but none that torch.save has written"
            )
        return found[0]

    def _place(self, name: str) -> tuple[int, int]:
        """Returns the position of an entry's bytes in the file, and their number."""
        entry = self._entries.get(f"{self._prefix}/{name}")
        name = shorten_name(name)
        if entry is None:
            raise CheckpointError(f"{self._path} is damaged: the entry {name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"{self._path}: the entry {name} is compressed or encrypted, as torch never does"
            )
        offset = entry.header_offset
        header = self._bytes[offset : offset + _LOCAL_HEADER.size] if offset >= 0 else b""
        signature, length, extra = _LOCAL_HEADER.unpack(header.ljust(_LOCAL_HEADER.size))
        begin = offset + _LOCAL_HEADER.size + length + extra
        end = begin + entry.file_size
        two_sizes = entry.compress_size != entry.file_size
        if signature != _SIGNATURE or end > len(self._bytes) or two_sizes:
            raise CheckpointError(f"{self._path} is damaged: the entry {name} is cut off")
        # The name stands in the directory of the archive, and again before the entry.
        again = self._bytes[offset + _LOCAL_HEADER.size : begin - extra]
        if again != entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437"):
            raise CheckpointError(f"{self._path} is damaged: the entry {name} has two names")
        return begin, entry.file_size


def _open_legacy(path: Path, file: BinaryIO) -> tuple[Any, Callable[[Storage], int]]:
    """Opens a file of torch before 1.6: five pickles, then the storages one after another."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    limited = cast(BinaryIO, _Limited(file, _MAX_PICKLE))
    magic, protocol, system = (describe_pickle(limited) for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or not isinstance(system, dict):
        raise CheckpointError(f"{path} is a pickle, but none that torch.save has written")
    if system.get("little_endian") is not True:
        raise CheckpointError(f"{path} was written on a big-endian machine")
    content, keys = describe_pickle(limited), describe_pickle(limited)
    storages = _storages_in(content)
    places: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else [None]:
        header = file.read(_LEGACY_SIZE.size)
        if not isinstance(key, str) or key not in storages or len(header) != _LEGACY_SIZE.size:
            raise CheckpointError(
                f"{path} is damaged, or holds storages that are not read; load it with torch and "
                "save it anew"
            )
        storage = storages[key]
        if _LEGACY_SIZE.unpack(header) != (storage.size,):
            raise CheckpointError(f"{path} is damaged: a storage has another size than its tensor")
        places[key] = file.tell()
        file.seek(storage.size * storage.dtype.itemsize, io.SEEK_CUR)
        if file.tell() > size:
            raise CheckpointError(f"{path} is damaged: it is cut off")
    return content, functools.partial(_place_of, path, places)


def _place_of(path: Path, places: Mapping[str, int], storage: Storage) -> int:
    if storage.key not in places:
        raise CheckpointError(f"{path} is damaged: the storage {storage.key} is missing")
    return places[storage.key]


def _storages_in(content: Any) -> dict[str, Storage]:
    """Returns the storages of all tensors in dicts and lists, by key."""
    storages: dict[str, Storage] = {}
    waiting, seen = [content], set[int]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, TensorView):
            known = storages.setdefault(node.storage.key, node.storage)
            if known != node.storage:
                raise PickleError("the pickle is damaged: two storages share a key")
        elif isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            waiting.extend(node.values() if isinstance(node, dict) else node)
    return storages


class _Limited:
    """A file of which only so many bytes can be read."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        return self._take(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._take(self._file.readline(self._left))

    def tell(self) -> int:
        return self._file.tell()

    def _take(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _check_size(path: Path, storage: Storage, size: int) -> None:
    if size != storage.size * storage.dtype.itemsize:
        raise CheckpointError(
            f"{path} is damaged: the storage {shorten_name(storage.key)} should hold "
            f"{storage.size} numbers of {storage.dtype.itemsize} bytes, but has {size} bytes"
        )
