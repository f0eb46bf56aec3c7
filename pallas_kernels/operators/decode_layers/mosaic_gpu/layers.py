"""One token through all layers on Hopper GPUs: eight kernels per layer.

    norm_mix     residual stream, layer norm, six mixes of token and token before
    projections  receptance, key, value; the first halves of decay, alpha, value residual and gate
    projections  their second halves
    heads        key update, recurrence, output correction
    projection   output                                                     (in parts)
    norm_mix     residual stream, layer norm, mix
    projection   channel key, squared
    projection   channel value                                              (in parts)

All weights and states are read where they lie, stacked over layers: each kernel gets the number of
the layer. Layers are not a loop of the program, so that XLA can launch all kernels of a token at
once, as one CUDA graph.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.target import TILE, Target, target_in_context
from pallas_kernels.operators.decode_layers.mosaic_gpu.heads import HeadWeights, Vectors, heads
from pallas_kernels.operators.decode_layers.mosaic_gpu.norm_mix import NormWeights, norm_mix
from pallas_kernels.operators.decode_layers.mosaic_gpu.projections import (
    Product,
    empty_parts,
    projections,
    split_projection,
)
from pallas_kernels.operators.decode_layers.weights import LAYOUT, MATRICES, LayerWeights
from pallas_kernels.partitioning import partitioned
from pallas_kernels.types import FloatArray, Mask

type States = tuple[jax.Array, jax.Array, jax.Array]


def decode_layers_mosaic_gpu(
    x: FloatArray,
    time_shift: FloatArray,
    wkv: FloatArray,
    channel_shift: FloatArray,
    active: Mask | None,
    weights: LayerWeights,
    *,
    norm_eps: float,
    head_norm_eps: float,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """The operator of `pallas_kernels.decode_layers`, which documents the arguments.

    Raises:
      NotServed: for other dtypes and sizes than the kernels are for.
    """
    check_served(x, wkv, weights)
    return _run(
        x,
        time_shift,
        wkv,
        channel_shift,
        active,
        weights,
        target=target_in_context(),
        norm_eps=norm_eps,
        head_norm_eps=head_norm_eps,
    )


def check_served(x: FloatArray, wkv: FloatArray, weights: LayerWeights) -> None:
    """Raises NotServed for calls that the kernels do not serve on any device."""
    if x.dtype != jnp.bfloat16:
        raise NotServed(f"mosaic_gpu needs bfloat16 inputs, got {x.dtype=}")
    if wkv.dtype != jnp.float32:
        raise NotServed(f"mosaic_gpu needs states in float32, got {wkv.dtype=}")
    if wkv.shape[-1] != TILE:
        raise NotServed(f"mosaic_gpu needs heads of 64, got {wkv.shape=}")
    if x.shape[1] % (4 * TILE):
        raise NotServed(f"mosaic_gpu needs C to be a multiple of 256, got {x.shape=}")
    F = weights.channel_key.shape[-1]
    if F % TILE:
        raise NotServed(f"mosaic_gpu needs F to be a multiple of 64, got {F=}")
    if any(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves((x, wkv, weights))):
        raise NotServed("mosaic_gpu needs check_vma=False in jax.shard_map")
    for name in MATRICES:
        dtype = getattr(weights, name).dtype
        if dtype != x.dtype:
            raise NotServed(
                f"mosaic_gpu needs matrices in {x.dtype=}, got weights.{name} in {dtype}"
            )


def _run_layers(
    x: jax.Array,
    time_shift: jax.Array,
    wkv: jax.Array,
    channel_shift: jax.Array,
    active: jax.Array | None,
    weights: LayerWeights,
    *,
    target: Target,
    norm_eps: float,
    head_norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    # One call after the other, because several could be given one state to write over.
    @jax.custom_batching.sequential_vmap
    def run(x, states, active, weights):
        return run_layers(target, x, states, active, weights, norm_eps, head_norm_eps)

    return run(x, (time_shift, wkv, channel_shift), active, weights)


_run = partitioned(_run_layers, LAYOUT)


def run_layers(
    target: Target,
    x: jax.Array,
    states: States,
    active: jax.Array | None,
    weights: LayerWeights,
    norm_eps: float,
    head_norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the operator, for a call that the kernels serve."""
    weights = weights.with_padded_ranks(TILE)
    active = None if active is None else active.astype(jnp.int32)
    run = jax.jit(
        functools.partial(_run_layer, target, norm_eps=norm_eps, head_norm_eps=head_norm_eps)
    )
    # Where a loop takes operands of a kernel from a stack, XLA (of jax 0.11.2) lets the kernel read
    # them there, and forgets that it overwrites the state. The barrier prevents this.
    x, states, active, weights = jax.lax.optimization_barrier((x, states, active, weights))
    # All layers run the same kernels, so that these are compiled once. The first layer adds zeros
    # to x, and replaces v_first by its own values.
    parts = empty_parts(target, weights.channel_value, len(x))
    v_first = jnp.zeros_like(x, shape=parts.shape[1:])
    for layer in range(len(states[0])):
        index = jnp.full(1, layer, jnp.int32)
        x, parts, v_first, states = run(index, x, parts, v_first, states, active, weights)
    # The barrier keeps the last v_first, or XLA would compile the last layer on its own.
    x, parts, _, states = jax.lax.optimization_barrier((x, parts, v_first, states))
    return (x + parts[:, : len(x)].sum(0).astype(x.dtype), *states)


