"""The layer norm and its gradients on Hopper GPUs, each in one pass over memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.target import Target, target_in_context
from pallas_kernels.hopper.whole_tokens import Tokens
from pallas_kernels.operators.layer_norm.reference import Cotangents, of_norm_and_input


def _tokens_of(target: Target, x: Float[Array, "B T C"], *, registers: int) -> Tokens:
    B, T, C = x.shape
    return Tokens(count=B * T, channels=C, most_blocks=target.blocks_at_once(registers))


def _normalize(
    tokens: Tokens, scratch: Sequence[Any], x: Sequence[jax.Array], eps: float
) -> list[tuple[jax.Array, jax.Array]]:
    """Returns for each token its values with mean 0 and variance 1, and the factor of them."""
    C = tokens.channels
    totals = tokens.sum_channels(scratch[0], x)
    # Channels of padding get zeros again, so that they do not count.
    centered = [tokens.mask(x - total * (1 / C)) for x, total in zip(x, totals, strict=True)]
    squares = tokens.sum_channels(scratch[1], [x * x for x in centered])
    factors = [jax.lax.rsqrt(square * (1 / C) + eps) for square in squares]
    return [(x * factor, factor) for x, factor in zip(centered, factors, strict=True)]


def layer_norm_mosaic_gpu(
    x: Float[Array, "B T C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, eps: float
) -> Float[Array, "B T C"]:
    """Computes `pallas_kernels.layer_norm`, which documents the arguments.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    token_tiles.check_served(x=x)
    target = target_in_context()
    tokens = _tokens_of(target, x, registers=80)

    def body(x_gmem, scale_gmem, bias_gmem, output_gmem, *scratch):
        scale, bias = tokens.load_parameter(scale_gmem), tokens.load_parameter(bias_gmem)

        def normalize(positions, _):
            x = [tokens.load(x_gmem, position) for position in positions]
            normalized = _normalize(tokens, scratch, x, eps)
            for position, (normed, _) in zip(positions, normalized, strict=True):
                tokens.store(output_gmem, position, normed * scale + bias)

        tokens.for_each(normalize, None)

    kernel = target.kernel(
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
    # The compiler fits the kernel into so many registers: three blocks run at once, or two.
    few = x.shape[-1] <= (3072 if dinput is None else 1024)
    tokens = _tokens_of(target, x, registers=168 if few else 256)
    C, count = tokens.channels, tokens.at_once

    def body(x_gmem, scale_gmem, gradients_gmem, dx_gmem, dscale_gmem, dbias_gmem, *scratch):
        scale = tokens.load_parameter(scale_gmem)
        doutput_gmem, dinput_gmem = gradients_gmem

        def add_tokens(positions, totals):
            dscale, dbias = totals
            x = [tokens.load(x_gmem, position) for position in positions]
            doutput = [tokens.load(doutput_gmem, position) for position in positions]
            normalized = _normalize(tokens, scratch, x, eps)
            dnormed = [gradient * scale for gradient in doutput]
            along = [
                gradient * normed for gradient, (normed, _) in zip(dnormed, normalized, strict=True)
            ]
            sums = tokens.sum_channels(scratch[2], dnormed + along)
            if dinput_gmem is not None:  # all loads before the first store
                dinput = [tokens.load(dinput_gmem, position) for position in positions]
            for n, (normed, factor) in enumerate(normalized):
                # The gradient of x has neither a mean nor a part along x.
                mean, share = sums[n] * (1 / C), sums[count + n] * (1 / C)
                dx = factor * (dnormed[n] - mean - normed * share)
                if dinput_gmem is not None:
                    dx += dinput[n]
                tokens.store(dx_gmem, positions[n], dx)
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
        scratch_types=[tokens.scratch_type(n * count) for n in (1, 1, 2)],
    )
    x_tokens, *gradients = (
        None if of is None else of.reshape(tokens.count, C) for of in (x, doutput, dinput)
    )
    dx, dscale, dbias = kernel(x_tokens, *_parameters(scale), gradients)
    return dx.reshape(x.shape), dscale.sum(0), dbias.sum(0)


def _parameters(*parameters: Float[Array, " C"]) -> tuple[Float[Array, " C"], ...]:
    return tuple(x.astype(jnp.float32) for x in parameters)


__all__ = ["layer_norm_backward_mosaic_gpu", "layer_norm_mosaic_gpu"]
