"""The order in which kernels with a token shift read tokens.

A block of the grid reads chunks of tokens that follow one another. It keeps each token until the
next one has been mixed with it, so that it reads tokens once, and one more before each chunk. In
the backward a token also gets a gradient from the token after it: there the block reads one more
after each chunk, too. Chunks of all blocks lie side by side, so that what is read and written at
about the same time lies close together.

In packed rows padding is read last: the token before in a segment is the one that was read before.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.grid import divide
from pallas_kernels.packing import find_segments
from pallas_kernels.types import SegmentIds

PADDING, STARTS, FIRST, CONTINUES = range(4)
"""Kinds of tokens: padding; before the token there are zeros, the row's state, or a token."""

_MOST_BLOCKS = 2**16 - 1
"""Of a column of a grid."""

_KINDS = 4
_OWN = 4
_PLACES = 8
_NO_TOKEN = -_PLACES


class Step(NamedTuple):
    """What a kernel reads in a step, in one integer: a token's place, its kind, and whose it is."""

    code: jax.Array

    @property
    def place(self) -> jax.Array:
        """Returns the token's index among all tokens of all rows; below 0 if there is none."""
        return jax.lax.shift_right_arithmetic(self.code, jnp.int32(3))

    @property
    def to_copy(self) -> jax.Array:
        """Returns the place of the token, or of some token if there is none."""
        return jnp.maximum(self.place, 0)

    @property
    def is_own(self) -> jax.Array:
        """Returns whether the token is in the chunk, so that the block writes its results."""
        return (self.code & _OWN) != 0

    @property
    def is_token(self) -> jax.Array:
        """Returns whether there is a token that is not padding."""
        return self._kind != PADDING

    @property
    def continues(self) -> jax.Array:
        """Returns whether the token goes on with the segment of the token read before."""
        return self._kind == CONTINUES

    @property
    def is_first(self) -> jax.Array:
        """Returns whether the token is the first one of its row."""
        return self._kind == FIRST

    @property
    def _kind(self) -> jax.Array:
        return self.code & (_KINDS - 1)


def no_step() -> Step:
    """Returns a step without a token."""
    return Step(jnp.int32(_NO_TOKEN))


def blocks_in_order(count: int, most_tokens: int) -> int:
    """Returns the number of blocks that have one chunk each, or as many as a grid may have.

    They start in the order of the tokens, so that what they write at about the same time lies close
    together.

    Args:
      count: number of tokens.
      most_tokens: of a chunk.
    """
    return min(_MOST_BLOCKS, -(-count // most_tokens))


@dataclasses.dataclass(frozen=True)
class Walk:
    """How tokens `[N, C]` are divided into chunks, and chunks among the blocks of a grid.

    Attributes:
      count: N, tokens of all rows.
      length: T, tokens of a row.
      most_blocks: number of blocks, for example as many as the GPU runs at once.
      most_tokens: of a chunk, about.
      idle: number of steps before the first token.
      after: number of tokens that are read after each chunk.
    """

    count: int
    length: int
    most_blocks: int
    most_tokens: int
    idle: int = 0
    after: int = 0

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, such that all blocks have about the same number of chunks."""
        turns = max(1, round(self.count / (self.most_blocks * self.most_tokens)))
        return -(-self.count // (self.most_blocks * turns))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return min(self.most_blocks, -(-self.count // self.chunk))

    @property
    def _steps_of_chunk(self) -> int:
        return 1 + self.chunk + self.after

    def turns(self) -> jax.Array:
        """Returns the number of chunks of this block."""
        last = -(-self.count // self.chunk) - 1 - jax.lax.axis_index("block")
        return jax.lax.div(last, jnp.int32(self.blocks)) + 1

    def steps(self) -> jax.Array:
        """Returns the number of steps of this block."""
        return self.turns() * self._steps_of_chunk + self.idle

    def state_of(self, step: Step) -> jax.Array:
        """Returns the row whose state comes before the token of a step; N if none does."""
        row = jax.lax.div(step.to_copy, jnp.int32(self.length))
        return jnp.where(step.is_first, row, self.count)

    def step(self, number: jax.Array, steps: jax.Array, order_gmem: Any | None) -> Step:
        """Returns what is read in a step.

        Args:
          number: of the step.
          steps: number of steps of this block.
          order_gmem: of `order_of`, in global memory; None if each row is one sequence.
        """
        number, steps = number - self.idle, steps - self.idle
        exists = (number >= 0) & (number < steps)
        return self.step_of_chunk(
            *divide(jnp.maximum(number, 0), self._steps_of_chunk), order_gmem, exists
        )

    def step_of_chunk(
        self,
        turn: jax.Array,
        in_chunk: jax.Array | int,
        order_gmem: Any | None,
        exists: jax.Array | bool = True,
    ) -> Step:
        """Returns what is read in a step of a chunk.

        Args:
          turn: number of the chunk among those of this block.
          in_chunk: number of the step, from 0 for the token before the chunk.
          order_gmem: as for `step`.
          exists: False stands for no token.
        """
        in_chunk = jnp.int32(in_chunk)
        first = (jax.lax.axis_index("block") + turn * self.blocks) * self.chunk
        index = first + in_chunk - 1
        exists &= (index >= 0) & (index < self.count)
        is_own = (in_chunk > 0) & (in_chunk <= self.chunk)
        index = jnp.clip(index, 0, self.count - 1)
        if order_gmem is None:
            in_row = jax.lax.rem(index, jnp.int32(self.length))
            code = index * _PLACES + jnp.where(in_row == 0, FIRST, CONTINUES)
        else:
            code = order_gmem[index]
        code += jnp.where(is_own, jnp.int32(_OWN), jnp.int32(0))
        return Step(jnp.where(exists, code, jnp.int32(_NO_TOKEN)))


def order_of(segment_ids: SegmentIds) -> jax.Array:
    """Returns `[B * T]` int32, the codes of the tokens of packed rows as they are read."""
    segments = find_segments(segment_ids)
    kind = jnp.where(segments.index == 0, FIRST, STARTS)
    kind = jnp.where(segments.start, kind, CONTINUES)
    kind = jnp.where(segments.valid, kind, PADDING)
    place = jnp.arange(segment_ids.size, dtype=jnp.int32).reshape(segment_ids.shape)
    tokens = jnp.cumsum(segments.valid, axis=1, dtype=jnp.int32)
    paddings = jnp.cumsum(~segments.valid, axis=1, dtype=jnp.int32)
    rank = jnp.where(segments.valid, tokens, tokens[:, -1:] + paddings) - 1
    index = place[:, :1] + rank
    codes = (place * _PLACES + kind).reshape(-1)
    return jnp.zeros_like(codes).at[index.reshape(-1)].set(codes, unique_indices=True)


__all__ = ["CONTINUES", "Step", "Walk", "blocks_in_order", "no_step", "order_of"]
