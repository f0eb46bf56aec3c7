"""Rows of tokens in chunks, for which logits are computed one chunk at a time."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.types import Size
from pallas_kernels.validation import is_known

LENGTH_OF_UNKNOWN = 64
"""Tokens of each row in a chunk, where the number of rows is a symbol."""


def chunk_length_of(shape: tuple[Size, ...], chunk_size: int) -> int:
    """Returns how many tokens of each row a chunk has.

    All rows together have at most `chunk_size` tokens in a chunk, but each has at least one.
    """
    rows, length = shape
    if not is_known(rows):
        return LENGTH_OF_UNKNOWN
    most = max(1, chunk_size // rows)
    return math.ceil(length / math.ceil(length / most)) if is_known(length) else most


def split(x: jax.Array, chunk_length: Size) -> jax.Array:
    """Returns `[B, T, ...]` as `[chunks, B, L, ...]`, with zeros at the end of the last chunk.

    Every chunk has tokens of all rows, so that rows may be sharded over devices.
    """
    rows, length, *rest = x.shape
    chunks = -(-length // chunk_length)
    missing = chunks * chunk_length - length
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    return x.reshape(rows, chunks, chunk_length, *rest).swapaxes(0, 1)


def join(x: jax.Array, length: Size) -> jax.Array:
    """Returns the chunks of `split` as `[B, length, ...]`."""
    chunks, rows, chunk_length, *rest = x.shape
    return x.swapaxes(0, 1).reshape(rows, chunks * chunk_length, *rest)[:, :length]


__all__ = ["chunk_length_of", "join", "split"]
