"""Statistics and gradients of logits on Hopper GPUs.

They come from the kernel that makes the logits, or statistics from a pass over these.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.matrix_product import COLUMNS, is_served
from pallas_kernels.hopper.target import TILE, target_in_context
from pallas_kernels.hopper.vectors import VECTOR
from pallas_kernels.hopper.whole_tokens import LOWEST
from pallas_kernels.operators.cross_entropy.chunks import chunk_length_of, in_chunks
from pallas_kernels.operators.cross_entropy.logits_pass import statistics_of_parts
from pallas_kernels.operators.cross_entropy.logits_product import (
    MOST,
    TileStatistics,
    bases_of,
    statistics_of_product,
)
from pallas_kernels.operators.cross_entropy.losses import (
    CHUNK_SIZE_OF_LOSSES,
    cross_entropy_with,
)
from pallas_kernels.operators.cross_entropy.statistics import (
    Finder,
    FindGradients,
    Gradients,
    Statistics,
    find_after_product,
)
from pallas_kernels.operators.cross_entropy.sum import CHUNK_SIZE_OF_SUM, cross_entropy_sum_with
from pallas_kernels.partitioning import partitioned
from pallas_kernels.precision import contract
from pallas_kernels.sharding import Layout, vary_alike

PARTS = 8
"""Parts of the vocabulary, each with statistics of its own, so that devices may divide them."""

_CHUNK_SIZE = 8192
"""Tokens that have exponentials in bfloat16 at once, where the caller leaves it open.

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
      exponentials: `[B, T, parts, vocab]` bfloat16, as in `statistics_of_product`.
      bases: `[B, T, parts, tiles]` float32, as in `statistics_of_product`.
      statistics: the results of `statistics_of_parts`. But the first part may have what is true of
        all parts of the device together, and each other one what an empty part has.
    """
    size = math.gcd(COLUMNS, weight.shape[2])  # a tile of the kernel may lie in two parts
    if not _is_served(math.prod(hidden.shape[:2]), weight):
        logits, *of_parts = _logits_in_passes(hidden, weight, targets)
        by_tile = logits.reshape(*targets.shape, -1, size)
        bases = bases_of(by_tile.max(-1))
        exponentials = jnp.exp(by_tile - bases[..., None]).astype(jnp.bfloat16)
        return exponentials.reshape(logits.shape), bases, *of_parts
    stored, tiles = _product(hidden, weight, targets, with_exponentials=True)
    assert stored is not None
    assert tiles.first is not None
    tile = jnp.argmax(tiles.largest, axis=0)  # the first of equal ones
    in_tile = jnp.take_along_axis(tiles.first, tile[None], axis=0)[0]
    first = (tile * COLUMNS).astype(jnp.float32) + in_tile
    largest, total, of_target = _join(tiles)
    bases = jnp.repeat(bases_of(tiles.largest).T, COLUMNS // size, axis=1)
    return (
        stored.reshape(*targets.shape, -1),
        bases.reshape(*targets.shape, -1),
        *_as_parts(targets.shape, largest, total, first, of_target),
    )


def _finish_gradients(
    exponentials: Float[Array, "B T parts vocab"],
    factors: Float[Array, "B T parts tiles"],
    is_in_range: Bool[Array, "B T"],
    positions: Sequence[Int[Array, "B T parts"]],
    values: Sequence[Float[Array, "B T"]],
) -> Float[Array, "B T parts vocab"]:
    """Turns exponentials of logits into gradients of logits, in place.

    It passes over them only if some token is out of range.

    Args:
      exponentials: of parts of the vocabulary, bfloat16.
      factors: of tiles; what multiplies the exponentials of tokens out of range. Where it is zero,
        they become zero, also if they are nan.
      is_in_range: of tokens.
      positions: one logit of each token, counted from the beginning of each part, for each of
        `values`.
      values: the gradients of these logits.
    """

    def multiply(exponentials: jax.Array) -> jax.Array:
        by_tile = exponentials.reshape(*factors.shape, -1)
        of_tiles = factors[..., None]
        multiplied = jnp.where(of_tiles == 0, 0, by_tile * of_tiles).reshape(exponentials.shape)
        stay = is_in_range[..., None, None]
        return jnp.where(stay, exponentials, multiplied.astype(exponentials.dtype))

    # A loop of one turn or none: unlike the result of `cond`, its carry stays where it is.
    is_out = ~is_in_range.all()
    is_out, exponentials = vary_alike(is_out, exponentials, factors, positions, values)[:2]
    _, gradients = jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (carry[0] & False, multiply(carry[1])),
        (is_out, exponentials),
    )
    size = exponentials.shape[-1]
    rows = gradients.reshape(-1, size)
    for position, value in zip(positions, values, strict=True):
        is_here = (position >= 0) & (position < size)
        column = jnp.where(is_here, position, size).reshape(-1)
        value = jnp.broadcast_to(value[..., None], position.shape).reshape(-1)
        rows = rows.at[jnp.arange(len(rows)), column].set(
            value.astype(rows.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
        )
    return rows.reshape(gradients.shape)


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
_finish_by_part = partitioned(
    _finish_gradients,
    Layout((*_EXPONENTIALS, "B T", "B T parts", "B T"), _EXPONENTIALS[0], _INDEPENDENT),
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


def _gradients_of_tokens(
    hidden: Float[Array, "B T C"], weight: Float[Array, "C vocab"], targets: Int[Array, "B T"]
) -> tuple[FindGradients, Statistics]:
    """Returns what finds gradients, and statistics, from one kernel if there are enough tokens."""
    vocab, by_part = weight.shape[1], _parts_of(weight)
    if not _is_served(targets.size, by_part):
        return _AFTER_PRODUCT.gradients(hidden, weight, targets)
    in_parts = _in_parts(targets, vocab)
    exponentials, bases, *of_parts = _exponentials_by_part(hidden, by_part, in_parts)
    found = _join_parts(vocab // PARTS, *of_parts)

    def find(statistics: Statistics, l2wrap: float, counts: jax.Array | None) -> Gradients:
        counts = jnp.ones_like(targets, bool) if counts is None else counts
        largest, log_total = statistics.largest, statistics.log_total
        # Bases are 0 then, but for tiles with hardly any of the token's probability. In
        # `statistics`, `largest` is nan where targets are out of range.
        is_in_range = jnp.abs(found.largest) <= MOST
        # What turns exponentials into probabilities: for a token in range, and for tiles of others.
        factors = jnp.where(is_in_range, jnp.exp(-largest - log_total), 1)
        of_tiles = jnp.exp((bases - largest[..., None, None]) - log_total[..., None, None])
        of_target = jnp.exp((statistics.of_target - largest) - log_total) - 1
        of_first = jnp.exp(-log_total) + l2wrap * largest
        is_target = statistics.first == targets
        positions = [in_parts]
        values = [jnp.where(is_target, of_first - 1, of_target)]
        if l2wrap:
            positions.append(_in_parts(statistics.first, vocab))
            values.append(jnp.where(is_target, of_first - 1, of_first))
        dlogits = _finish_by_part(
            exponentials,
            jnp.where(counts[..., None, None], of_tiles, 0),
            is_in_range,
            positions,
            [jnp.where(counts, value / factors, 0) for value in values],
        )
        return Gradients(dlogits.reshape(*targets.shape, -1), jnp.where(counts, factors, 0))

    return find, found


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
_IN_PRODUCT = Finder(_statistics_of_tokens, _gradients_of_tokens)


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
    in_bfloat16 = min(_CHUNK_SIZE, max(in_float32, targets.size // 2))
    count = len(targets) * chunk_length_of(targets.shape, in_bfloat16)
    served = finder is _IN_PRODUCT and _is_served(count, _parts_of(weight))
    return in_bfloat16 if served else in_float32


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
