"""A ring of slots in shared memory, which copies from global memory fill before they are needed.

Step s of a kernel uses slot `s % slots`. When the step is done with its slot, the copies of step
`s + slots` may start to fill it:

    copies of step s -> barrier `loaded` -> warpgroups work on the slot -> copies of step s + slots

Each slot can also have barriers of its own, by which warpgroups hand it on to each other.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import NotServed

SHARED_MEMORY_BYTES = 224 * 1024
"""Room for slots in a block on an H100 or H200: all but 3 KiB, for vectors and barriers."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Which slot and which barriers a step uses.

    Attributes:
      slots: number of slots.
      in_turn: number of warpgroups that take the steps in turn: warpgroup w waits for the copies of
        steps w, w + in_turn, and so on. A warpgroup must wait for a barrier each time it completes,
        so that it needs barriers that no other warpgroup waits for.
      rings: number of rings that share shared memory and barriers: warpgroups may have one each.
      ring: which of them this one is.
    """

    slots: int
    in_turn: int = 1
    rings: int = 1
    ring: jax.Array | int = 0

    @property
    def all_slots(self) -> int:
        """Number of slots of all rings."""
        return self.rings * self.slots

    def slot(self, step: jax.Array) -> jax.Array:
        """Returns the slot that a step uses."""
        return self._among_all(step, self.slots)

    def next_step(self, step: jax.Array) -> jax.Array:
        """Returns the next step that uses the slot of `step`."""
        return step + self.slots

    def loaded_type(self, copies: int) -> plgpu.Barrier:
        """Returns the type of the barriers that complete when all copies of a step have arrived."""
        return plgpu.Barrier(num_arrivals=copies, num_barriers=self.all_slots * self.in_turn)

    def barrier_type(self) -> plgpu.Barrier:
        """Returns the type of barriers by which one warpgroup hands slots on to others."""
        return plgpu.Barrier(num_barriers=self.all_slots)

    def loaded(self, barriers: Any, step: jax.Array) -> Any:
        """Returns the barrier for the copies of a step, among those of `loaded_type`."""
        return barriers.at[self._among_all(step, self.slots * self.in_turn)]

    def _among_all(self, step: jax.Array, count: int) -> jax.Array:
        """Returns `step % count` plus what the rings before this one take."""
        index = jax.lax.rem(step, jnp.int32(count))
        return index if self.rings == 1 else self.ring * count + index

    def copy(self, step: jax.Array, barriers: Any, copies: Iterable[tuple[Any, Any]]) -> None:
        """Starts copies for a step.

        Args:
          step: fills its slot.
          barriers: of `loaded_type`.
          copies: pairs of a source in global memory and shared memory `[all_slots, ...]`.
        """
        slot, barrier = self.slot(step), self.loaded(barriers, step)
        for gmem, smem in copies:
            plgpu.copy_gmem_to_smem(gmem, smem.at[slot], barrier)

    def for_each_in_turn(
        self, warpgroup: jax.Array, steps: jax.Array | int, work: Callable[[jax.Array], None]
    ) -> None:
        """Calls a function for the steps that one of the `in_turn` warpgroups takes.

        Args:
          warpgroup: number of the warpgroup among them, from 0.
          steps: number of steps of all warpgroups.
          work: gets a step.
        """
        turns = jax.lax.div(steps + (self.in_turn - 1) - warpgroup, jnp.int32(self.in_turn))
        jax.lax.fori_loop(0, turns, lambda turn, _: work(self.in_turn * turn + warpgroup), None)

    def fill(self, fetch: Callable[[jax.Array], None], steps: jax.Array | int) -> None:
        """Fetches the first steps, as many as there are slots, if there are so many."""
        if isinstance(steps, int):
            for step in range(min(self.slots, steps)):
                fetch(jnp.int32(step))
        else:
            first = jnp.minimum(self.slots, steps)
            jax.lax.fori_loop(0, first, lambda step, _: fetch(step), None)

    def refill(
        self, fetch: Callable[[jax.Array], None], step: jax.Array, steps: jax.Array | int
    ) -> None:
        """Fetches the next step that uses the slot of `step`, if there is one.

        Args:
          fetch: starts the copies of a step.
          step: all threads are done with its slot.
          steps: number of steps.
        """
        following = self.next_step(step)
        pl.when(following < steps)(lambda: fetch(following))


def slots_that_fit(
    slot_bytes: int, *, others: int = 0, most: int, room: int = SHARED_MEMORY_BYTES
) -> int:
    """Returns how many slots there is room for, at most `most`.

    Args:
      slot_bytes: size of a slot.
      others: bytes that something else takes of the room.
      most: more are of no use.
      room: bytes of shared memory.

    Raises:
      NotServed: if not even one slot fits.
    """
    slots = min(most, (room - others) // slot_bytes)
    if slots < 1:
        raise NotServed(
            f"mosaic_gpu needs {slot_bytes + others} bytes of shared memory, there are {room}"
        )
    return slots


__all__ = ["SHARED_MEMORY_BYTES", "Ring", "slots_that_fit"]
