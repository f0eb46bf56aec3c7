"""How the walks over the chunks of all rows are divided among the blocks of the grid."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.grid import Place, divide, place_of


@dataclasses.dataclass(frozen=True)
class Walks:
    """Walks over the chunks of a row, or of a piece of it, for one head and 64 rows of the state.

    There is one block of the grid for each multiprocessor, at most. A block makes every
    `workers`-th of the walks, one after another. The methods are called in a kernel.

    Attributes:
      rows: rows of the batch.
      heads: number of heads.
      value_blocks: number of blocks of 64 rows of the transposed state.
      chunks: number of chunks in a row.
      pieces: into how many pieces a row is divided. If more than one, each block makes one walk.
      walked_pieces: in how many of these pieces, the first ones, walks are made.
      multiprocessors: number of blocks that run at once.
    """

    rows: int
    heads: int
    value_blocks: int
    chunks: int
    pieces: int
    walked_pieces: int
    multiprocessors: int

    @property
    def count(self) -> int:
        """Number of walks of all blocks."""
        return self.rows * self.walked_pieces * self.heads * self.value_blocks

    @property
    def workers(self) -> int:
        """Number of blocks of the grid, whose axis is "block"."""
        return min(self.multiprocessors, self.count)

    def own(self) -> jax.Array:
        """Returns the number of walks of this block."""
        block = jax.lax.axis_index("block")
        return jax.lax.div(self.count - 1 - block, jnp.int32(self.workers)) + 1

    def place(self, walk: jax.Array) -> tuple[Place, jax.Array]:
        """Returns where one of this block's walks takes place, and in which piece of the row."""
        index = jax.lax.axis_index("block") + walk * self.workers
        place, piece = place_of(index, self.heads, self.value_blocks), jnp.int32(0)
        if self.walked_pieces > 1:
            row, piece = divide(place.row, self.walked_pieces)
            place = place._replace(row=row)
        return place, piece

    def first_chunk(self, piece: jax.Array) -> jax.Array:
        """Returns the chunk of the row that a piece begins with."""
        return divide(piece * self.chunks, self.pieces)[0] if self.pieces > 1 else jnp.int32(0)

    def length(self, piece: jax.Array) -> jax.Array | int:
        """Returns the number of chunks in a piece."""
        if self.pieces == 1:
            return self.chunks
        return self.first_chunk(piece + 1) - self.first_chunk(piece)

    def steps(self) -> jax.Array:
        """Returns the number of steps of this block: one for each chunk of each of its walks."""
        if self.pieces == 1:
            return self.own() * self.chunks
        _, piece = self.place(jnp.int32(0))
        return jnp.asarray(self.length(piece))

    def step(self, walk: jax.Array, i: jax.Array) -> jax.Array:
        """Returns the step that is the i-th chunk of a walk."""
        return walk * self.chunks + i

    def chunk_at(self, step: jax.Array) -> tuple[Place, jax.Array]:
        """Returns where a step takes place, and its chunk of the row."""
        walk, i = divide(step, self.chunks)
        place, piece = self.place(walk)
        return place, self.first_chunk(piece) + i
