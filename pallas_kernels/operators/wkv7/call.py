"""The arguments of a WKV call, as implementations take them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.sharding import Layout, vary_alike
from pallas_kernels.types import FloatArray, Precision, SegmentIds


class WKVInputs(NamedTuple):
    """The arrays with a vector for each token and head; also their gradients, or references.

    Attributes:
      r: `[B, T, H, K]`, receptance.
      log_decay: `[B, T, H, K]`, <= 0; a channel's decay is its exponential.
      k: `[B, T, H, K]`, the key that writes.
      v: `[B, T, H, V]`, value.
      a: `[B, T, H, K]`, reads what is to be removed.
      b: `[B, T, H, K]`, where it is removed.
    """

    r: Any
    log_decay: Any
    k: Any
    v: Any
    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WKVCall:
    """What a call of `wkv7` or `wkv7_recurrent` asks for beside its inputs.

    Attributes:
      scale: a factor on the outputs.
      initial_state: `[B, H, K, V]`, or `[B, N, H, K, V]` with `num_segments`; None means zeros.
      segment_ids: `[B, T]`, or None for one sequence in each row.
      num_segments: N, for one initial and one final state per segment; or None.
      min_log_decay: the least log decay, as the caller promises; None makes no promise.
      precision: of matrix products.
    """

    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    initial_state: FloatArray | None = None
    segment_ids: SegmentIds | None = None
    num_segments: int | None = dataclasses.field(default=None, metadata={"static": True})
    min_log_decay: float | None = dataclasses.field(default=None, metadata={"static": True})
    precision: Precision = dataclasses.field(default=None, metadata={"static": True})

    def with_arrays(
        self, initial_state: FloatArray | None, segment_ids: SegmentIds | None
    ) -> "WKVCall":
        """Returns a call with other arrays."""
        return dataclasses.replace(self, initial_state=initial_state, segment_ids=segment_ids)

    def layout(self) -> Layout:
        """Returns the layout of `inputs, initial_state, segment_ids` and of the results."""
        states = "B H K V" if self.num_segments is None else "B N H K V"
        keys, values = "B T H K", "B T H V"
        inputs = (keys, keys, keys, values, keys, keys)  # of WKVInputs and RecurrentInputs
        return Layout((inputs, states, "B T"), (values, states), independent="B H")


type Results = tuple[Float[Array, "B T H V"], Float[Array, "B *N H K V"]]
"""The outputs, and the final state: one for each row, or one for each of its N segments."""

type Implementation = Callable[[WKVInputs, WKVCall], Results]
"""Computes a call whose arguments have been checked."""


def prepare(
    inputs: WKVInputs, call: WKVCall
) -> tuple[WKVInputs, Float[Array, "B *N H K V"], SegmentIds | None]:
    """Makes a call's arrays simple.

    Returns:
      The inputs with zeros at padding, so that it leaves states alone and its outputs are zero.
      The initial state in the dtype to compute in; zeros for None.
      The segment ids.
    """
    inputs, initial_state, segment_ids = vary_alike(inputs, call.initial_state, call.segment_ids)
    if segment_ids is not None:
        valid = (segment_ids != 0)[:, :, None, None]
        inputs = WKVInputs(*(jnp.where(valid, x, 0) for x in inputs))
    if initial_state is None:
        # Of this product only the shape is used, and over which mesh axes it varies.
        initial_state = jnp.zeros_like(inputs.k[:, 0, :, :, None] * inputs.v[:, 0, :, None])
        if call.num_segments is not None:
            initial_state = jnp.repeat(initial_state[:, None], call.num_segments, axis=1)
    return inputs, initial_state.astype(accumulation_dtype(*inputs)), segment_ids


def tokens_first(x: jax.Array) -> jax.Array:
    """Returns `[B, T, ...]` as `[T, B, ...]`, and the other way round."""
    return jnp.swapaxes(x, 0, 1)


__all__ = ["Implementation", "Results", "WKVCall", "WKVInputs", "prepare", "tokens_first"]
