"""The matrices of WKV7's chunks that depend on decays, and their gradients.

Rows are r and a, which read the state; columns are k and b, which write it. `bounded_products` and
`unbounded_products` compute the same matrices in two ways, which `docs/rwkv7.md`, section 7,
compares.

Arguments are `[B, G, L, H, _]`, G chunks of L tokens. Matrices are `[G, B, H, L, _]`, so that
products work on a batch.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RADIX = 4
"""How many blocks `_join` makes one, where decays are not bounded."""

type Pair = tuple[jax.Array, jax.Array]
"""The rows r and a, or the columns k and b."""

type Gradients = tuple[jax.Array, Pair, Pair]
"""The gradients of log_decay, rows and columns."""


class Products(NamedTuple):
    """The matrices of chunks that depend on r, log_decay, k, a and b; also their gradients.

    The state at the end of a chunk is `onward * (decay * entry state + what columns write)`.

    Attributes:
      A_r: A_rk and A_rb, each `[G, B, H, L, L]`, lower triangular.
      A_a: A_ak and A_ab, each `[G, B, H, L, L]`, strictly lower triangular.
      rows: r and a, each `[G, B, H, L, K]`, decayed from the chunk's beginning.
      columns: k and b, each `[G, B, H, L, K]`; times `onward`, decayed to the chunk's end.
      decay: `[G, B, H, K]`, the factor on the entry state before columns are added.
      onward: `[G, B, H, K]`, the factor on the sum. Its gradient is never computed, because those
        of the other fields include it.
    """

    A_r: Pair
    A_a: Pair
    rows: Pair
    columns: Pair
    decay: jax.Array
    onward: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Segments that share chunks, where the state restarts from zero.

    Attributes:
      index: `[B, G, L]` int32, the segment of each token; tokens interact where it is equal.
      entry: `[B, G]` int32, the segment of the state that enters a chunk.
    """

    index: jax.Array
    entry: jax.Array


type ProductsAndBackward = tuple[Products, Callable[[Products], Gradients]]


def to_chunks(x: jax.Array) -> jax.Array:
    """Returns `[B, G, L, H, _]` as `[G, B, H, L, _]`."""
    return jnp.transpose(x, (1, 0, 3, 2, 4))


def from_chunks(x: jax.Array) -> jax.Array:
    """Returns `[G, B, H, L, _]` as `[B, G, L, H, _]`."""
    return jnp.transpose(x, (1, 0, 3, 2, 4))


def transpose(x: jax.Array) -> jax.Array:
    """Swaps the rows and columns of matrices `[..., rows, columns]`."""
    return jnp.swapaxes(x, -1, -2)


def select(mask: np.ndarray | jax.Array, x: jax.Array, otherwise: jax.Array | int) -> jax.Array:
    """Applies `jnp.where` with a mask over the last axes of x."""
    return jnp.where(mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape), x, otherwise)


def mask_products(products: Products, masks: Masks | None) -> Products:
    """Puts zeros between segments, in the products of chunks or in their gradients."""
    if masks is None:
        return products
    index, entry = jnp.swapaxes(masks.index, 0, 1), masks.entry.T  # [G, B, ...]
    last = index[..., -1]
    same = (index[..., :, None] == index[..., None, :])[:, :, None]
    enters = (index == entry[..., None])[:, :, None, :, None]
    leaves = (index == last[..., None])[:, :, None, :, None]
    return Products(
        A_r=_where(same, products.A_r),
        A_a=_where(same, products.A_a),
        rows=_where(enters, products.rows),
        columns=_where(leaves, products.columns),
        decay=jnp.where((entry == last)[:, :, None, None], products.decay, 0),
        onward=products.onward,
    )


def _where(mask: jax.Array, pair: Pair) -> Pair:
    return jnp.where(mask, pair[0], 0), jnp.where(mask, pair[1], 0)


def _lower(pair: Pair, diagonal: int) -> Pair:
    L = pair[0].shape[-1]
    lower = np.tri(L, k=diagonal, dtype=bool)
    return select(lower, pair[0], 0), select(lower, pair[1], 0)


