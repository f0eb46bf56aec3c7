"""Updates the residual stream, normalises it and mixes it with the previous token.

    x'       = x + sum of parts          parts of the last projection: of a time mix or channel mix
    token    = layer_norm(x')
    mixed_m  = token + (before - token) * mixes[m]

A block of the grid works on one row, in the registers of one warpgroup. `token` overwrites
`before`, which is the state of the token shift.

`decode_layers.reference` has the same layer norm, and `token_shift.reference` the same mix. The
kernel writes both again, because it computes in layouts of its own. `test_norm_mix` compares them.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.target import Target
from pallas_kernels.operators.decode_layers.mosaic_gpu.projections import padded_rows
from pallas_kernels.operators.decode_layers.mosaic_gpu.rows import if_active, update_in_place

THREADS = 128


class NormWeights(NamedTuple):
    """Weights of all layers.

    Attributes:
      scale: `[layers, C]`, scale of the norm.
      bias: `[layers, C]`, bias of the norm.
      mixes: `[layers, M, C]`, shares of the previous token.
    """

    scale: jax.Array
    bias: jax.Array
    mixes: jax.Array


def norm_mix(
    target: Target,
    layer: jax.Array,
    x: jax.Array,
    parts: jax.Array,
    weights: NormWeights,
    shift: jax.Array,
    active: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Runs the kernel.

    Args:
      target: what the kernel is compiled for.
      layer: `[1]` int32, the number of the layer.
      x: `[B, C]`, the residual stream; C is a multiple of 256.
      parts: `[splits, padded rows, C]` float32, added to the residual stream.
      weights: weights of the norm and the mixes.
      shift: `[layers, B, C]`, the previous token.
      active: `[B]` int32, 0 for rows whose state must not change; None means all change.
      eps: added to the variance in the norm.

    Returns:
      The new residual stream `[B, C]`, M mixes `[padded rows, C]`, and the new shifts.
    """
    (B, C), dtype = x.shape, x.dtype
    count = weights.mixes.shape[1]
    row_layout = plgpu.Layout.WG_STRIDED((C,), vec_size=4 if C % (4 * THREADS) == 0 else 2)

    def body(
        layer_gmem: Any,
        x_gmem: Any,
        parts_gmem: Any,
        active_gmem: Any | None,
        weights_gmem: NormWeights,
        shift_gmem: Any,
        new_x_gmem: Any,
        *mixed_gmem: Any,
    ) -> None:
        layer, row = layer_gmem[0], jax.lax.axis_index("row")

        def load(ref):
            return plgpu.load(ref, layout=row_layout, optimized=False)

        # All loads come before all stores, so that no load waits for a store.
        parts = [load(parts_gmem.at[split, row]) for split in range(parts_gmem.shape[0])]
        x = load(x_gmem.at[row])
        before = load(shift_gmem.at[layer, row])
        scale, bias = load(weights_gmem.scale.at[layer]), load(weights_gmem.bias.at[layer])
        mixes = [load(weights_gmem.mixes.at[layer, m]) for m in range(count)]

        new_x = (_wide(x) + functools.reduce(operator.add, parts)).astype(dtype)
        centred = _wide(new_x) - jnp.sum(_wide(new_x)) * (1 / C)
        variance = jnp.sum(centred * centred) * (1 / C)
        token = centred * jax.lax.rsqrt(variance + eps) * _wide(scale) + _wide(bias)
        token = token.astype(dtype)

        new_x_gmem[row] = new_x

        @if_active(active_gmem, row)
        def _():
            shift_gmem[layer, row] = token

        difference = _wide(before) - _wide(token)
        for mix, gmem in zip(mixes, mixed_gmem, strict=True):
            gmem[row] = (_wide(token) + difference * _wide(mix)).astype(dtype)

    rows = padded_rows(B)
    kernel = target.kernel(
        body,
        name="norm_mix",
        out_type=(
            jax.ShapeDtypeStruct((B, C), dtype),
            *[jax.ShapeDtypeStruct((rows, C), dtype)] * count,
        ),
        grid={"row": B},
        scratch_types=(),
        reduction_scratch_bytes=1024,
    )
    operands = (layer, x, parts, active, weights)
    (new_x, *mixed), shift = update_in_place(kernel, operands, shift)
    return new_x, mixed, shift


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


__all__ = ["NormWeights", "norm_mix"]
