"""The channel mix with a backward that keeps the inputs and one activation."""

import dataclasses

import jax

from pallas_kernels.arrays import accumulation_dtype, contract
from pallas_kernels.operators.channel_mix.reference import (
    channel_mix_reference,
    project_keys,
    square,
)
from pallas_kernels.operators.token_shift import xla as token_shift
from pallas_kernels.operators.token_shift.reference import token_shift_mix_reference
from pallas_kernels.types import FloatArray, SegmentIds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; the mixed tokens and the squares are computed again.

    Attributes:
      shift: x, mix, state and segment ids; for the gradient of the key weight and of themselves.
      key_weight: `[C, F]`; carries gradients from the activation to the mixed tokens.
      value_weight: `[F, C]`; carries gradients from the outputs to the activation.
      activation: `[B, T, F]`, `relu(mixed @ key_weight)`; saves a matrix product of its size.
    """

    shift: token_shift.Residuals
    key_weight: FloatArray
    value_weight: FloatArray
    activation: FloatArray


def _forward(
    x: FloatArray,
    mix: FloatArray,
    key_weight: FloatArray,
    value_weight: FloatArray,
    state: FloatArray | None,
    segment_ids: SegmentIds | None,
) -> tuple[tuple[FloatArray, FloatArray], Residuals]:
    (mixed,), new_state = token_shift_mix_reference(x, mix[None], state, segment_ids)
    activation = project_keys(mixed, key_weight)
    y = contract("btf,fc->btc", square(activation), value_weight)
    shift = token_shift.Residuals(x, mix[None], state, segment_ids)
    residuals = Residuals(shift, key_weight, value_weight, activation)
    return (y.astype(x.dtype), new_state), residuals


def _backward(
    residuals: Residuals, cotangents: tuple[FloatArray, FloatArray]
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray | None, None]:
    dy, dnew_state = cotangents
    key_weight, value_weight = residuals.key_weight, residuals.value_weight
    activation, shift = residuals.activation, residuals.shift
    dtype = accumulation_dtype(activation)
    dvalue_weight = contract("btf,btc->fc", square(activation), dy)
    dsquare = contract("btc,fc->btf", dy, value_weight)
    # Where relu is flat the activation is zero, and so is this.
    dkeys = (2 * activation.astype(dtype) * dsquare).astype(activation.dtype)
    (mixed,), _ = token_shift_mix_reference(shift.x, shift.mixes, shift.state, shift.segment_ids)
    dkey_weight = contract("btc,btf->cf", mixed, dkeys)
    dmixed = contract("btf,cf->btc", dkeys, key_weight)
    dx, dmixes, dstate, _ = token_shift.token_shift_mix_backward(shift, ((dmixed,), dnew_state))
    return (
        dx,
        dmixes[0],
        dkey_weight.astype(key_weight.dtype),
        dvalue_weight.astype(value_weight.dtype),
        dstate,
        None,
    )


channel_mix_xla = jax.custom_vjp(channel_mix_reference)
channel_mix_xla.defvjp(_forward, _backward)