def bounded_products(
    log_decay: jax.Array, rows: Pair, columns: Pair, masks: Masks | None
) -> ProductsAndBackward:
    """Computes the products if no decay is strong: the inverse of a chunk's decay must be finite.

    Decays are measured from the chunk's beginning. Then one matrix product gives all pairs of a
    row and a column, and one reverse cumulative sum gives the gradient of the log decays.

    Args:
      log_decay: `[B, G, L, H, K]`.
      rows: r and a, `[B, G, L, H, K]`.
      columns: k and b, `[B, G, L, H, K]`.
      masks: of the segments, or None.

    Returns:
      The products, not masked yet.
      A function from their gradients to the gradients of the arguments.
    """
    (r, a), (k, b) = rows, columns
    ones = _ones(log_decay, masks)
    sums = jnp.einsum("bgij,bgjhk->bgihk", ones, log_decay, precision="highest")
    into, into_before, back = jnp.exp(sums), jnp.exp(sums - log_decay), jnp.exp(-sums)
    r_hat, a_hat = to_chunks(r * into), to_chunks(a * into_before)
    k_hat, b_hat = to_chunks(k * back), to_chunks(b * back)
    onward = jnp.swapaxes(jnp.exp(sums[:, :, -1]), 0, 1)
    products = Products(
        A_r=_lower((r_hat @ transpose(k_hat), r_hat @ transpose(b_hat)), 0),
        A_a=_lower((a_hat @ transpose(k_hat), a_hat @ transpose(b_hat)), -1),
        rows=(r_hat, a_hat),
        columns=(k_hat, b_hat),
        decay=jnp.ones_like(onward),
        onward=onward,
    )

    def backward(dproducts: Products) -> Gradients:
        (dA_rk, dA_rb), (dA_ak, dA_ab) = _lower(dproducts.A_r, 0), _lower(dproducts.A_a, -1)
        (drow_r, drow_a), (dcolumn_k, dcolumn_b) = dproducts.rows, dproducts.columns
        dr_hat = drow_r + dA_rk @ k_hat + dA_rb @ b_hat
        da_hat = drow_a + dA_ak @ k_hat + dA_ab @ b_hat
        dk_hat = dcolumn_k + transpose(dA_rk) @ r_hat + transpose(dA_ak) @ a_hat
        db_hat = dcolumn_b + transpose(dA_rb) @ r_hat + transpose(dA_ab) @ a_hat
        dr, da = into * from_chunks(dr_hat), into_before * from_chunks(da_hat)
        dk, db = back * from_chunks(dk_hat), back * from_chunks(db_hat)
        leaving = jnp.sum(k_hat * dcolumn_k + b_hat * dcolumn_b, axis=-2)
        # Without the barrier XLA may sum again for each token that the sum is added to.
        dend = jax.lax.optimization_barrier(dproducts.decay + leaving)
        dsums = r * dr + a * da - k * dk - b * db
        last = np.arange(log_decay.shape[2]) == log_decay.shape[2] - 1
        dsums += select(last[:, None, None], jnp.swapaxes(dend, 0, 1)[:, :, None], 0)
        dlog_decay = jnp.einsum("bgij,bgihk->bgjhk", ones, dsums, precision="highest") - a * da
        return dlog_decay, (dr, da), (dk, db)

    return products, backward


def _ones(log_decay: jax.Array, masks: Masks | None) -> jax.Array:
    """Returns ones `[B, G, L, L]` where token j comes before i or is i, in one segment.

    Sums over other segments would let their gradients leak into each other.
    """
    B, G, L, _, _ = log_decay.shape
    lower = np.tri(L, dtype=bool)[None, None]
    if masks is None:
        return jnp.broadcast_to(lower.astype(log_decay.dtype), (B, G, L, L))
    same = masks.index[..., :, None] == masks.index[..., None, :]
    return (same & lower).astype(log_decay.dtype)


def unbounded_products(
    log_decay: jax.Array, rows: Pair, columns: Pair, masks: Masks | None
) -> ProductsAndBackward:
    """Computes the products for any log decay, down to -inf.

    Args:
      log_decay: `[B, G, L, H, K]`.
      rows: r and a, `[B, G, L, H, K]`.
      columns: k and b, `[B, G, L, H, K]`.
      masks: not needed; nothing leaks through products that are not masked yet.

    Returns:
      The products, not masked yet.
      A function from their gradients to the gradients of the arguments.
    """
    del masks

    def joined(log_decay, rows, columns):
        return _join_blocks(*jax.tree.map(to_chunks, (log_decay, rows, columns)))

    return jax.vjp(joined, log_decay, rows, columns)


def _join_blocks(log_decay: jax.Array, rows: Pair, columns: Pair) -> Products:
    """Computes the products of ever longer blocks of tokens; JAX differentiates it.

    Every exponent is a sum of log decays, never a difference. So no exponent is positive, and
    nothing cancels, neither here nor in the gradient of log_decay.
    """
    # r meets what its own token wrote, undecayed; a reads the state before that.
    of_r = jnp.stack([jnp.sum(rows[0] * column, axis=-1) for column in columns], axis=-1)
    A = jnp.stack([of_r, jnp.zeros_like(of_r)], axis=-2)[..., :, None, :, None]
    zeros = jnp.zeros_like(log_decay)
    sums: tuple[jax.Array, ...] = (log_decay, zeros, zeros)
    while (blocks := A.shape[-5]) > 1:
        A, sums = _join(A, sums, rows, columns, min(RADIX, blocks))
    from_start, before, to_end = sums
    decay = jnp.exp(from_start[..., -1, :])
    return Products(
        A_r=(A[..., 0, 0, :, 0, :], A[..., 0, 0, :, 1, :]),
        A_a=(A[..., 0, 1, :, 0, :], A[..., 0, 1, :, 1, :]),
        rows=(rows[0] * jnp.exp(from_start), rows[1] * jnp.exp(before)),
        columns=(columns[0] * jnp.exp(to_end), columns[1] * jnp.exp(to_end)),
        decay=decay,
        onward=jnp.ones_like(decay),
    )


