"""The output correction and its gradients on Hopper GPUs, each in one pass over memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.target import target_in_context
from pallas_kernels.hopper.token_tiles import HEAD, sum_over_heads


class Tokens(NamedTuple):
    """The inputs with tokens: each `[B, T, C]`, or a tile."""

    o: Any
    r: Any
    k: Any
    v: Any
    gate: Any


class Parameters(NamedTuple):
    """The inputs without tokens: each `[C]`, or a tile."""

    bonus: Any
    norm_scale: Any
    norm_bias: Any


class Corrected(NamedTuple):
    """Values between the inputs and the result, as tiles.

    Attributes:
      normed: o with mean 0 and variance 1 over each head.
      factor: `1 / sqrt(variance + eps)`.
      weight: of v.
      corrected: the result before the gate.
    """

    normed: jax.Array
    factor: jax.Array
    weight: jax.Array
    corrected: jax.Array


def _correct(tokens: Tokens, parameters: Parameters, eps: float) -> Corrected:
    centered = tokens.o - sum_over_heads(tokens.o) * (1 / HEAD)
    variance = sum_over_heads(centered * centered) * (1 / HEAD)
    factor = jax.lax.rsqrt(variance + eps)
    normed = centered * factor
    weight = sum_over_heads(tokens.r * tokens.k * parameters.bonus)
    corrected = normed * parameters.norm_scale + parameters.norm_bias + weight * tokens.v
    return Corrected(normed, factor, weight, corrected)


def output_correction_mosaic_gpu(
    o: Float[Array, "B T H V"],
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gate: Float[Array, "B T H V"],
    bonus: Float[Array, "H K"],
    norm_scale: Float[Array, "H V"],
    norm_bias: Float[Array, "H V"],
    *,
    eps: float,
) -> Float[Array, "B T H V"]:
    """Computes `pallas_kernels.output_correction`, which documents the arguments.

    Raises:
      NotServed: for other dtypes than bfloat16, and other heads than those of 64 channels.
    """
    inputs = (o, r, k, v, gate, bonus, norm_scale, norm_bias)
    tokens, parameters = _flatten(inputs)
    target = target_in_context()
    tiles = token_tiles.tiles_of(target, tokens.o, registers=64)

    def body(tokens_gmem, parameters_gmem, output_gmem):
        channels = tiles.channels_of_block()
        parameters = Parameters(*(tiles.load_parameter(x.at[channels]) for x in parameters_gmem))

        def correct(row, positions, _):
            tokens = Tokens(
                *(token_tiles.load(x.at[row, :, channels], positions) for x in tokens_gmem)
            )
            corrected = _correct(tokens, parameters, eps).corrected
            output_row = output_gmem.at[row, :, channels]
            token_tiles.store(output_row, positions, corrected * tokens.gate)

        tiles.for_each(correct, None)

    kernel = target.kernel(
        body,
        name="output_correction",
        out_type=jax.ShapeDtypeStruct(tokens.o.shape, tokens.o.dtype),
        grid=tiles.grid,
        scratch_types=(),
    )
    return kernel(tokens, parameters).reshape(o.shape)


def output_correction_backward_mosaic_gpu(
    o: Float[Array, "B T H V"],
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gate: Float[Array, "B T H V"],
    bonus: Float[Array, "H K"],
    norm_scale: Float[Array, "H V"],
    norm_bias: Float[Array, "H V"],
    *,
    cotangents: Float[Array, "B T H V"],
    eps: float,
) -> tuple[Float[Array, "..."], ...]:
    """Returns the gradients of the eight inputs of `pallas_kernels.output_correction`.

    Raises:
      NotServed: for other dtypes than bfloat16, and other heads than those of 64 channels.
    """
    inputs = (o, r, k, v, gate, bonus, norm_scale, norm_bias)
    tokens, parameters = _flatten(inputs)
    doutput = cotangents.reshape(tokens.o.shape)
    target = target_in_context()
    tiles = token_tiles.tiles_of(target, tokens.o, registers=156)

    def body(tokens_gmem, parameters_gmem, doutput_gmem, *gradients_gmem):
        dtokens_gmem, dparameters_gmem = gradients_gmem[:5], gradients_gmem[5:]
        channels = tiles.channels_of_block()
        parameters = Parameters(*(tiles.load_parameter(x.at[channels]) for x in parameters_gmem))

        def add_tokens(row, positions, totals):
            *tokens, doutput = (
                token_tiles.load(x.at[row, :, channels], positions)
                for x in (*tokens_gmem, doutput_gmem)
            )
            dtokens, dparameters = _gradients(Tokens(*tokens), parameters, doutput, eps)
            for gmem, gradient in zip(dtokens_gmem, dtokens, strict=True):
                token_tiles.store(gmem.at[row, :, channels], positions, gradient)
            return tuple(x + y for x, y in zip(totals, dparameters, strict=True))

        totals = tiles.for_each(add_tokens, (tiles.zeros(),) * len(parameters))
        split = jax.lax.axis_index("split")
        for gmem, total in zip(dparameters_gmem, totals, strict=True):
            token_tiles.store_sums(gmem.at[split, :, channels], total)

    kernel = target.kernel(
        body,
        name="output_correction_backward",
        out_type=(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens),
            *(tiles.partial_sums() for _ in parameters),
        ),
        grid=tiles.grid,
        scratch_types=(),
    )
    gradients = kernel(tokens, parameters, doutput)
    sums = (x.sum((0, 1)) for x in gradients[5:])
    return tuple(
        gradient.reshape(x.shape)
        for gradient, x in zip((*gradients[:5], *sums), inputs, strict=True)
    )


def _gradients(
    tokens: Tokens, parameters: Parameters, doutput: jax.Array, eps: float
) -> tuple[Tokens, Parameters]:
    """Returns the gradients as tiles; those of the parameters are not summed over tokens yet."""
    normed, factor, weight, corrected = _correct(tokens, parameters, eps)
    dcorrected = doutput * tokens.gate
    dweight = sum_over_heads(dcorrected * tokens.v)
    dnormed = dcorrected * parameters.norm_scale
    # The gradient of o has neither a mean nor a part along o: those would not change normed.
    along = sum_over_heads(dnormed * normed) * (1 / HEAD)
    mean = sum_over_heads(dnormed) * (1 / HEAD)
    of_weight = dweight * parameters.bonus
    dtokens = Tokens(
        o=factor * (dnormed - mean - normed * along),
        r=of_weight * tokens.k,
        k=of_weight * tokens.r,
        v=dcorrected * weight,
        gate=doutput * corrected,
    )
    return dtokens, Parameters(dweight * tokens.r * tokens.k, dcorrected * normed, dcorrected)


def _flatten(inputs: Sequence[jax.Array]) -> tuple[Tokens, Parameters]:
    """Returns the inputs with heads and channels in one axis, the parameters in float32."""
    B, T, H, _ = inputs[0].shape
    token_tiles.check_heads(**dict(zip(Tokens._fields, inputs[:5], strict=True)))
    return (
        Tokens(*(x.reshape(B, T, H * HEAD) for x in inputs[:5])),
        Parameters(*(x.astype(jnp.float32).reshape(H * HEAD) for x in inputs[5:])),
    )


__all__ = ["output_correction_backward_mosaic_gpu", "output_correction_mosaic_gpu"]
