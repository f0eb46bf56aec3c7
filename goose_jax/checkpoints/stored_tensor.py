"""A tensor in a file, of which only the shape and the dtype have been read."""

import dataclasses
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from goose_jax.checkpoints.errors import CheckpointError, cause
from goose_jax.checkpoints.key_map import Shape

STORED_DTYPES = tuple(
    np.dtype(dtype) for dtype in (np.float32, jnp.bfloat16, np.float16, np.float64)
)
"""The dtypes that a parameter or a state may have in a file."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
      shape: shape of the tensor in the file.
      dtype: dtype of the tensor in the file.
      read: reads the values. The array that it returns may be a view of the file.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def common_dtype(tensors: Mapping[str, StoredTensor], source: str) -> str:
    """Returns the name of the one dtype that all tensors have.

    Args:
      tensors: tensors by name.
      source: the file's name, for the error.

    Raises:
      CheckpointError: if they have several dtypes.
    """
    names = sorted({tensor.dtype.name for tensor in tensors.values()})
    if len(names) > 1:
        raise CheckpointError(f"{source} holds tensors of {', '.join(names)}; choose one by dtype=")
    return names[0]


def map_file(path: Path, begin: int, size: int) -> tuple[mmap.mmap | bytes, int]:
    """Maps a part of a file into memory, for as long as the map is in use.

    Args:
      path: the file.
      begin: position of the first byte.
      size: number of bytes.

    Returns:
      The map, and the offset of the part in it.

    Raises:
      CheckpointError: if the file has become shorter.
    """
    if size == 0:
        return b"", 0
    skipped = begin % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        try:
            return mmap.mmap(
                file.fileno(), size + skipped, access=mmap.ACCESS_READ, offset=begin - skipped
            ), skipped
        except ValueError as error:
            text = f"{path} has changed since it was opened: {cause(error)}"
            raise CheckpointError(text) from error


__all__ = ["STORED_DTYPES", "StoredTensor", "common_dtype", "map_file"]
