"""Rows of tokens that are divided over the devices of a mesh axis.

Device i of n has the i-th of n equal pieces of each row. Operators with a `context_axis` are called
in `jax.shard_map`, where they exchange what a piece hands on to the next ones: its last token, or
what it makes of a state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sharding import Axes, vary_alike
from pallas_kernels.types import SegmentIds, Size
from pallas_kernels.validation import is_known

type ContextAxis = str | Axes
"""The name of a mesh axis, or several, which count as one, the first as the outermost."""


def check_context_axis(operator: str, context_axis: Any, shape: tuple[Size, ...]) -> None:
    """Checks that a mesh axis is one of the `jax.shard_map` that the call is in.

    Args:
      operator: its name, for messages.
      context_axis: what the caller gave.
      shape: `[B, T, ...]`, of this device's tokens.

    Raises:
      ValueError: naming the axis and those that there are; or the shape, if it has symbols.
    """
    if not all(map(is_known, shape)):
        raise ValueError(
            f"{operator}: {context_axis=} needs sizes that are numbers, got {shape=}: JAX cannot "
            "export what moves between devices for symbols"
        )
    names = context_axis if isinstance(context_axis, tuple) else (context_axis,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not names or not all(name in manual for name in names):
        raise ValueError(
            f"{operator}: {context_axis=} must name a mesh axis of the jax.shard_map around the "
            f"call, which has {manual}, or an Auto axis of the mesh in context (jax.set_mesh)"
        )


def is_device(index: int | jax.Array, axis: ContextAxis) -> jax.Array:
    """Returns, as a boolean scalar, whether this device has an index on the axis.

    A negative index counts from the end: -1 is the last device.
    """
    index = index + jax.lax.axis_size(axis) if index < 0 else index
    return jax.lax.axis_index(axis) == index


def own(values: Any, axis: ContextAxis) -> Any:
    """Returns this device's entries of a pytree of arrays `[n, ...]`, one entry per device."""
    return jax.tree.map(lambda x: x[jax.lax.axis_index(axis)], values)


def from_device(x: jax.Array, index: int, axis: ContextAxis) -> jax.Array:
    """Returns the `x` of the device with this index, on all devices; -1 is the last device."""
    return jax.lax.psum(jnp.where(is_device(index, axis), x, jnp.zeros_like(x)), axis)


def find_entries(segment_ids: Int[Array, "m B L"], axis: ContextAxis) -> Bool[Array, "m B"]:
    """Finds which pieces go on with the state that the rows had before.

    A piece does so if it has no tokens, if no piece before has any, and if its first segment began
    in a piece before.

    Args:
      segment_ids: integers of the m pieces of this device; 0 is padding.
      axis: the mesh axis.

    Returns:
      For each piece and row, whether the state before the piece enters its first segment.
    """
    valid = segment_ids != 0
    position = jnp.arange(segment_ids.shape[2], dtype=jnp.int32)[None, None]
    first, last = (
        jnp.take_along_axis(segment_ids, x[..., None], axis=2)[..., 0]  # 0 if there is no token
        for x in (jnp.argmax(valid, axis=2), jnp.where(valid, position, 0).max(axis=2))
    )

    def step(before: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, last = ends
        enters = (first == 0) | (before == 0) | (before == first)
        return jnp.where(last == 0, before, last), enters

    ends = jax.lax.all_gather((first, last), axis)  # [n, m, B]
    joined = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), ends)
    _, enters = jax.lax.scan(step, jnp.zeros_like(first[0]), joined)
    return own(enters.reshape(ends[0].shape), axis)


def token_before(
    x: Float[Array, "B T C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    axis: ContextAxis,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Returns what a token shift needs of other devices.

    Args:
      x: this device's piece of the rows.
      state: the token before each row's first one, on all devices; None means zeros.
      segment_ids: of this device's piece.
      axis: the mesh axis.

    Returns:
      The token before each row's first one of this piece; zero where a segment begins there.
      The last token of each whole row that is not padding; `state` where all are padding.
    """
    x, segment_ids = vary_alike(x, segment_ids)
    if segment_ids is None:
        return state_before(x[:, -1], state, segment_ids, axis)
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(segment_ids != 0, position, 0).max(axis=1)
    token = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return state_before(token, state, segment_ids, axis)


def state_before(
    last: Float[Array, "B C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    axis: ContextAxis,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Returns what a token shift needs of other devices, as `token_before` does.

    Args:
      last: what is handed on of the last token of each row of this piece that is not padding; not
        used where all are padding.
      state: the same of the token before each row's first one, on all devices; None means zeros.
      segment_ids: of this device's piece.
      axis: the mesh axis.
    """
    initial = jnp.zeros_like(last) if state is None else state
    last, segment_ids, initial = vary_alike(last, segment_ids, initial)
    if segment_ids is None:
        size = jax.lax.axis_size(axis)
        before = jax.lax.ppermute(last, axis, [(i, i + 1) for i in range(size - 1)])
        before = jnp.where(is_device(0, axis), initial, before)
        return before, from_device(last, -1, axis)

    pieces = jax.lax.all_gather((last, (segment_ids != 0).any(axis=1)), axis)

    def step(before: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        token, exists = piece
        return jnp.where(exists[:, None], token, before), before

    new_state, before = jax.lax.scan(step, initial, pieces)
    (enters,) = find_entries(segment_ids[None], axis)
    return jnp.where(enters[:, None], own(before, axis), 0), from_device(new_state, 0, axis)


__all__ = [
    "ContextAxis",
    "check_context_axis",
    "find_entries",
    "from_device",
    "is_device",
    "own",
    "state_before",
    "token_before",
]