def _blocks(x: jax.Array, *counts: int) -> jax.Array:
    """Splits the tokens of `[..., L, K]` into blocks: `[..., *counts, size, K]`."""
    return x.reshape(*x.shape[:-2], *counts, -1, x.shape[-1])


def _join(
    A: jax.Array,
    sums: tuple[jax.Array, ...],
    rows: Pair,
    columns: Pair,
    radix: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Makes one block of every `radix` blocks.

    Three decays lie between a row in block p and a column in an earlier block q: from the column to
    the end of q, over the blocks between q and p, and from the beginning of p to the row.

    Args:
      A: `[..., L / size, 2, size, 2, size]`, rows by columns within blocks.
      sums: three sums of log decays within blocks, each `[..., L, K]`: from the beginning to each
        token, which is included (for what r reads) or not (for what a reads), and from after each
        token to the end.
      rows: r and a, each `[..., L, K]`.
      columns: k and b, each `[..., L, K]`.
      radix: how many blocks become one.

    Returns:
      A and the sums of the longer blocks.
    """
    *lead, count, _, size, _, _ = A.shape
    count //= radix
    from_start, before, to_end = (_blocks(x, count, radix) for x in sums)  # [..., n, R, size, K]
    totals = [from_start[..., block, -1, :] for block in range(radix)]  # [..., n, K]

    def decay_of(first, end):
        return sum(totals[first:end], start=jnp.zeros_like(totals[0]))

    def columns_seen_from(p):
        later = jnp.full_like(totals[0], -jnp.inf)
        gaps = [decay_of(q + 1, p) if q < p else later for q in range(radix)]
        factor = jnp.exp(to_end) * jnp.exp(jnp.stack(gaps, axis=-2))[..., None, :]
        return jnp.stack([k * factor, b * factor], axis=-5)  # [..., 2, n, R, size, K]

    r, a, k, b = (_blocks(x, count, radix) for x in (*rows, *columns))
    decayed_rows = jnp.stack([r * jnp.exp(from_start), a * jnp.exp(before)], axis=-5)
    # Stacked, not broadcast, over p: the gradient would sum over that short axis, slowly on CPUs.
    decayed_columns = jnp.stack([columns_seen_from(p) for p in range(radix)], axis=-4)
    below = jnp.einsum("...xnpik,...ynpqjk->...nxpiyqj", decayed_rows, decayed_columns)
    A = jnp.moveaxis(A.reshape(*lead, count, radix, 2, size, 2, size), -5, -4)
    diagonal = np.eye(radix, dtype=bool)[:, None, None, :, None]
    A = select(diagonal, jnp.broadcast_to(A[..., None, :], below.shape), below)
    passed = jnp.stack([decay_of(0, p) for p in range(radix)], axis=-2)[..., None, :]
    ahead = jnp.stack([decay_of(q + 1, radix) for q in range(radix)], axis=-2)[..., None, :]
    sums = (from_start + passed, before + passed, to_end + ahead)
    A = A.reshape(*lead, count, 2, radix * size, 2, radix * size)
    return A, tuple(x.reshape(*lead, -1, x.shape[-1]) for x in sums)


def inverse(A: jax.Array) -> jax.Array:
    """Computes `(I - A)^-1` of strictly lower triangular `[..., L, L]`, L a power of two.

    It merges inverses of diagonal blocks, so that every intermediate value is part of the result. A
    series in powers of A would lose all digits to cancellation where tokens repeat.
    """
    L = A.shape[-1]
    inverses = jnp.broadcast_to(jnp.eye(L, dtype=A.dtype), A.shape)  # of blocks of one row
    for size in (1 << level for level in range((L - 1).bit_length())):
        block = np.arange(L) // size
        below = (block[:, None] == block + 1) & (block % 2 == 0)
        A_below = select(below, A, 0)
        inverses += A_below if size == 1 else inverses @ (A_below @ inverses)
    return inverses


__all__ = [
    "Masks",
    "Products",
    "bounded_products",
    "from_chunks",
    "inverse",
    "mask_products",
    "to_chunks",
    "transpose",
    "unbounded_products",
]
