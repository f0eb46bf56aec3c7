"""Cross entropy in chunks of tokens, whose logits the backward computes again."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.operators.cross_entropy.chunks import chunk_length_of, join, split
from pallas_kernels.operators.cross_entropy.statistics import (
    FINDER_XLA,
    Finder,
    nan_out_of_range,
)
from pallas_kernels.precision import accumulation_dtype, contract

CHUNK_SIZE_OF_LOSSES = 1024
"""Tokens that have logits in float32 at once, where the caller leaves it open."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; nothing is as large as the logits.

    Attributes:
      hidden: `[B, T, C]`; gives the logits and the gradient of the weight.
      weight: `[C, vocab]`; gives the logits and the gradient of hidden.
      targets: `[B, T]`; the gradient of their logits is less by one.
      largest: `[B, T]`, the largest logit.
      log_total: `[B, T]`, as in `Statistics`; with `largest` it turns logits into probabilities
        without another sum.
    """

    hidden: jax.Array
    weight: jax.Array
    targets: jax.Array
    largest: jax.Array
    log_total: jax.Array


def _forward(
    finder: Finder,
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int,
) -> tuple[Float[Array, "B T"], Residuals]:
    del l2wrap  # enters the gradient only
    statistics = finder.statistics(hidden, weight, targets, chunk_size)
    statistics = nan_out_of_range(statistics, targets, weight.shape[1])
    residuals = Residuals(hidden, weight, targets, statistics.largest, statistics.log_total)
    return statistics.losses(), residuals


def _backward(
    finder: Finder,
    l2wrap: float,
    chunk_size: int,
    residuals: Residuals,
    dlosses: Float[Array, "B T"],
) -> tuple[Float[Array, "B T C"], Float[Array, "C vocab"], None]:
    weight = residuals.weight
    dtype = accumulation_dtype(weight)

    def add_chunk(dweight: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, largest, log_total, dlosses = chunk
        find_gradients, statistics = finder.gradients(hidden, weight, targets)
        statistics = statistics._replace(largest=largest, log_total=log_total)
        dlogits, factors = find_gradients(statistics, l2wrap, None)  # for dlosses = 1
        # The gradients of a mean over many tokens are small. Multiplied here, before the rounding,
        # they would take the gradients of float16 logits out of range.
        factors = (dlosses * factors)[..., None]
        dhidden = factors * contract("blv,cv->blc", dlogits, weight)
        weighted = (hidden * factors).astype(hidden.dtype)
        return dweight + contract("blc,blv->cv", weighted, dlogits), dhidden.astype(hidden.dtype)

    chunk_length = chunk_length_of(dlosses.shape, chunk_size)
    arrays = residuals.hidden, residuals.targets, residuals.largest, residuals.log_total, dlosses
    chunks = tuple(split(x, chunk_length) for x in arrays)
    # Zeros like the weight vary over the same mesh axes in shard_map, as a scan's carry must.
    dweight, dhidden = jax.lax.scan(add_chunk, jnp.zeros_like(weight, dtype), chunks)
    return join(dhidden, dlosses.shape[1]), dweight.astype(weight.dtype), None


def _losses(
    finder: Finder,
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int,
) -> Float[Array, "B T"]:
    return _forward(finder, hidden, weight, targets, l2wrap, chunk_size)[0]


cross_entropy_with = jax.custom_vjp(_losses, nondiff_argnums=(0, 4, 5))
"""Computes `pallas_kernels.cross_entropy`, which documents the arguments.

The first argument says how statistics of logits are found.
"""

cross_entropy_with.defvjp(_forward, _backward)


def cross_entropy_xla(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int | None,
) -> Float[Array, "B T"]:
    """Computes `pallas_kernels.cross_entropy`, which documents the arguments."""
    chunk_size = chunk_size or CHUNK_SIZE_OF_LOSSES
    return cross_entropy_with(FINDER_XLA, hidden, weight, targets, l2wrap, chunk_size)


__all__ = ["CHUNK_SIZE_OF_LOSSES", "cross_entropy_with", "cross_entropy_xla"]
