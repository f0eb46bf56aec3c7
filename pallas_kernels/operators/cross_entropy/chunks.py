"""Rows of tokens in chunks, for which logits are computed one chunk at a time."""

import math

import jax
import jax.numpy as jnp


def chunk_length_of(shape: tuple[int, ...], chunk_size: int) -> int:
    """Returns how many tokens of each row a chunk has, for at most `chunk_size` in all rows."""
    rows, length = shape
    chunks = math.ceil(length / max(1, chunk_size // rows))
    return math.ceil(length / chunks)


def split(x: jax.Array, chunk_length: int) -> jax.Array:
    """Returns `[B, T, ...]` as `[chunks, B, L, ...]`, with zeros at the end of the last chunk.

    Every chunk has tokens of all rows, so that rows may be sharded over devices.
    """
    rows, length, *rest = x.shape
    chunks = math.ceil(length / chunk_length)
    missing = chunks * chunk_length - length
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    return x.reshape(rows, chunks, chunk_length, *rest).swapaxes(0, 1)


def join(x: jax.Array, length: int) -> jax.Array:
    """Returns the chunks of `split` as `[B, length, ...]`."""
    chunks, rows, chunk_length, *rest = x.shape
    return x.swapaxes(0, 1).reshape(rows, chunks * chunk_length, *rest)[:, :length]


__all__ = ["chunk_length_of", "join", "split"]
