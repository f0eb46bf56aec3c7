"""Which row of the batch, which head and which 64 value channels a block of the grid works on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Place(NamedTuple):
    """Which part of the states `[B, H, .., V, ..]` is worked on; each an int32 scalar.

    Attributes:
      row: row of the batch.
      head: head of that row.
      value_block: which 64 of the V value channels.
    """

    row: jax.Array
    head: jax.Array
    value_block: jax.Array


def grid_place() -> Place:
    """Returns the place of this block in a grid with the axes "row", "head" and "value_block"."""
    return Place(*(jax.lax.axis_index(name) for name in Place._fields))


def place_of(index: jax.Array, heads: int, value_blocks: int) -> Place:
    """Returns a place by its index, where value blocks follow one another, then heads, then rows.

    Args:
      index: int32 scalar, from 0.
      heads: number of heads.
      value_blocks: number of blocks of 64 value channels.
    """
    row, index = divide(index, heads * value_blocks)
    return Place(row, *divide(index, value_blocks))


def divide(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Returns quotient and remainder of a number that is not negative."""
    return jax.lax.div(number, jnp.int32(by)), jax.lax.rem(number, jnp.int32(by))


__all__ = ["Place", "divide", "grid_place", "place_of"]