def _run_layer(
    target: Target,
    layer: jax.Array,
    x: jax.Array,
    parts: jax.Array,
    v_first: jax.Array,
    states: States,
    active: jax.Array | None,
    weights: LayerWeights,
    *,
    norm_eps: float,
    head_norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array, States]:
    """Runs one layer; takes and returns in parts what the next kernel adds to x."""
    B, w = len(x), weights
    time_shift, wkv, channel_shift = states

    norm = NormWeights(w.time_norm_scale, w.time_norm_bias, w.time_shift_mix)
    x, mixed, time_shift = norm_mix(target, layer, x, parts, norm, time_shift, active, norm_eps)
    x_r, x_w, x_k, x_v, x_a, x_g = mixed
    r, k, v, *low = projections(
        target,
        layer,
        [
            Product(x_r, w.receptance),
            Product(x_k, w.key),
            Product(x_v, w.value),
            Product(x_w, w.decay_down, jnp.tanh),
            Product(x_a, w.alpha_down),
            Product(x_v, w.value_residual_down),
            Product(x_g, w.gate_down, jax.nn.sigmoid),
        ],
        B,
    )
    ups = (w.decay_up, w.alpha_up, w.value_residual_up, w.gate_up)
    second = [Product(x, up) for x, up in zip(low, ups, strict=True)]
    logits = projections(target, layer, second, B)
    v_first = jnp.where(layer[0] == 0, v, v_first)
    of_heads = HeadWeights(
        w.decay_base,
        w.alpha_base,
        w.value_residual_base,
        w.removal_scale,
        w.replacement_mix,
        w.bonus,
        w.head_norm_scale,
        w.head_norm_bias,
    )
    of_heads = HeadWeights(*(value.reshape(len(value), -1) for value in of_heads))
    vectors = Vectors(r, k, v, v_first, *logits)
    corrected, wkv = heads(target, layer, vectors, of_heads, wkv, active, head_norm_eps)
    parts = split_projection(target, layer, Product(corrected, w.output), B)

    norm = NormWeights(w.channel_norm_scale, w.channel_norm_bias, w.channel_shift_mix[:, None])
    x, mixed, channel_shift = norm_mix(
        target, layer, x, parts, norm, channel_shift, active, norm_eps
    )
    (hidden,) = projections(target, layer, [Product(mixed[0], w.channel_key, _squared_relu)], B)
    parts = split_projection(target, layer, Product(hidden, w.channel_value), B)
    return x, parts, v_first, (time_shift, wkv, channel_shift)


def _squared_relu(x: jax.Array) -> jax.Array:
    """Squares relu in float32; `channel_mix.reference` rounds between the two.

    `test_interpreted_equals_the_definition` compares the kernels with the reference.
    """
    x = jnp.maximum(x, 0)
    return x * x


__all__ = ["check_served", "decode_layers_mosaic_gpu", "run_layers"]
