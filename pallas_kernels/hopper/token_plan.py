"""How kernels pass over tokens once: in which order, and with copies that run ahead of the work.

Copies fill a ring of slots in shared memory. Each slot has what a step of the kernel reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.ring import SHARED_MEMORY_BYTES, Ring, slots_that_fit
from pallas_kernels.hopper.target import Target
from pallas_kernels.hopper.token_walk import Step, Walk, blocks_in_order
from pallas_kernels.hopper.whole_tokens import WIDTH, Tokens

MOST_WARPGROUPS = 4
"""Of a block."""

MOST_REGISTERS = 255
"""Of a thread."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel passes over tokens.

    Attributes:
      tokens: vectors of the warpgroups.
      walk: the order of the tokens.
      ring: slots for tokens of shared memory.
      arrays: number of arrays that are copied to the slots.
    """

    tokens: Tokens
    walk: Walk
    ring: Ring
    arrays: int

    @classmethod
    def of(
        cls,
        target: Target,
        x: Float[Array, "B T C"],
        *,
        registers: int,
        arrays: int,
        ahead: int,
        chunk: int,
        idle: int = 0,
        after: int = 0,
        in_order: bool = False,
        in_columns: bool = False,
    ) -> "Plan":
        """Makes a plan for tokens `x`.

        Args:
          target: what the kernel is compiled for.
          x: the tokens.
          registers: about as many as a thread needs.
          arrays: number of arrays that are copied to the slots.
          ahead: most steps that copies are ahead of the work.
          chunk: as for `Walk`, and so are the others.
          idle: steps.
          after: tokens.
          in_order: whether each block has one chunk, as `blocks_in_order` has it. Else there are as
            many blocks as run at once.
          in_columns: whether blocks share tokens, rather than the warpgroups of a block.
        """
        B, T, C = x.shape
        columns = -(-C // WIDTH) if in_columns else 1
        warpgroups = 1 if in_columns else min(MOST_WARPGROUPS, -(-C // WIDTH))
        # The compiler fits a block of many warpgroups into the registers that there are.
        most_blocks = target.blocks_at_once(min(512, registers * warpgroups))
        per_multiprocessor = most_blocks // target.multiprocessors
        tokens = Tokens(B * T, C, most_blocks, warpgroups, columns)
        slot_bytes = arrays * tokens.channels_of_block * x.dtype.itemsize
        room = SHARED_MEMORY_BYTES // per_multiprocessor
        ahead = slots_that_fit(slot_bytes, others=slot_bytes, most=ahead, room=room)
        at_once = max(1, most_blocks // columns)
        blocks = blocks_in_order(B * T, chunk) if in_order else at_once
        walk = Walk(B * T, T, blocks, chunk, idle, after)
        return cls(tokens, walk, Ring(ahead + 1), arrays)

    @property
    def grid(self) -> dict[str, int]:
        """The grid of the kernel."""
        return {"column": self.tokens.columns, "block": self.walk.blocks}

    @property
    def ahead(self) -> int:
        """Number of steps that copies are ahead of the work."""
        return self.ring.slots - 1

    @property
    def _heads(self) -> int:
        return self.tokens.channels // token_tiles.HEAD

    @property
    def _copies_whole_tokens(self) -> bool:
        """Whether each warpgroup copies some of the arrays, or its part of each token.

        All warpgroups start as many copies: before each, a warpgroup's threads wait for each other.
        """
        return self.arrays % self.tokens.warpgroups == 0

    def scratch_types(self, *sums: int) -> dict[str, Any]:
        """Returns the types of the kernel's shared memory and barriers.

        Args:
          *sums: how many vectors are summed at a time, for each time in a step.
        """
        heads = self.tokens.channels_of_block // token_tiles.HEAD
        slots = (self.ring.slots, self.arrays, heads, token_tiles.HEAD)
        copies = self.arrays if self._copies_whole_tokens else self.arrays * self.tokens.warpgroups
        return {
            "slots": plgpu.SMEM(slots, jnp.bfloat16),
            "loaded": self.ring.loaded_type(copies),
            "sums": [self.tokens.scratch_type(count) for count in sums],
            "summed": self.tokens.scratch_barrier_type(),
        }

    def copyable(self, x: Float[Array, "B T C"]) -> jax.Array:
        """Returns tokens as they are copied to slots, in parts that one copy can have."""
        return x.reshape(self.tokens.count, self._heads, token_tiles.HEAD)

    def flat(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns the type of results `[B, T, C]`, as the kernel writes them."""
        return jax.ShapeDtypeStruct((self.tokens.count, self.tokens.channels), dtype)

    def fill(self, fetch: Callable[[jax.Array], None], steps: jax.Array) -> None:
        """Fetches the first steps, into all slots but one."""
        first = jnp.minimum(self.ahead, steps)
        jax.lax.fori_loop(0, first, lambda number, _: fetch(number), None)

    def refill(
        self, fetch: Callable[[jax.Array], None], number: jax.Array, steps: jax.Array
    ) -> None:
        """Fetches a later step into the slot of the step before, which all threads are done with.

        Args:
          fetch: starts the copies of a step.
          number: of this step. All threads have waited for each other in it.
          steps: number of steps.
        """
        plgpu.commit_smem()
        following = number + self.ahead
        pl.when(following < steps)(lambda: fetch(following))

    def copy(self, number: jax.Array, loaded: Any, slots: Any, sources: Sequence[Any]) -> None:
        """Starts the copies of a step; each warpgroup starts some.

        Args:
          number: of the step.
          loaded: the ring's barriers.
          slots: `[slots, arrays, ...]` in shared memory.
          sources: of each array a token in global memory.
        """
        slot, barrier = slots.at[self.ring.slot(number)], self.ring.loaded(loaded, number)
        warpgroups = self.tokens.warpgroups
        if self.tokens.columns > 1:
            self._copy_column(slot, barrier, sources)
            return

        def copy(warpgroup: int) -> None:
            if self._copies_whole_tokens:
                for i in range(warpgroup, self.arrays, warpgroups):
                    plgpu.copy_gmem_to_smem(sources[i], slot.at[i], barrier)
                return
            rows = self.tokens.own_rows(warpgroup, token_tiles.HEAD)
            for i in range(self.arrays):
                plgpu.copy_gmem_to_smem(sources[i].at[rows], slot.at[i, rows], barrier)

        if warpgroups == 1:
            copy(0)
            return
        for warpgroup in range(warpgroups):
            is_this = jax.lax.axis_index("warpgroup") == warpgroup
            pl.when(is_this)(functools.partial(copy, warpgroup))

    def _copy_column(self, slot: Any, barrier: Any, sources: Sequence[Any]) -> None:
        column, last = jax.lax.axis_index("column"), self.tokens.columns - 1
        full = WIDTH // token_tiles.HEAD
        rest = self._heads - last * full

        def copy(heads: int) -> None:
            for i, source in enumerate(sources):
                rows = pl.ds(column * full, heads)
                plgpu.copy_gmem_to_smem(source.at[rows], slot.at[i, pl.ds(0, heads)], barrier)

        if rest == full:
            copy(full)
        else:
            pl.when(column < last)(lambda: copy(full))
            pl.when(column == last)(lambda: copy(rest))

    def load_state(self, state_gmem: Any, step: Step) -> jax.Array:
        """Loads the token before a row if the step reads the row's first token; else zeros."""
        return self.tokens.load(state_gmem, self.walk.state_of(step))


__all__ = ["MOST_REGISTERS", "MOST_WARPGROUPS", "Plan"]
