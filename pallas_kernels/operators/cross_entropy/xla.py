"""Cross entropy in chunks of tokens, whose logits the backward computes again."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.operators.cross_entropy.chunks import chunk_length_of, join, split
from pallas_kernels.operators.cross_entropy.reference import Losses, losses_of, token_of
from pallas_kernels.precision import accumulation_dtype, contract


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; nothing is as large as the logits.

    Attributes:
      hidden: `[B, T, C]`; gives the logits and the gradient of the weight.
      weight: `[C, vocab]`; gives the logits and the gradient of hidden.
      targets: `[B, T]`; the gradient of their logits is less by one.
      largest: `[B, T]`, the largest logit.
      log_total: `[B, T]`, as in `Losses`; with `largest` it turns logits into probabilities without
        another sum.
    """

    hidden: jax.Array
    weight: jax.Array
    targets: jax.Array
    largest: jax.Array
    log_total: jax.Array


def _forward(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int,
) -> tuple[Float[Array, "B T"], Residuals]:
    del l2wrap  # enters the gradient only

    def chunk_losses(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, Losses]:
        hidden, targets = chunk
        return None, losses_of(contract("blc,cv->blv", hidden, weight), targets)

    chunk_length = chunk_length_of(targets.shape, chunk_size)
    chunks = split(hidden, chunk_length), split(targets, chunk_length)
    _, results = jax.lax.scan(chunk_losses, None, chunks)
    losses, largest, log_total = (join(x, targets.shape[1]) for x in results)
    return losses, Residuals(hidden, weight, targets, largest, log_total)


def _backward(
    l2wrap: float, chunk_size: int, residuals: Residuals, dlosses: Float[Array, "B T"]
) -> tuple[Float[Array, "B T C"], Float[Array, "C vocab"], None]:
    weight = residuals.weight
    dtype = accumulation_dtype(weight)

    def add_chunk(dweight: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, largest, log_total, dlosses = chunk  # [B, L, C], then [B, L, 1] each
        logits = contract("blc,cv->blv", hidden, weight)
        token = token_of(logits)
        dlogits = jnp.exp((logits - largest) - log_total) - (token == targets)  # for dlosses = 1
        if l2wrap:
            is_first_largest = token == jnp.argmax(logits, axis=-1, keepdims=True)
            dlogits += jnp.where(is_first_largest, l2wrap * largest, 0)
        # The gradients of a mean over many tokens are small. Multiplied here, before the rounding,
        # they would take the gradients of float16 logits out of range.
        dlogits = dlogits.astype(weight.dtype)
        dhidden = dlosses * contract("blv,cv->blc", dlogits, weight)
        weighted = (hidden * dlosses).astype(hidden.dtype)
        return dweight + contract("blc,blv->cv", weighted, dlogits), dhidden.astype(hidden.dtype)

    chunk_length = chunk_length_of(dlosses.shape, chunk_size)
    per_token = residuals.targets, residuals.largest, residuals.log_total, dlosses
    chunks = [split(residuals.hidden, chunk_length)]
    chunks += [split(x, chunk_length)[..., None] for x in per_token]
    # Zeros like the weight vary over the same mesh axes in shard_map, as a scan's carry must.
    dweight, dhidden = jax.lax.scan(add_chunk, jnp.zeros_like(weight, dtype), tuple(chunks))
    return join(dhidden, dlosses.shape[1]), dweight.astype(weight.dtype), None


def _losses(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int,
) -> Float[Array, "B T"]:
    return _forward(hidden, weight, targets, l2wrap, chunk_size)[0]


cross_entropy_xla = jax.custom_vjp(_losses, nondiff_argnums=(3, 4))
cross_entropy_xla.defvjp(_forward, _backward)


__all__ = ["cross_entropy_xla"]
