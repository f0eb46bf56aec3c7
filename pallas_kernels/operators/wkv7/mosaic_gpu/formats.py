"""Bfloat16 or float16: the kernels choose for each chunk what its numbers are.

Tensor cores are as fast with either. Float16 has eight times the precision and a small range.
`outputs` chooses it for chunks that forget little and whose numbers are within the range. The
gradients of a chunk may take it if `outputs` did.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.registers import uniform
from pallas_kernels.hopper.target import TILE

BFLOAT16, FLOAT16, FLOAT16_BUT_STATE = range(3)
"""All numbers of a chunk are bfloat16; or float16; or float16 but for the state and U."""

A_EXPONENT = 4
"""In the gradients in float16, a is multiplied by 2 to this power, and dW divided by it.

Sums of magnitudes in a column of X are not tested. They are at most 64 times as large as those in a
row, and so products with X^T need the room.
"""


def may_be_float16(K: int) -> bool:
    """Returns whether numbers may be float16. With 128 keys there are no registers for it."""
    return K == TILE


@dataclasses.dataclass(frozen=True)
class Formats:
    """What the numbers of the chunks in a ring are, in shared memory.

    Attributes:
      vector: `[64]` float32, for each slot the format that PREPARE has chosen, then what CARRY has
        made of it, then an exponent. The rest is free.
      slots: number of slots.
    """

    vector: Any
    slots: int

    def choose(self, slot: jax.Array, number: int) -> None:
        """Writes a format that PREPARE has chosen, which is that of CARRY until it changes."""
        self.vector[slot] = self.vector[self.slots + slot] = jnp.float32(number)

    def change(self, slot: jax.Array, number: int) -> None:
        """Writes a format that CARRY has to take instead."""
        self.vector[self.slots + slot] = jnp.float32(number)

    def chosen(self, slot: jax.Array) -> jax.Array:
        """Returns the format that PREPARE has chosen."""
        return uniform(self.vector[slot].astype(jnp.int32))

    def carried(self, slot: jax.Array) -> jax.Array:
        """Returns the format in which CARRY leaves a chunk."""
        return uniform(self.vector[self.slots + slot].astype(jnp.int32))

    def choose_exponent(self, slot: jax.Array, exponent: jax.Array) -> None:
        """Writes the exponent of a chunk."""
        self.vector[2 * self.slots + slot] = exponent

    def exponent(self, slot: jax.Array) -> jax.Array:
        """Returns the exponent of a chunk."""
        return uniform(self.vector[2 * self.slots + slot].astype(jnp.int32))

    def free_entries(self, warpgroup: jax.Array) -> jax.Array:
        """Returns the first of four entries of `vector` that one of two warpgroups may use."""
        return 4 * (self.slots + warpgroup)
