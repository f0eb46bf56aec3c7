"""Statistics of logits on Hopper GPUs, found where these are made or in one pass over them."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.matrix_product import COLUMNS, is_served
from pallas_kernels.hopper.target import TILE, target_in_context
from pallas_kernels.hopper.vectors import VECTOR
from pallas_kernels.hopper.whole_tokens import LOWEST
from pallas_kernels.operators.cross_entropy.chunks import chunk_length_of, in_chunks
from pallas_kernels.operators.cross_entropy.logits_pass import statistics_of_parts
from pallas_kernels.operators.cross_entropy.logits_product import (
    ONE,
    TileStatistics,
    statistics_of_product,
)
from pallas_kernels.operators.cross_entropy.losses import (
    CHUNK_SIZE_OF_LOSSES,
    cross_entropy_with,
)
from pallas_kernels.operators.cross_entropy.statistics import (
    Finder,
    Probabilities,
    Statistics,
    find_after_product,
)
from pallas_kernels.operators.cross_entropy.sum import CHUNK_SIZE_OF_SUM, cross_entropy_sum_with
from pallas_kernels.partitioning import partitioned
from pallas_kernels.precision import contract
from pallas_kernels.sharding import Layout

PARTS = 8
"""Parts of the vocabulary, each with statistics of its own, so that devices may divide them."""

_CHUNK_SIZE = 8192
"""Tokens that have exponentials in float16 at once, where the caller leaves it open.

Each chunk reads and writes the gradient of the head's weight, in float32.
"""

_TOKENS_AT_ONCE = 2**15
"""Tokens whose losses come from one kernel. It stores statistics of tiles, no logits."""


def _exponentials_of_parts(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C parts vocab"],
    targets: Int[Array, "B T parts"],
) -> tuple[jax.Array, ...]:
    """Returns exponentials of logits of parts of the vocabulary, and statistics.

    Args:
      hidden: tokens of a chunk, bfloat16.
      weight: of the parts of one device, bfloat16.
      targets: as in `statistics_of_parts`.

    Returns:
      exponentials: `[B, T, parts, vocab]` float16, as in `statistics_of_product`.
      bases: `[B, T, parts, tiles]` float32; the logit of each tile of the vocabulary that
        exponentials are relative to.
      statistics: the results of `statistics_of_parts`. But the first part may have what is true of
        all parts of the device together, and each other one what an empty part has.
    """
    size = math.gcd(COLUMNS, weight.shape[2])  # a tile of the kernel may lie in two parts
    if not _is_served(math.prod(hidden.shape[:2]), weight):
        logits, *of_parts = _logits_in_passes(hidden, weight, targets)
        by_tile = logits.reshape(*targets.shape, -1, size)
        bases = by_tile.max(-1)
        difference = by_tile - bases[..., None]
        exponentials = ONE * jnp.exp(difference)
        negated = jnp.where(difference < 0, -exponentials, exponentials)
        return negated.astype(jnp.float16).reshape(logits.shape), bases, *of_parts
    signed, tiles = _product(hidden, weight, targets, with_exponentials=True)
    assert signed is not None
    tile = jnp.argmax(tiles.largest, axis=0)  # the first of equal ones
    by_tile = signed.reshape(len(tile), -1, COLUMNS)
    with_largest = jnp.take_along_axis(by_tile, tile[:, None, None], axis=1)[:, 0]
    first = tile * COLUMNS + jnp.argmax(with_largest, axis=-1)
    largest, total, of_target = _join(tiles)
    bases = jnp.repeat(tiles.largest.T, COLUMNS // size, axis=1)
    return (
        signed.reshape(*targets.shape, -1),
        bases.reshape(*targets.shape, -1),
        *_as_parts(targets.shape, largest, total, first.astype(jnp.float32), of_target),
    )


def _logits_in_passes(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C parts vocab"],
    targets: Int[Array, "B T parts"],
) -> tuple[jax.Array, ...]:
    """Returns logits `[B, T, parts, vocab]` float32, and the results of `statistics_of_parts`."""
    logits = contract("btc,cpv->btpv", hidden, weight)
    return logits, *statistics_of_parts(logits, targets)


def _losses_of_parts(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C parts vocab"],
    targets: Int[Array, "B T parts"],
    *,
    chunk_size: int,
) -> tuple[jax.Array, ...]:
    """Returns the statistics of `_exponentials_of_parts` without `first`.

    It keeps logits of chunks at most.
    """

    def of_chunk(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        if not _is_served(math.prod(hidden.shape[:2]), weight):
            _, largest, total, _, of_target = _logits_in_passes(hidden, weight, targets)
            return largest, total, of_target
        _, tiles = _product(hidden, weight, targets, with_exponentials=False)
        return _as_parts(targets.shape, *_join(tiles))

    rows, length = hidden.shape[:2]
    many = max(chunk_size, _TOKENS_AT_ONCE)
    count = rows * chunk_length_of((rows, length), many)
    return in_chunks(of_chunk, many if _is_served(count, weight) else chunk_size, hidden, targets)


def _is_served(tokens: int, weight: Float[Array, "C parts vocab"]) -> bool:
    """Returns whether one kernel multiplies so many tokens, and finds statistics."""
    channels, *of_vocab = weight.shape
    return is_served(target_in_context(), tokens, channels, math.prod(of_vocab))


def _product(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C parts vocab"],
    targets: Int[Array, "B T parts"],
    *,
    with_exponentials: bool,
) -> tuple[jax.Array | None, TileStatistics]:
    channels = len(weight)
    return statistics_of_product(
        target_in_context(),
        hidden.reshape(-1, channels),
        weight.reshape(channels, -1),
        targets[..., 0].reshape(-1),  # the first part counts from where all of them begin
        with_exponentials=with_exponentials,
    )


def _join(tiles: TileStatistics) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest logit, the sum and the logit of the target, each `[M]`, of all tiles."""
    largest = tiles.largest.max(0, keepdims=True)
    total = (tiles.total * jnp.exp(tiles.largest - largest)).sum(0)
    return largest[0], total, tiles.of_target.sum(0)


def _as_parts(
    shape: tuple[int, ...], largest: jax.Array, *others: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns statistics `[M]` of all parts as those of the first one, and empty ones for others.

    Args:
      shape: B, T and the number of parts.
      largest: the largest logits.
      *others: what is 0 in an empty part.
    """
    *tokens, parts = shape
    of_others = (LOWEST, *(0 for _ in others))
    return tuple(
        jnp.pad(x.reshape(*tokens, 1), [(0, 0), (0, 0), (0, parts - 1)], constant_values=empty)
        for x, empty in zip((largest, *others), of_others, strict=True)
    )


_STATISTICS = ("B T parts",) * 4
_PRODUCT = ("B T C", "C parts vocab", "B T parts")
_INDEPENDENT = "B T parts"

_statistics_by_part = partitioned(
    statistics_of_parts,
    Layout(("B T parts vocab", "B T parts"), _STATISTICS, _INDEPENDENT),
)
_EXPONENTIALS = "B T parts vocab", "B T parts tiles"
_exponentials_by_part = partitioned(
    _exponentials_of_parts, Layout(_PRODUCT, (*_EXPONENTIALS, *_STATISTICS), _INDEPENDENT)
)
_losses_by_part = partitioned(_losses_of_parts, Layout(_PRODUCT, _STATISTICS[1:], _INDEPENDENT))


def _in_parts(targets: Int[Array, "B T"], vocab: int) -> Int[Array, "B T parts"]:
    """Returns targets counted from the beginning of each part of the vocabulary."""
    first = jnp.arange(PARTS, dtype=jnp.int32) * (vocab // PARTS)
    return targets[..., None].astype(jnp.int32) - first[None, None]


def _parts_of(weight: Float[Array, "C vocab"]) -> Float[Array, "C parts vocab_of_part"]:
    return weight.reshape(len(weight), PARTS, -1)


def _join_parts(
    size: int,
    largest: jax.Array,
    total: jax.Array,
    first: jax.Array | None,
    of_target: jax.Array,
) -> Statistics:
    """Joins statistics `[B, T, parts]` of parts of a size.

    A nan among a token's logits makes its `log_total` nan.
    """
    part = jnp.argmax(largest, axis=-1, keepdims=True)  # the first of equal ones
    largest_of_all = largest.max(-1, keepdims=True)
    total = (total * jnp.exp(largest - largest_of_all)).sum(-1)
    if first is not None:
        first = part * size + jnp.take_along_axis(first, part, axis=-1).astype(jnp.int32)
        first = first[..., 0]
    return Statistics(largest_of_all[..., 0], jnp.log(total), first, of_target.sum(-1))


def _statistics(logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"]) -> Statistics:
    """Returns the statistics of logits, in one pass over them."""
    *shape, vocab = logits.shape
    by_part = logits.reshape(*shape, PARTS, -1)
    return _join_parts(vocab // PARTS, *_statistics_by_part(by_part, _in_parts(targets, vocab)))


def _probabilities_of_tokens(
    hidden: Float[Array, "B T C"], weight: Float[Array, "C vocab"], targets: Int[Array, "B T"]
) -> tuple[Probabilities, Statistics]:
    """Returns probabilities and statistics, from one kernel if there are enough tokens for it."""
    vocab, by_part = weight.shape[1], _parts_of(weight)
    if not _is_served(targets.size, by_part):
        return _AFTER_PRODUCT.probabilities(hidden, weight, targets)
    arrays = hidden, by_part, _in_parts(targets, vocab)
    signed, bases, *statistics = _exponentials_by_part(*arrays)
    signed, bases = (x.reshape(*targets.shape, -1) for x in (signed, bases))

    def probabilities(largest: jax.Array, log_total: jax.Array) -> jax.Array:
        factors = jnp.exp((bases - largest[..., None]) - log_total[..., None]) / ONE
        # Without the barrier XLA would compute the factor of a tile for each of its logits.
        factors = jax.lax.optimization_barrier(factors)
        exponentials = jnp.abs(signed.astype(factors.dtype))
        return exponentials * jnp.repeat(factors, vocab // factors.shape[-1], axis=-1)

    return probabilities, _join_parts(vocab // PARTS, *statistics)


def _statistics_of_tokens(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    chunk_size: int,
) -> Statistics:
    """Returns the statistics for losses, from one kernel that stores no logits."""
    vocab = weight.shape[1]
    arrays = hidden, _parts_of(weight), _in_parts(targets, vocab)
    largest, total, of_target = _losses_by_part(*arrays, chunk_size=chunk_size)
    return _join_parts(vocab // PARTS, largest, total, None, of_target)


_AFTER_PRODUCT = find_after_product(_statistics)
_IN_PRODUCT = Finder(_statistics_of_tokens, _probabilities_of_tokens)


def _finder(weight: Float[Array, "C vocab"]) -> Finder:
    """Returns how statistics of logits with a head are found.

    Raises:
      NotServed: for float64, and a vocabulary in no multiple of 64.
    """
    channels, vocab = weight.shape
    if weight.dtype == jnp.float64 or vocab % (VECTOR * PARTS):
        raise NotServed(
            f"mosaic_gpu needs logits in float32, and a vocabulary in multiples of "
            f"{VECTOR * PARTS}, got {weight.dtype=}, {vocab=}"
        )
    in_tiles = weight.dtype == jnp.bfloat16 and channels % TILE == vocab % COLUMNS == 0
    return _IN_PRODUCT if in_tiles else _AFTER_PRODUCT


def _chunk_size(
    finder: Finder, weight: Float[Array, "C vocab"], targets: Int[Array, "B T"], in_float32: int
) -> int:
    """Returns how many tokens of a chunk have logits at once.

    Args:
      finder: of `weight`.
      weight: of the head.
      targets: of all tokens.
      in_float32: how many if logits are stored in float32.
    """
    # Of few tokens, half: there is no need for all logits at once.
    in_float16 = min(_CHUNK_SIZE, max(in_float32, targets.size // 2))
    count = len(targets) * chunk_length_of(targets.shape, in_float16)
    served = finder is _IN_PRODUCT and _is_served(count, _parts_of(weight))
    return in_float16 if served else in_float32


def cross_entropy_mosaic_gpu(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int | None,
) -> Float[Array, "B T"]:
    """Computes `pallas_kernels.cross_entropy`, which documents the arguments.

    Raises:
      NotServed: for float64, and a vocabulary in no multiple of 64.
    """
    finder = _finder(weight)
    chunk_size = chunk_size or _chunk_size(finder, weight, targets, CHUNK_SIZE_OF_LOSSES)
    return cross_entropy_with(finder, hidden, weight, targets, l2wrap, chunk_size)


def cross_entropy_sum_mosaic_gpu(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    l2wrap: float,
    chunk_size: int | None,
) -> Float[Array, ""]:
    """Computes `pallas_kernels.cross_entropy_sum`, which documents the arguments.

    Raises:
      NotServed: for float64, and a vocabulary in no multiple of 64.
    """
    finder = _finder(weight)
    chunk_size = chunk_size or _chunk_size(finder, weight, targets, CHUNK_SIZE_OF_SUM)
    return cross_entropy_sum_with(
        finder, hidden, weight, targets, token_weights, l2wrap, chunk_size
    )


__all__ = ["cross_entropy_mosaic_gpu", "cross_entropy_sum_mosaic_gpu"]
