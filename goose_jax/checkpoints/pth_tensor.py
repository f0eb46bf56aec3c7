"""The tensors of a `.pth` file as its pickle describes them: views of storages."""

import dataclasses
import math
import reprlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from goose_jax.checkpoints.errors import CheckpointError

STORAGE_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_MAX_AXES = 8
_MOST = 1 << 62  # of numbers in a storage, and of each size


class PickleError(CheckpointError):
    """A pickle is damaged, or contains anything but descriptions of tensors."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inert:
    """Something in a pickle that no weight needs, and of which nothing but the name is kept.

    Attributes:
      name: name of the function or class that made it.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A sequence of numbers in the file.

    Attributes:
      key: name of the archive's entry that holds the numbers.
      dtype: dtype of the numbers.
      size: number of numbers.
    """

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class TensorView:
    """A tensor as a view of a storage.

    Attributes:
      storage: storage that holds the numbers of the tensor.
      offset: index of the first number in the storage.
      shape: shape of the tensor.
      strides: for each axis the distance between neighbours in the storage; not negative.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StorageType:
    """A storage class of torch.

    Attributes:
      dtype: dtype of the numbers in a storage of this class.
    """

    dtype: np.dtype


def storage_of(identity: Any) -> Storage | Inert:
    """Returns the storage that a persistent id of a pickle refers to.

    Args:
      identity: a tuple ("storage", storage type, key, device, size), in files of torch before 1.6
        followed by None or a tuple (key, offset, size), if the storage is a part of another one.

    Returns:
      The storage; an `Inert` if its numbers have a dtype that is not read.

    Raises:
      PickleError: if `identity` is anything else.
    """
    match identity:
        case ("storage", StorageType(dtype), str(key), str(), int(size), *rest) if _is_number(size):
            if rest not in ([], [None]):
                return Inert("a part of a storage")
            return Storage(key, dtype, size)
        case ("storage", Inert(name), str(), str(), int(), *_):
            return Inert(name)
    raise PickleError(f"the persistent id {reprlib.repr(identity)} is refused: it is no storage")


def tensor_of(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorView | Inert:
    """Returns the view that `torch._utils._rebuild_tensor_v2` makes of the same arguments.

    Raises:
      PickleError: if an argument has the wrong type, or the view lies outside of the storage.
    """
    if isinstance(storage, Inert):
        return storage
    where = f"offset {reprlib.repr(offset)}, shape {reprlib.repr(shape)}, strides "
    where += reprlib.repr(strides)  # short, even for deeply nested values
    if not (isinstance(storage, Storage) and isinstance(shape, tuple)):
        raise PickleError(f"a tensor is refused: it has no storage or no shape ({where})")
    if not (isinstance(strides, tuple) and len(strides) == len(shape) <= _MAX_AXES):
        raise PickleError(f"a tensor is refused: its shape and strides do not fit ({where})")
    if not all(_is_number(number) for number in (offset, *shape, *strides)):
        raise PickleError(f"a tensor is refused: {where} are not all whole numbers from 0")
    axes = list(zip(shape, strides, strict=True))
    count, last = math.prod(shape), offset + sum((size - 1) * stride for size, stride in axes)
    # A view that repeats numbers (stride 0) could have any size.
    is_outside = count and (last >= storage.size or count > storage.size)
    if is_outside or math.prod(max(size, 1) for size in shape) >= _MOST:
        raise PickleError(
            f"a tensor is refused: {where} lie outside of its storage of {storage.size} numbers"
        )
    return TensorView(storage, offset, shape, strides)


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST
