"""The key update and its gradients on Hopper GPUs, each in one pass over memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.target import target_in_context
from pallas_kernels.hopper.token_tiles import HEAD, sum_over_heads
from pallas_kernels.operators.key_update.reference import MIN_NORM, inverse_norm, replacement_key

type Heads = Float[Array, "B T H K"]


def key_update_mosaic_gpu(
    k: Heads,
    alpha: Heads,
    removal_scale: Float[Array, "H K"],
    replacement_mix: Float[Array, "H K"],
) -> tuple[Heads, Heads, Heads]:
    """Computes `pallas_kernels.key_update`, which documents the arguments.

    Raises:
      NotServed: for other dtypes than bfloat16, and other heads than those of 64 channels.
    """
    token_tiles.check_heads(k=k, alpha=alpha)
    inputs = _flatten(k, alpha)
    target = target_in_context()
    tiles = token_tiles.tiles_of(target, inputs[0], registers=64)

    def body(inputs_gmem, parameters_gmem, *results_gmem):
        channels = tiles.channels_of_block()
        removal_scale, replacement_mix = (
            tiles.load_parameter(x.at[channels]) for x in parameters_gmem
        )

        def update(row, positions, _):
            k, alpha = (token_tiles.load(x.at[row, :, channels], positions) for x in inputs_gmem)
            scaled = k * removal_scale
            kk = scaled * inverse_norm(sum_over_heads(scaled * scaled))
            results = replacement_key(k, alpha, replacement_mix), -kk, kk * alpha
            for gmem, result in zip(results_gmem, results, strict=True):
                token_tiles.store(gmem.at[row, :, channels], positions, result, dithered=True)

        tiles.for_each(update, None)

    kernel = target.kernel(
        body,
        name="key_update",
        out_type=(jax.ShapeDtypeStruct(inputs[0].shape, k.dtype),) * 3,
        grid=tiles.grid,
        scratch_types=(),
    )
    results = kernel(inputs, _flatten_parameters(removal_scale, replacement_mix))
    new_k, a, b = (x.reshape(k.shape) for x in results)
    return new_k, a, b


def key_update_backward_mosaic_gpu(
    k: Heads,
    alpha: Heads,
    removal_scale: Float[Array, "H K"],
    replacement_mix: Float[Array, "H K"],
    *,
    cotangents: tuple[Heads, Heads, Heads],
) -> tuple[Heads, Heads, Float[Array, "H K"], Float[Array, "H K"]]:
    """Returns the gradients of k, alpha, removal_scale and replacement_mix.

    Raises:
      NotServed: for other dtypes than bfloat16, and other heads than those of 64 channels.
    """
    token_tiles.check_heads(k=k, alpha=alpha)
    inputs = _flatten(k, alpha, *cotangents)
    target = target_in_context()
    tiles = token_tiles.tiles_of(target, inputs[0], registers=96)

    def body(inputs_gmem, parameters_gmem, dk_gmem, dalpha_gmem, *sums_gmem):
        channels = tiles.channels_of_block()
        parameters = [tiles.load_parameter(x.at[channels]) for x in parameters_gmem]

        def add_tokens(row, positions, totals):
            loaded = [token_tiles.load(x.at[row, :, channels], positions) for x in inputs_gmem]
            dk, dalpha, *terms = _gradients(*loaded, *parameters)
            token_tiles.store(dk_gmem.at[row, :, channels], positions, dk)
            token_tiles.store(dalpha_gmem.at[row, :, channels], positions, dalpha)
            return tuple(x + y for x, y in zip(totals, terms, strict=True))

        totals = tiles.for_each(add_tokens, (tiles.zeros(),) * 2)
        split = jax.lax.axis_index("split")
        for gmem, total in zip(sums_gmem, totals, strict=True):
            token_tiles.store_sums(gmem.at[split, :, channels], total)

    tokens = jax.ShapeDtypeStruct(inputs[0].shape, k.dtype)
    kernel = target.kernel(
        body,
        name="key_update_backward",
        out_type=(tokens, tokens, tiles.partial_sums(), tiles.partial_sums()),
        grid=tiles.grid,
        scratch_types=(),
    )
    dk, dalpha, *sums = kernel(inputs, _flatten_parameters(removal_scale, replacement_mix))
    dremoval_scale, dreplacement_mix = (
        total.sum((0, 1)).reshape(x.shape)
        for total, x in zip(sums, (removal_scale, replacement_mix), strict=True)
    )
    return dk.reshape(k.shape), dalpha.reshape(k.shape), dremoval_scale, dreplacement_mix


def _gradients(
    k: jax.Array,
    alpha: jax.Array,
    dnew_k: jax.Array,
    da: jax.Array,
    db: jax.Array,
    removal_scale: jax.Array,
    replacement_mix: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients as tiles; those of the parameters are not summed over tokens yet."""
    scaled = k * removal_scale
    square = sum_over_heads(scaled * scaled)
    inverse = inverse_norm(square)
    kk = scaled * inverse
    dkk = alpha * db - da
    along = sum_over_heads(kk * dkk)  # changes of the norm do not change kk,
    along = jnp.where(square > MIN_NORM**2, along, jnp.zeros_like(along))  # unless it is constant
    dscaled = inverse * (dkk - kk * along)
    replaced = dnew_k * k
    dk = dscaled * removal_scale + replacement_key(dnew_k, alpha, replacement_mix)
    dalpha = kk * db + replaced * replacement_mix
    return dk, dalpha, dscaled * k, replaced * (alpha - 1)


def _flatten(*inputs: Heads) -> tuple[Float[Array, "B T C"], ...]:
    B, T, H, _ = inputs[0].shape
    return tuple(x.reshape(B, T, H * HEAD) for x in inputs)


def _flatten_parameters(*parameters: Float[Array, "H K"]) -> tuple[Float[Array, " C"], ...]:
    return tuple(x.astype(jnp.float32).reshape(-1) for x in parameters)


__all__ = ["key_update_backward_mosaic_gpu", "key_update_mosaic_gpu"]
