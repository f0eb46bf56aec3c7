"""The channel mix with a backward that keeps the inputs and one activation.

The token shift, and the products that make inner channels, are those of any implementation; the
other products are XLA's. All round their results to the dtype of their operands: in float32 the
inner channels, the largest arrays of the model, would pass through memory in twice the bytes.

Of the inner channels only the squares are kept: `relu(keys)` is their root, and each rounding of a
square to bfloat16 changes the root by half as much.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.differentiation import KEPT
from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.channel_mix.mosaic_gpu import (
    key_gradients_mosaic_gpu,
    squares_of_keys_mosaic_gpu,
)
from pallas_kernels.operators.channel_mix.products import key_gradients, squares_of_keys
from pallas_kernels.operators.token_shift.api import BACKWARD, FORWARD
from pallas_kernels.types import SegmentIds

SQUARES_OF_KEYS = {"mosaic_gpu": squares_of_keys_mosaic_gpu, "xla": squares_of_keys}
KEY_GRADIENTS = {"mosaic_gpu": key_gradients_mosaic_gpu, "xla": key_gradients}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; it recomputes the mixed tokens.

    Attributes:
      x: `[B, T, C]`; mixed again, for the gradients of the key weight and of the mix.
      mix: `[C]`; weights the gradients of `x` and of the shifted `x`. None if x is mixed already.
      key_weight: `[C, F]`; carries gradients from the activation to the mixed tokens.
      value_weight: `[F, C]`; carries gradients from the outputs to the activation.
      state: `[B, C]` or None; part of the shifted `x`.
      segment_ids: `[B, T]` or None; say which tokens are neighbours.
      squares: `[B, T, F]`, `relu(mixed @ key_weight)^2`; saves a matrix product of its size.
    """

    x: jax.Array
    mix: jax.Array | None
    key_weight: jax.Array
    value_weight: jax.Array
    state: jax.Array | None
    segment_ids: jax.Array | None
    squares: jax.Array


def _mix_tokens(
    implementation: str,
    x: Float[Array, "B T C"],
    mix: Float[Array, " C"] | None,
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"] | None]:
    """Returns the mixed tokens and the new state."""
    if mix is None:
        return x, None
    inputs = (x, mix[None], state, segment_ids)
    (mixed,), new_state = dispatch("token_shift_mix", FORWARD, implementation, *inputs)
    return mixed, new_state


def _forward(
    implementation: str,
    x: Float[Array, "B T C"],
    mix: Float[Array, " C"] | None,
    key_weight: Float[Array, "C F"],
    value_weight: Float[Array, "F C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[tuple[Float[Array, "B T C"], Float[Array, "B C"] | None], Residuals]:
    mixed, new_state = _mix_tokens(implementation, x, mix, state, segment_ids)
    squares = checkpoint_name(SQUARES_OF_KEYS[implementation](mixed, key_weight), KEPT)
    y = jnp.einsum("btf,fc->btc", squares, value_weight)
    residuals = Residuals(x, mix, key_weight, value_weight, state, segment_ids, squares)
    return (y, new_state), residuals


def _backward(
    implementation: str,
    residuals: Residuals,
    cotangents: tuple[Float[Array, "B T C"], Float[Array, "B C"] | None],
) -> tuple[
    Float[Array, "B T C"],
    Float[Array, " C"] | None,
    Float[Array, "C F"],
    Float[Array, "F C"],
    Float[Array, "B C"] | None,
    None,
]:
    dy, dnew_state = cotangents
    key_weight, value_weight = residuals.key_weight, residuals.value_weight
    squares = residuals.squares
    x, mix = residuals.x, residuals.mix
    dvalue_weight = jnp.einsum("btf,btc->fc", squares, dy)
    dkeys = KEY_GRADIENTS[implementation](dy, value_weight, squares)
    mixed, _ = _mix_tokens(implementation, x, mix, residuals.state, residuals.segment_ids)
    dkey_weight = jnp.einsum("btc,btf->cf", mixed, dkeys)
    dmixed = jnp.einsum("btf,cf->btc", dkeys, key_weight)
    if mix is None:
        return dmixed, None, dkey_weight, dvalue_weight, None, None
    dx, dmixes, dstate, _ = dispatch(
        "token_shift_mix",
        BACKWARD,
        implementation,
        *(x, mix[None], residuals.state, residuals.segment_ids),
        cotangents=((dmixed,), dnew_state),
    )
    return (
        dx.astype(x.dtype),
        dmixes[0].astype(mix.dtype),
        dkey_weight,
        dvalue_weight,
        dstate,
        None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def channel_mix_with(
    implementation: str,
    x: Float[Array, "B T C"],
    mix: Float[Array, " C"] | None,
    key_weight: Float[Array, "C F"],
    value_weight: Float[Array, "F C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"] | None]:
    """Computes `pallas_kernels.channel_mix`, which documents the arguments.

    `implementation` is that of the token shift. Without a mix there is none, and no new state.
    """
    return _forward(implementation, x, mix, key_weight, value_weight, state, segment_ids)[0]


channel_mix_with.defvjp(_forward, _backward)


__all__ = ["channel_mix_with"]
