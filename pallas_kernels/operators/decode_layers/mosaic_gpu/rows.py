"""What kernels that work on single rows of a batch share."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl


def if_active(active_gmem: Any | None, row: jax.Array) -> Callable[[Callable[[], None]], None]:
    """A decorator that runs a function if the row is active; all are if `active_gmem` is None."""
    if active_gmem is None:
        return lambda function: function()
    return pl.when(active_gmem[row] != 0)


def update_in_place(
    kernel: Callable[..., Any], operands: tuple[Any, ...], state: jax.Array
) -> tuple[Any, jax.Array]:
    """Calls a kernel that reads and writes a state.

    Where nobody else needs the state as it was, the new one takes its memory: a kernel then moves
    no more than the layer and the rows it works on.

    Args:
      kernel: takes the operands, then the state as a reference.
      operands: that it only reads.
      state: that it also writes.

    Returns:
      The kernel's results, and the new state.
    """
    reference = jax.new_ref(state)
    results = kernel(*operands, reference)
    return results, jax.freeze(reference)


__all__ = ["if_active", "update_in_place"]
