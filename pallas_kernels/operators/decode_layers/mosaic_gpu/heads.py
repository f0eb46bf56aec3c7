"""All that happens within a head: key update, value residual, the WKV recurrence, correction.

A block of the grid has one row and one head, in the registers of one warpgroup: the state is read
once and written once, and nothing else touches memory but vectors.

Vectors over keys have an entry for each row of the state `[K, V]`, vectors over values for each
column; sums are over rows, which stay within a warp. A number is a vector over values that repeats
it. The normalised removal key kk = kappa n, with n one number, is not formed:

    removed = -S^T kk       S' = exp(w) S + (kk alpha) removed^T + k' v'^T      o = S'^T r

has n^2 as a factor of `removed` instead.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.state_vectors import (
    KEYS,
    STATE,
    VALUES,
    along_keys,
    along_values,
    read,
)
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.operators.decode_layers.mosaic_gpu.rows import if_active, update_in_place
from pallas_kernels.operators.key_update.reference import MIN_NORM
from pallas_kernels.operators.wkv7.log_decay import log_decay_from_logits


class Vectors(NamedTuple):
    """What projections give, each `[padded rows, C]` in 16 bits.

    Attributes:
      r: receptance.
      k: key.
      v: value.
      v_first: that of the first layer.
      decay: logits, without base.
      alpha: likewise.
      value_residual: likewise.
      gate: factor of the output.
    """

    r: jax.Array
    k: jax.Array
    v: jax.Array
    v_first: jax.Array
    decay: jax.Array
    alpha: jax.Array
    value_residual: jax.Array
    gate: jax.Array


class HeadWeights(NamedTuple):
    """Stacked over layers, `[layers, C]`; those of a head are neighbours.

    Attributes:
      decay_base: of the logits.
      alpha_base: likewise.
      value_residual_base: likewise.
      removal_scale: as in `LayerWeights`, and so are the others.
      replacement_mix: likewise.
      bonus: likewise.
      norm_scale: likewise.
      norm_bias: likewise.
    """

    decay_base: jax.Array
    alpha_base: jax.Array
    value_residual_base: jax.Array
    removal_scale: jax.Array
    replacement_mix: jax.Array
    bonus: jax.Array
    norm_scale: jax.Array
    norm_bias: jax.Array


def heads(
    target: Target,
    layer: jax.Array,
    vectors: Vectors,
    weights: HeadWeights,
    wkv: jax.Array,
    active: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """The kernel.

    Args:
      target: what it is compiled for.
      layer: `[1]` int32, which of the stacked weights and states.
      vectors: of the token.
      weights: of the heads.
      wkv: `[layers, B, H, 64, 64]` float32.
      active: `[B]` int32, 0 for rows that leave their state alone, or None.
      eps: of the norm of outputs.

    Returns:
      What the output projection reads, `[padded rows, C]`, and the new states.
    """
    _, B, H, _, _ = wkv.shape
    dtype = vectors.r.dtype

    def body(
        layer_gmem: Any,
        active_gmem: Any | None,
        of_token: Vectors,
        of_head: HeadWeights,
        wkv_gmem: Any,
        y_gmem: Any,
        o_smem: Any,
    ) -> None:
        layer, row, head = layer_gmem[0], jax.lax.axis_index("row"), jax.lax.axis_index("head")
        channels = pl.ds(head * TILE, TILE)

        def of_keys(array, index=row):
            return _load(array.at[index, channels], KEYS)

        def of_values(array, index=row):
            return _load(array.at[index, channels], VALUES)

        def logits(load, array, base):
            return load(array) + load(base, layer)

        # All loads come before all stores, so that none waits for another one.
        state = plgpu.load(wkv_gmem.at[layer, row, head], layout=STATE, optimized=False)
        r, k = of_keys(of_token.r), of_keys(of_token.k)
        decay = logits(of_keys, of_token.decay, of_head.decay_base)
        alpha = logits(of_keys, of_token.alpha, of_head.alpha_base)
        v, v_first = of_values(of_token.v), of_values(of_token.v_first)
        residual = logits(of_values, of_token.value_residual, of_head.value_residual_base)
        removal_scale = of_keys(of_head.removal_scale, layer)
        replacement_mix = of_keys(of_head.replacement_mix, layer)
        bonus = of_keys(of_head.bonus, layer)
        norm_scale = of_values(of_head.norm_scale, layer)
        norm_bias = of_values(of_head.norm_bias, layer)
        gate = of_values(of_token.gate)

        alpha = jax.nn.sigmoid(alpha)
        v = v + (v_first - v) * jax.nn.sigmoid(residual)
        removal = k * removal_scale
        k = k * (1 + (alpha - 1) * replacement_mix)

        norm = jax.lax.rsqrt(jnp.maximum(_sum(removal * removal), MIN_NORM**2))
        removed = -norm * norm * read(state, removal)
        state = (
            along_keys(jnp.exp(log_decay_from_logits(decay)), state) * state
            + along_keys(removal * alpha, state) * along_values(removed, state)
            + along_keys(k, state) * along_values(v, state)
        )
        o = read(state, r)

        @if_active(active_gmem, row)
        def _():
            wkv_gmem[layer, row, head] = state

        o_smem[...] = o
        plgpu.commit_smem()
        repeated = _repeat(plgpu.load(o_smem, layout=KEYS, optimized=False))
        mean = jnp.sum(repeated, axis=0) * (1 / TILE)
        centred = repeated - along_values(mean, repeated)
        variance = jnp.sum(centred * centred, axis=0) * (1 / TILE)
        normed = (o - mean) * jax.lax.rsqrt(variance + eps) * norm_scale + norm_bias
        y_gmem[row, channels] = ((normed + _sum(r * k * bonus) * v) * gate).astype(dtype)

    kernel = target.kernel(
        body,
        name="heads",
        out_type=jax.ShapeDtypeStruct(vectors.r.shape, dtype),
        grid={"head": H, "row": B},
        scratch_types={"o_smem": plgpu.SMEM((TILE,), jnp.float32)},
    )
    return update_in_place(kernel, (layer, active, vectors, weights), wkv)


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _repeat(keys: jax.Array) -> jax.Array:
    """A vector over keys for each value."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(keys, (TILE, TILE), [0]), STATE)


def _sum(keys: jax.Array) -> jax.Array:
    """The sum of a vector over keys, as a vector over values."""
    return jnp.sum(_repeat(keys), axis=0)


__all__ = ["HeadWeights", "Vectors", "heads"]
