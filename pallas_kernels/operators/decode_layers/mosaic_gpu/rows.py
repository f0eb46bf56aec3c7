"""Parts of the kernels that work on single rows of a batch."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl


def if_active(active_gmem: Any | None, row: jax.Array) -> Callable[[Callable[[], None]], None]:
    """Returns a decorator that runs a function if the row is active; None means all rows are."""
    if active_gmem is None:
        return lambda function: function()
    return pl.when(active_gmem[row] != 0)


def update_in_place(
    kernel: Callable[..., Any], operands: tuple[Any, ...], state: jax.Array
) -> tuple[Any, jax.Array]:
    """Calls a kernel that reads and overwrites a state.

    Where nothing else reads the old state, the new one takes its memory. The kernel then moves only
    the layer and the rows that it works on.

    Args:
      kernel: takes the operands, then the state as a reference.
      operands: what the kernel only reads.
      state: what the kernel reads and overwrites.

    Returns:
      The kernel's results, and the new state.
    """
    reference = jax.new_ref(state)
    results = kernel(*operands, reference)
    return results, jax.freeze(reference)


__all__ = ["if_active", "update_in_place"]
