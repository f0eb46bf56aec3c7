"""Reads `.pth` files, torch's format for saved tensors, without torch.

A `.pth` file is a zip archive. It has an uncompressed entry for each storage, and an entry
`data.pkl` that describes the tensors in the storages. The bytes of a tensor are mapped into memory
when the tensor is read, and stay mapped only while its array is in use.
"""

import mmap
import struct
import zipfile
from pathlib import Path

import numpy as np

from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.pth_pickle import describe_pickle
from goose_jax.checkpoints.pth_tensor import PickleError, TensorView
from goose_jax.checkpoints.stored_tensor import StoredTensor

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra
_ENCRYPTED = 1
ZIP_SIGNATURE = b"PK\x03\x04"


def read_pth(path: Path | str) -> dict[str, StoredTensor] | list[StoredTensor]:
    """Returns the tensors of a `.pth` file, by name or as a list. Values are not read yet.

    No code in the file is executed. A file whose pickle names anything but tensors is refused.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: if there is no file.
      CheckpointError: if the file is damaged, has another format, is refused, or holds anything but
        a dict or a list of tensors.
    """
    archive = _Archive(Path(path))
    try:
        content = describe_pickle(archive.read("data.pkl"))
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from None
    if not isinstance(content, dict | list):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not tensors")
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if not isinstance(value, TensorView):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
    if isinstance(content, dict):
        return {name: archive.tensor(view) for name, view in content.items()}
    return [archive.tensor(view) for view in content]


def _map(path: Path, begin: int, size: int) -> tuple[mmap.mmap | bytes, int]:
    """Maps a part of a file. Returns the map, and the offset of the part in the map."""
    if size == 0:
        return b"", 0
    skipped = begin % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        try:
            return mmap.mmap(
                file.fileno(), size + skipped, access=mmap.ACCESS_READ, offset=begin - skipped
            ), skipped
        except ValueError as error:
            raise CheckpointError(f"{path} has changed since it was opened: {error}") from error


def _check_signature(path: Path, found: bytes) -> None:
    if found == ZIP_SIGNATURE:
        return
    if found[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):  # the beginning of a pickle
        raise CheckpointError(
            f"{path} has the format of torch before 1.6, which is not read here; load it with "
            "torch and save it anew"
        )
    raise CheckpointError(f"{path} is no .pth file: it begins with {found!r}")


class _Archive:
    """The entries of a zip file, mapped into memory."""

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as file:
            _check_signature(path, file.read(len(ZIP_SIGNATURE)))
            try:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
            except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise CheckpointError(f"{path} is damaged: entries of the archive share a name")
        self._prefix = self._find_prefix()
        byte_order = f"{self._prefix}/byteorder"
        if byte_order in self._entries and self.read("byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine")

    def read(self, name: str) -> bytes:
        begin, size = self._place(name)
        return self._bytes[begin : begin + size]

    def tensor(self, view: TensorView) -> StoredTensor:
        storage = view.storage
        itemsize = storage.dtype.itemsize
        begin, size = self._place(f"data/{storage.key}")
        if size != storage.size * itemsize:
            raise CheckpointError(
                f"{self._path} is damaged: the storage {storage.key} should hold {storage.size} "
                f"numbers of {itemsize} bytes, but has {size} bytes"
            )
        strides = tuple(stride * itemsize for stride in view.strides)
        path = self._path

        def read() -> np.ndarray:
            mapped, skipped = _map(path, begin, size)
            offset = skipped + view.offset * itemsize
            return np.ndarray(view.shape, storage.dtype, mapped, offset, strides)

        return StoredTensor(view.shape, storage.dtype, read)

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
        if entry is None:
            raise CheckpointError(f"{self._path} is damaged: the entry {name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"{self._path}: the entry {name} is compressed or encrypted, as torch never does"
            )
        header = self._bytes[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
        signature, *lengths = _LOCAL_HEADER.unpack(header.ljust(_LOCAL_HEADER.size))
        begin = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
        end = begin + entry.file_size
        if signature != ZIP_SIGNATURE or end > len(self._bytes):
            raise CheckpointError(f"{self._path} is damaged: the entry {name} is cut off")
        return begin, entry.file_size
