"""What comes before projections: the residual stream brought up to date, normalised, and mixed.

    x'       = x + sum of parts          what the layer before, or this one's time mix, added
    token    = layer_norm(x')
    mixed_m  = token + (before - token) * mixes[m]

A block of the grid has one row, in the registers of one warpgroup. `before`, the token shift, is
overwritten by `token`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layers.mosaic_gpu.projections import padded_rows
from pallas_kernels.decode_layers.mosaic_gpu.rows import if_active, update_in_place
from pallas_kernels.wkv7.mosaic_gpu.chunk import Plan

THREADS = 128


class NormWeights(NamedTuple):
    """Stacked over layers.

    Attributes:
      scale: `[layers, C]`.
      bias: `[layers, C]`.
      mixes: `[layers, M, C]`.
    """

    scale: jax.Array
    bias: jax.Array
    mixes: jax.Array


def norm_mix(
    plan: Plan,
    layer: jax.Array,
    x: jax.Array,
    parts: jax.Array,
    weights: NormWeights,
    shift: jax.Array,
    active: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """The kernel.

    Args:
      plan: how it is compiled.
      layer: `[1]` int32, which of the stacked weights and states.
      x: `[B, C]`, the residual stream; C is a multiple of 256.
      parts: `[splits, padded rows, C]` float32, what is to be added to it.
      weights: of the norm and the mixes.
      shift: `[layers, B, C]`, the token before.
      active: `[B]` int32, 0 for rows that leave their state alone, or None.
      eps: of the norm.

    Returns:
      The new residual stream `[B, C]`, M mixes `[padded rows, C]`, and the new shifts.
    """
    B, C = x.shape
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
            return plgpu.load(ref, layout=row_layout, optimized=False).astype(jnp.float32)

        added = load(parts_gmem.at[0, row])
        for split in range(1, parts_gmem.shape[0]):
            added = added + load(parts_gmem.at[split, row])
        new_x = (load(x_gmem.at[row]) + added).astype(x.dtype)
        new_x_gmem[row] = new_x
        new_x = new_x.astype(jnp.float32)
        centred = new_x - jnp.sum(new_x) * (1 / C)
        variance = jnp.sum(centred * centred) * (1 / C)
        token = centred * jax.lax.rsqrt(variance + eps)
        token = token * load(weights_gmem.scale.at[layer]) + load(weights_gmem.bias.at[layer])
        token = token.astype(x.dtype)
        before = load(shift_gmem.at[layer, row])

        @if_active(active_gmem, row)
        def _():
            shift_gmem[layer, row] = token

        token = token.astype(jnp.float32)
        difference = before - token
        for m, gmem in enumerate(mixed_gmem):
            mixed = token + difference * load(weights_gmem.mixes.at[layer, m])
            gmem[row] = mixed.astype(x.dtype)

    rows = padded_rows(B)
    kernel = plan.kernel(
        body,
        name="norm_mix",
        out_type=(
            jax.ShapeDtypeStruct((B, C), x.dtype),
            *[jax.ShapeDtypeStruct((rows, C), x.dtype)] * count,
        ),
        grid={"row": B},
        scratch_types=(),
        reduction_scratch_bytes=1024,
    )
    operands = (layer, x, parts, active, weights)
    (new_x, *mixed), shift = update_in_place(kernel, operands, shift)
    return new_x, mixed, shift


__all__ = ["NormWeights", "norm_mix"]
