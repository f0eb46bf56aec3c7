"""Rows of tokens in chunks, for which logits are computed one chunk at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.types import Size


def chunk_length_of(shape: tuple[Size, ...], chunk_size: int) -> Size:
    """Returns how many tokens of each row a chunk has.

    All rows together have at most `chunk_size` tokens in a chunk, but each has at least one. Sizes
    may be symbols; then the length is an expression of them.
    """
    rows, length = shape
    most = jax.core.max_dim(1, chunk_size // rows)
    chunks = -(-length // most)
    return -(-length // chunks)


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


def in_chunks(function: Callable[..., Any], chunk_size: int, *arrays: jax.Array) -> Any:
    """Calls a function of tokens for one chunk after another.

    Args:
      function: from arrays `[B, L, ...]` to a pytree of such arrays.
      chunk_size: how many tokens all rows of a chunk have, at most.
      *arrays: `[B, T, ...]`.

    Returns:
      What the function returns for all tokens, `[B, T, ...]`.
    """
    rows, length = arrays[0].shape[:2]
    chunk_length = chunk_length_of((rows, length), chunk_size)
    chunks = tuple(split(x, chunk_length) for x in arrays)
    _, results = jax.lax.scan(lambda _, chunk: (None, function(*chunk)), None, chunks)
    return jax.tree.map(lambda x: join(x, length), results)


__all__ = ["chunk_length_of", "in_chunks", "join", "split"]
