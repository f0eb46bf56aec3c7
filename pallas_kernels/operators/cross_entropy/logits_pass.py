"""Statistics of logits on Hopper GPUs, in one pass over memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper.target import target_in_context
from pallas_kernels.hopper.whole_tokens import LOWEST, WIDTH, Tokens

_AT_ONCE = 4
"""Vectors of logits that are loaded before any of them is worked on."""


def statistics_of_parts(
    logits: Float[Array, "B T parts vocab"], targets: Int[Array, "B T parts"]
) -> tuple[jax.Array, ...]:
    """Returns statistics of parts of the vocabulary, each `[B, T, parts]` float32.

    Args:
      logits: float32.
      targets: counted from the beginning of each part; another part may have them.

    Returns:
      largest: the largest logit.
      total: sum of `exp(logits - largest)`.
      first: position of the largest logit, counted from the beginning of the part; the first of
        equals.
      of_target: logit of the target; 0 if the part does not have it.
    """
    *shape, size = logits.shape
    rows, target = math.prod(shape), target_in_context()
    most_blocks = target.blocks_at_once(registers=112)
    vector = Tokens(count=rows, channels=min(size, WIDTH), most_blocks=most_blocks)
    tail = Tokens(count=rows, channels=size % WIDTH, most_blocks=most_blocks)
    blocks = min(most_blocks, rows)
    whole = size // WIDTH  # vectors
    in_loop = whole - whole % _AT_ONCE

    def body(logits_gmem, targets_gmem, results_gmem, *scratch):
        numbers = vector.channel_numbers()

        def load(of: Tokens, row: jax.Array, first: Any) -> jax.Array:
            x = of.load_parameter(logits_gmem.at[row, pl.ds(first, of.channels)])
            return x + (LOWEST - of.mask(of.zeros() + LOWEST))  # padding is never the largest

        def read_row(i, _):
            row = jax.lax.axis_index("block") + i * blocks

            def read(step, carry):
                firsts = [(step * _AT_ONCE + n) * WIDTH for n in range(_AT_ONCE)]
                return _add_logits(carry, [(load(vector, row, first), first) for first in firsts])

            zeros = vector.zeros()
            start = (zeros + LOWEST, zeros, zeros)
            carry = jax.lax.fori_loop(0, in_loop // _AT_ONCE, read, start)
            rest = [(vector, n * WIDTH) for n in range(in_loop, whole)]
            rest += [(tail, whole * WIDTH)] if tail.channels else []
            if rest:
                carry = _add_logits(carry, [(load(of, row, first), first) for of, first in rest])
            largest, total, where_largest = carry

            (of_all,) = vector.max_channels(scratch[0], [largest])
            first = jnp.where(largest == of_all, -(where_largest + numbers), zeros + LOWEST)
            (first,) = vector.max_channels(scratch[1], [first])
            (total,) = vector.sum_channels(scratch[2], [total * jnp.exp(largest - of_all)])
            token = targets_gmem[row]
            is_here = (token >= 0) & (token < size)
            of_target = logits_gmem[row, jnp.clip(token, 0, size - 1)]
            of_target = zeros + jnp.where(is_here, of_target, jnp.float32(0))
            vector.store_scalars(results_gmem.at[row], (of_all, total, -first, of_target))

        turns = jax.lax.div(rows - 1 - jax.lax.axis_index("block"), jnp.int32(blocks)) + 1
        jax.lax.fori_loop(0, turns, read_row, None)

    kernel = target.kernel(
        body,
        name="logit_statistics",
        out_type=jax.ShapeDtypeStruct((rows, 4), jnp.float32),
        grid={"block": blocks},
        scratch_types=[vector.scratch_type(1)] * 3,
    )
    results = kernel(logits.reshape(rows, size), targets.reshape(rows))
    return tuple(results[:, i].reshape(shape) for i in range(4))


def _add_logits(
    carry: tuple[jax.Array, jax.Array, jax.Array], vectors: list[tuple[jax.Array, Any]]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds vectors of logits to what has been found in those before, channel by channel.

    Args:
      carry: the largest logit; the sum of `exp(logits - largest)`; the position of the first logit
        of the vector that had the largest one.
      vectors: each with the position of its first logit.

    Returns:
      The carry, with these vectors.
    """
    before, total, where_largest = carry
    largest = before
    for x, first in vectors:
        first = jnp.asarray(first, jnp.int32).astype(jnp.float32)
        where_largest = jnp.where(x > largest, first, where_largest)
        largest = jnp.maximum(largest, x)
    total *= jnp.exp(before - largest)
    for x, _ in vectors:
        total += jnp.exp(x - largest)
    return largest, total, where_largest


__all__ = ["statistics_of_parts"]
