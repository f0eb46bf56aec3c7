"""The channel mix with a backward that keeps the inputs and one activation.

The matrix products are XLA's; the token shift is that of any implementation.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.differentiation import KEPT
from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.channel_mix.reference import project_keys, square
from pallas_kernels.operators.token_shift.api import BACKWARD, FORWARD
from pallas_kernels.precision import accumulation_dtype, contract
from pallas_kernels.types import SegmentIds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; it recomputes the mixed tokens and the squares.

    Attributes:
      x: `[B, T, C]`; mixed again, for the gradients of the key weight and of the mix.
      mix: `[C]`; weights the gradients of `x` and of the shifted `x`.
      key_weight: `[C, F]`; carries gradients from the activation to the mixed tokens.
      value_weight: `[F, C]`; carries gradients from the outputs to the activation.
      state: `[B, C]` or None; part of the shifted `x`.
      segment_ids: `[B, T]` or None; say which tokens are neighbours.
      activation: `[B, T, F]`, `relu(mixed @ key_weight)`; saves a matrix product of its size.
    """

    x: jax.Array
    mix: jax.Array
    key_weight: jax.Array
    value_weight: jax.Array
    state: jax.Array | None
    segment_ids: jax.Array | None
    activation: jax.Array


def _mix_tokens(implementation: str, *inputs: Any) -> Any:
    return dispatch("token_shift_mix", FORWARD, implementation, *inputs)


def _forward(
    implementation: str,
    x: Float[Array, "B T C"],
    mix: Float[Array, " C"],
    key_weight: Float[Array, "C F"],
    value_weight: Float[Array, "F C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[tuple[Float[Array, "B T C"], Float[Array, "B C"]], Residuals]:
    (mixed,), new_state = _mix_tokens(implementation, x, mix[None], state, segment_ids)
    activation = checkpoint_name(project_keys(mixed, key_weight), KEPT)
    y = contract("btf,fc->btc", square(activation), value_weight)
    residuals = Residuals(x, mix, key_weight, value_weight, state, segment_ids, activation)
    return (y.astype(x.dtype), new_state), residuals


def _backward(
    implementation: str,
    residuals: Residuals,
    cotangents: tuple[Float[Array, "B T C"], Float[Array, "B C"]],
) -> tuple[
    Float[Array, "B T C"],
    Float[Array, " C"],
    Float[Array, "C F"],
    Float[Array, "F C"],
    Float[Array, "B C"] | None,
    None,
]:
    dy, dnew_state = cotangents
    key_weight, value_weight = residuals.key_weight, residuals.value_weight
    activation = residuals.activation
    shift = (residuals.x, residuals.mix[None], residuals.state, residuals.segment_ids)
    dtype = accumulation_dtype(activation)
    dvalue_weight = contract("btf,btc->fc", square(activation), dy)
    dsquare = contract("btc,fc->btf", dy, value_weight)
    # Where relu is flat the activation is zero, and so is this.
    dkeys = (2 * activation.astype(dtype) * dsquare).astype(activation.dtype)
    (mixed,), _ = _mix_tokens(implementation, *shift)
    dkey_weight = contract("btc,btf->cf", mixed, dkeys)
    dmixed = contract("btf,cf->btc", dkeys, key_weight)
    dx, dmixes, dstate, _ = dispatch(
        "token_shift_mix", BACKWARD, implementation, *shift, cotangents=((dmixed,), dnew_state)
    )
    return (
        dx,
        dmixes[0],
        dkey_weight.astype(key_weight.dtype),
        dvalue_weight.astype(value_weight.dtype),
        dstate,
        None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def channel_mix_with(
    implementation: str,
    x: Float[Array, "B T C"],
    mix: Float[Array, " C"],
    key_weight: Float[Array, "C F"],
    value_weight: Float[Array, "F C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"]]:
    """Computes `pallas_kernels.channel_mix`, which documents the arguments.

    `implementation` is that of the token shift.
    """
    return _forward(implementation, x, mix, key_weight, value_weight, state, segment_ids)[0]


channel_mix_with.defvjp(_forward, _backward)


__all__ = ["channel_mix_with"]
