"""One token in each head: key update, value residual, WKV recurrence and output correction.

A block of the grid works on one row and one head, in the registers of one warpgroup. It reads the
state once and writes it once; besides, it moves only vectors.

A vector over keys has an entry for each row of the state `[K, V]`, a vector over values has one for
each column. Sums run over rows, so they stay within a warp. The kernel holds a scalar as a vector
over values that repeats it. With the unnormalised removal key kappa and n = 1 / norm(kappa), the
removal key is kk = n kappa. The recurrence

    removed = -S^T kk       S' = decay S + (kk alpha) removed^T + k' v'^T       o = S'^T r

holds kk twice. So the kernel uses kappa in both places and multiplies `removed` by n^2.

The kernel computes what `decode_layers.reference` computes, and calls the same functions where
these take single entries. It writes the norm of the output again, because sums need layouts of the
kernel; tests/pallas_kernels/test_decode_layers.py compares the two.
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
from pallas_kernels.operators.key_update.reference import inverse_norm, replacement_key
from pallas_kernels.operators.value_residual.reference import move_to_first
from pallas_kernels.operators.wkv7.log_decay import log_decay_from_logits


class Vectors(NamedTuple):
    """The results of the projections, each `[padded rows, C]` in 16 bits.

    Attributes:
      r: receptance.
      k: key.
      v: value.
      v_first: value of the first layer.
      decay: logits of the decay, without their base.
      alpha: logits of alpha, without their base.
      value_residual: logits of the value residual, without their base.
      gate: factor on the output.
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
    """Weights of all layers, each `[layers, C]`, where the channels of a head are neighbours.

    Attributes:
      decay_base: `LayerWeights.decay_base`.
      alpha_base: `LayerWeights.alpha_base`.
      value_residual_base: `LayerWeights.value_residual_base`.
      removal_scale: `LayerWeights.removal_scale`.
      replacement_mix: `LayerWeights.replacement_mix`.
      bonus: `LayerWeights.bonus`.
      norm_scale: `LayerWeights.head_norm_scale`.
      norm_bias: `LayerWeights.head_norm_bias`.
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
    """Runs the kernel.

    Args:
      target: what the kernel is compiled for.
      layer: `[1]` int32, the number of the layer.
      vectors: the results of the projections.
      weights: weights of all layers.
      wkv: `[layers, B, H, 64, 64]` float32, the states.
      active: `[B]` int32, 0 for rows whose state must not change; None means all change.
      eps: added to the variance in the norm of the output.

    Returns:
      The corrected outputs, `[padded rows, C]`, which the output projection reads; the new states.
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

        # All loads come before all stores, so that no load waits for a store.
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
        v = move_to_first(v, v_first, residual)
        removal = k * removal_scale
        k = replacement_key(k, alpha, replacement_mix)

        n = inverse_norm(_sum(removal * removal))
        removed = -n * n * read(state, removal)
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
    """Repeats a vector over keys for each value."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(keys, (TILE, TILE), [0]), STATE)


def _sum(keys: jax.Array) -> jax.Array:
    """Returns the sum of a vector over keys, as a vector over values."""
    return jnp.sum(_repeat(keys), axis=0)


__all__ = ["HeadWeights", "Vectors", "heads"]
