"""The weighted sum of cross entropies, whose forward computes the gradients, too.

Each loss enters a sum with a weight that the forward knows. So logits are computed once, turn into
losses and gradients, and are gone. The backward multiplies by the gradient of the sum.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.operators.cross_entropy.chunks import chunk_length_of, join, split
from pallas_kernels.operators.cross_entropy.reference import weighted_sum
from pallas_kernels.operators.cross_entropy.statistics import (
    FINDER_XLA,
    Finder,
    nan_out_of_range,
)
from pallas_kernels.precision import accumulation_dtype, contract

CHUNK_SIZE_OF_SUM = 2048
"""Tokens that have logits in float32 at once, where the caller leaves it open."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward multiplies by the gradient of the sum.

    Attributes:
      losses: `[B, T]`; the gradients of the tokens' weights.
      dhidden: `[B, T, C]`, in the dtype of hidden and of the head's weight; the gradient of each
        token's own loss, divided by its factor.
      factors: `[B, T]`, in the dtype of sums.
      token_weights: `[B, T]`.
      dweight: `[C, vocab]`, in the dtype of sums; the gradient for weights of tokens divided by
        `scale`.
      scale: scalar, the largest absolute value of the tokens' weights.
    """

    losses: jax.Array
    dhidden: jax.Array
    factors: jax.Array
    token_weights: jax.Array
    dweight: jax.Array
    scale: jax.Array


def _sum(
    finder: Finder,
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    l2wrap: float,
    chunk_size: int,
) -> Float[Array, ""]:
    del l2wrap  # enters the gradient only
    statistics = finder.statistics(hidden, weight, targets, chunk_size)
    losses = nan_out_of_range(statistics, targets, weight.shape[1]).losses()
    return weighted_sum(token_weights, losses)


def _forward(
    finder: Finder,
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    l2wrap: float,
    chunk_size: int,
) -> tuple[Float[Array, ""], Residuals]:
    dtype = accumulation_dtype(weight)
    scale = jnp.abs(token_weights).max()
    # Weights of a mean over many tokens are small: float16 would lose their digits, or all of them.
    shares = token_weights / jnp.where(scale == 0, 1, scale)

    def add_chunk(dweight: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
        hidden, targets, shares = chunk
        find_gradients, statistics = finder.gradients(hidden, weight, targets)
        statistics = nan_out_of_range(statistics, targets, weight.shape[1])
        counts = shares != 0
        dlogits, factors = find_gradients(statistics, l2wrap, counts)
        dhidden = jnp.einsum("blv,cv->blc", dlogits, weight)
        shared = hidden * (shares * factors)[..., None]
        shared = jnp.where(counts[..., None], shared, 0).astype(hidden.dtype)  # where nan, too
        dweight += contract("blc,blv->cv", shared, dlogits)
        return dweight, (statistics.losses(), dhidden, factors)

    chunk_length = chunk_length_of(targets.shape, chunk_size)
    chunks = tuple(split(x, chunk_length) for x in (hidden, targets, shares))
    # Zeros like the weight vary over the same mesh axes in shard_map, as a scan's carry must.
    dweight, results = jax.lax.scan(add_chunk, jnp.zeros_like(weight, dtype), chunks)
    losses, dhidden, factors = (join(x, targets.shape[1]) for x in results)
    residuals = Residuals(losses, dhidden, factors, token_weights, dweight, scale)
    return weighted_sum(token_weights, losses), residuals


def _backward(
    finder: Finder,
    l2wrap: float,
    chunk_size: int,
    residuals: Residuals,
    dsum: Float[Array, ""],
) -> tuple[Float[Array, "B T C"], Float[Array, "C vocab"], None, Float[Array, "B T"]]:
    del finder, l2wrap, chunk_size
    dlosses = residuals.token_weights * dsum
    factors = (dlosses * residuals.factors)[..., None]
    dhidden = jnp.where(dlosses[..., None] == 0, 0, residuals.dhidden * factors)
    dweight = residuals.dweight * (residuals.scale * dsum)
    dtoken_weights = residuals.losses * dsum
    dtype = residuals.dhidden.dtype
    return (
        dhidden.astype(dtype),
        dweight.astype(dtype),
        None,
        dtoken_weights.astype(residuals.token_weights.dtype),
    )


cross_entropy_sum_with = jax.custom_vjp(_sum, nondiff_argnums=(0, 5, 6))
"""Computes `pallas_kernels.cross_entropy_sum`, which documents the arguments.

The first argument says how statistics of logits are found.
"""

cross_entropy_sum_with.defvjp(_forward, _backward)


def cross_entropy_sum_xla(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    l2wrap: float,
    chunk_size: int | None,
) -> Float[Array, ""]:
    """Computes `pallas_kernels.cross_entropy_sum`, which documents the arguments."""
    return cross_entropy_sum_with(
        FINDER_XLA, hidden, weight, targets, token_weights, l2wrap, chunk_size or CHUNK_SIZE_OF_SUM
    )


__all__ = ["CHUNK_SIZE_OF_SUM", "cross_entropy_sum_with", "cross_entropy_sum_xla"]
