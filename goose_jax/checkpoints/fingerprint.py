"""A checksum that tells whether two models have the same parameters."""

import zlib

import jax
import numpy as np
from flax import nnx

from goose_jax.nn import RWKV7
from goose_jax.parallel.placement import to_host

_UNUSED_IN_FIRST_LAYER = "value_residual_"  # absent from most files


def fingerprint(model: RWKV7) -> str:
    """Returns the CRC-32 of all parameters of a model, as eight hexadecimal digits.

    Two models have the same fingerprint if their parameters have the same names, dtypes, shapes and
    bits, whatever file they were loaded from. The value residual of the first layer is left out:
    the model does not use it, and most files do not hold it.

    Args:
      model: the model; its parameters are copied to the host, one at a time. If they are divided
        over several processes, all of these must call this.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    value = 0
    for path, leaf in sorted(named.items()):
        array = np.ascontiguousarray(to_host(leaf))
        array = array[1:] if path.rpartition(".")[2].startswith(_UNUSED_IN_FIRST_LAYER) else array
        value = zlib.crc32(f"{path} {array.dtype.name} {array.shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8), value)
    return f"{value:08x}"


__all__ = ["fingerprint"]
