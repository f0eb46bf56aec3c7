"""The layer norm and its gradients on Hopper GPUs, each in one pass over memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.target import target_in_context
from pallas_kernels.hopper.token_walk import blocks_in_order
from pallas_kernels.hopper.whole_tokens import WIDTH, Tokens
from pallas_kernels.operators.layer_norm.reference import Cotangents, of_norm_and_input

_VECTORS_OF_BLOCK = 8
"""Vectors of all tokens of a block of the forward. With few, the next tokens begin in order."""

_VECTORS_AT_ONCE = 2
"""Vectors that a block of the backward works on at a time."""


def layer_norm_mosaic_gpu(
    x: Float[Array, "B T C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, eps: float
) -> Float[Array, "B T C"]:
    """Computes `pallas_kernels.layer_norm`, which documents the arguments.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    token_tiles.check_served(x=x)
    B, T, C = x.shape
    most_blocks = blocks_in_order(B * T, max(1, _VECTORS_OF_BLOCK // -(-C // WIDTH)))
    tokens = Tokens(B * T, C, most_blocks, in_order=True)

    def body(x_gmem, scale_gmem, bias_gmem, output_gmem, *scratch):
        scale, bias = tokens.load_parameter(scale_gmem), tokens.load_parameter(bias_gmem)

        def normalize(positions, _):
            loaded = [tokens.load(x_gmem, position) for position in positions]
            totals = tokens.sum_channels(scratch[0], loaded)
            centered = [_center(tokens, *pair) for pair in zip(loaded, totals, strict=True)]
            squares = tokens.sum_channels(scratch[1], [x * x for x in centered])
            for position, x, square in zip(positions, centered, squares, strict=True):
                normed = x * jax.lax.rsqrt(square * (1 / C) + eps)
                tokens.store(output_gmem, position, normed * scale + bias)

        tokens.for_each(normalize, None)

    kernel = target_in_context().kernel(
        body,
        name="layer_norm",
        out_type=jax.ShapeDtypeStruct((tokens.count, tokens.channels), x.dtype),
        grid=tokens.grid,
        scratch_types=[tokens.scratch_type(tokens.at_once)] * 2,
    )
    output = kernel(x.reshape(tokens.count, -1), *_parameters(scale, bias))
    return output.reshape(x.shape)


def layer_norm_backward_mosaic_gpu(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    cotangents: Cotangents,
    eps: float,
) -> tuple[Float[Array, "B T C"], Float[Array, " C"], Float[Array, " C"]]:
    """Returns the gradients of x, scale and bias, for `layer_norm` and `pre_norm`.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    token_tiles.check_served(x=x)
    target = target_in_context()
    doutput, dinput = of_norm_and_input(cotangents)
    B, T, C = x.shape
    registers = 128 if C <= _VECTORS_AT_ONCE * WIDTH else 256  # four blocks run at once, or two
    tokens = Tokens(B * T, C, target.blocks_at_once(registers), vectors=_VECTORS_AT_ONCE)
    count = tokens.at_once

    def body(x_gmem, scale_gmem, gradients_gmem, dx_gmem, dscale_gmem, dbias_gmem, *scratch):
        scale = tokens.load_parameter(scale_gmem)
        doutput_gmem, dinput_gmem = gradients_gmem

        def add_tokens(positions, totals):
            dscale, dbias = totals
            loaded = [tokens.load(x_gmem, position) for position in positions]
            doutput = [tokens.load(doutput_gmem, position) for position in positions]
            dnormed = [gradient * scale for gradient in doutput]
            sums = tokens.sum_channels(scratch[0], loaded + dnormed)
            centered = [_center(tokens, *pair) for pair in zip(loaded, sums[:count], strict=True)]
            dots = [x * gradient for x, gradient in zip(centered, dnormed, strict=True)]
            squares = tokens.sum_channels(scratch[1], [x * x for x in centered] + dots)
            if dinput_gmem is not None:  # all loads before the first store
                dinput = [tokens.load(dinput_gmem, position) for position in positions]
            for n, position in enumerate(positions):
                factor = jax.lax.rsqrt(squares[n] * (1 / C) + eps)
                normed = centered[n] * factor
                # The gradient of x has neither a mean nor a part along x.
                mean, share = sums[count + n] * (1 / C), factor * squares[count + n] * (1 / C)
                dx = factor * (dnormed[n] - mean - normed * share)
                if dinput_gmem is not None:
                    dx += dinput[n]
                tokens.store(dx_gmem, position, dx)
                dscale, dbias = dscale + doutput[n] * normed, dbias + doutput[n]
            return dscale, dbias

        totals = tokens.for_each(add_tokens, (tokens.zeros(),) * 2)
        block = jax.lax.axis_index("block")
        for gmem, total in zip((dscale_gmem, dbias_gmem), totals, strict=True):
            tokens.store_sums(gmem.at[block], total)

    partial_sums = jax.ShapeDtypeStruct((tokens.blocks, C), jnp.float32)
    kernel = target.kernel(
        body,
        name="layer_norm_backward",
        out_type=(jax.ShapeDtypeStruct((tokens.count, C), x.dtype), partial_sums, partial_sums),
        grid=tokens.grid,
        scratch_types=[tokens.scratch_type(2 * count)] * 2,
    )
    x_tokens, *gradients = (
        None if of is None else of.reshape(tokens.count, C) for of in (x, doutput, dinput)
    )
    dx, dscale, dbias = kernel(x_tokens, *_parameters(scale), gradients)
    return dx.reshape(x.shape), dscale.sum(0), dbias.sum(0)


def _center(tokens: Tokens, x: jax.Array, total: jax.Array) -> jax.Array:
    """Returns a token minus its mean. Channels of padding get zeros again, so they do not count."""
    return tokens.mask(x - total * (1 / tokens.channels))


def _parameters(*parameters: Float[Array, " C"]) -> tuple[Float[Array, " C"], ...]:
    return tuple(x.astype(jnp.float32) for x in parameters)


__all__ = ["layer_norm_backward_mosaic_gpu", "layer_norm_mosaic_gpu"]
