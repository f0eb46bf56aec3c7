"""WKV7 in chunks of matrix products, for every backend of XLA.

A chunk of L tokens with entry state S0 is read at once (`docs/rwkv7.md` derives all of it):

    O  = r_in S0 + A_rk V + A_rb U
    U  = (I - A_ab)^-1 (a_in S0 + A_ak V)
    S1 = diag(decay) S0 + k_out^T V + b_out^T U

where `A_xy[i, j] = sum_c x[i, c] y[j, c] exp(sum of log decays between j and i)` for j before i,
`r_in`, `a_in` are decayed from the chunk's beginning and `k_out`, `b_out` to its end. Rows (r, a)
and columns (k, b) are stacked for one product that makes all four A.

The work is laid out as a scan over groups of G chunks. Within a group everything that does not
need the state is done for all chunks at once, and a short scan carries the state from chunk to
chunk. The backward keeps the entry state of each chunk and computes the rest again.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import find_segments
from pallas_kernels.types import FloatArray, SegmentIds
from pallas_kernels.wkv7.common import (
    load_state,
    load_state_backward,
    never_stored,
    prepare,
    store_state,
    store_state_backward,
)

MAX_CHUNK = 64
MAX_CHUNK_UNBOUNDED = 32
"""Tokens in a chunk, at most: fewer where the decay has no useful bound and pairs cost more."""

MATRICES = {"cpu": 16}
MATRICES_ELSEWHERE = 2048
"""Chunks times rows times heads that a group works on at least, if there are as many: enough to
fill an accelerator, few enough to stay in the caches of a CPU."""

RADIX = 4
"""Blocks that are joined to one at a time, above the leaves."""

MAX_EXPONENT = 30.0
"""Largest exponent that a factor may carry; masked products of two stay finite in float32."""


type Pair = tuple[jax.Array, jax.Array]
"""r and a, the rows of A, or k and b, its columns."""


class Plan(NamedTuple):
    """How a call is cut up, known at trace time.

    Attributes:
      chunk: L, a power of two.
      leaf: tokens whose pairs are computed by one product, relative to the decay at their middle.
        Longer blocks are built from shorter ones, without subtracting decays.
      group: G.
      scale: factor on the outputs.
    """

    chunk: int
    leaf: int
    group: int
    scale: float


class Products(NamedTuple):
    """What a chunk needs of r, log_decay, k, a, b.

    Attributes:
      A: `[..., 2, L, 2, L]`, A_rk, A_rb in the first row, A_ak, A_ab in the second.
      rows: r_in and a_in, `[..., L, K]`.
      columns: k_out and b_out, `[..., L, K]`.
      decay: `[..., K]`, of the whole chunk.
    """

    A: jax.Array
    rows: Pair
    columns: Pair
    decay: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Segments that share chunks; the state restarts from zero.

    Attributes:
      index: `[B, T]` int32, rising from segment to segment; pairs of tokens interact where equal.
      entry: `[T / L, B]` int32, the index that the state entering a chunk belongs to.
    """

    index: jax.Array
    entry: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transfers:
    """Segments that begin and end with chunks; their states are loaded and stored in between.

    Attributes:
      load: `[T / L, B]` int32, the stored state that a chunk starts from, N for none.
      store: `[T / L, B]` int32, the segment that ends with a chunk, N for none.
    """

    load: jax.Array
    store: jax.Array


type Boundaries = Masks | Transfers | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      inputs: r, log_decay, k, v, a, b, `[B, T, H, _]`, as they were given.
      boundaries: of the segments, if there are any.
      entries: `[T / (G L), G, B, H, K, V]`, the state entering each chunk.
    """

    inputs: tuple[jax.Array, ...]
    boundaries: Boundaries
    entries: jax.Array


def _blocks(x: jax.Array, *counts: int) -> jax.Array:
    """Splits the tokens of `[..., L, K]`: `[..., *counts, size, K]`."""
    return x.reshape(*x.shape[:-2], *counts, -1, x.shape[-1])


def _select(mask: np.ndarray | jax.Array, x: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """`jnp.where` with a mask that has the last axes of x."""
    return jnp.where(mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape), x, otherwise)


def _leaf_products(
    log_decay: jax.Array,
    rows: Pair,
    columns: Pair,
    masks: Masks | None,
    leaf: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """A within leaves, `[..., L / leaf, 2, leaf, 2, leaf]`, and sums of log decay within them.

    The sums, `[..., L, K]`, run from the leaf's beginning to each token, with it (so much has
    decayed what r reads) and without it (what a reads), and from after each token to the leaf's
    end.
    """
    if leaf == 1:  # r meets what its own token wrote, undecayed; a reads the state before that
        of_r = jnp.stack([jnp.sum(rows[0] * column, axis=-1) for column in columns], axis=-1)
        A = jnp.stack([of_r, jnp.zeros_like(of_r)], axis=-2)[..., :, None, :, None]
        zeros = jnp.zeros_like(log_decay)
        return A, (log_decay, zeros, zeros)
    count = log_decay.shape[-2] // leaf
    w = _blocks(log_decay, count)
    lower = np.tril(np.ones((leaf, leaf), w.dtype))
    if masks is None:
        from_start = jnp.einsum("ij,...jk->...ik", lower, w, precision="highest")
    else:  # sums that begin with each segment, lest rounding errors leak between their gradients
        index = masks.index.reshape(*masks.index.shape[:2], count, leaf)
        same = index[..., :, None] == index[..., None, :]
        ones = jnp.where(same, lower[None, None, None], 0)
        from_start = jnp.einsum("gbnij,gbhnjk->gbhnik", ones, w, precision="highest")
    before, to_end = from_start - w, from_start[..., -1:, :] - from_start
    # A does not depend on where exponents are measured from.
    middle = jax.lax.stop_gradient(from_start[..., leaf // 2 - 1, None, :])
    r, a, k, b = (_blocks(x, count) for x in (*rows, *columns))
    to_token = jnp.exp(middle - from_start)
    A = jnp.einsum(
        "...xnik,...ynjk->...nxiyj",
        jnp.stack([r * jnp.exp(from_start - middle), a * jnp.exp(before - middle)], axis=-4),
        jnp.stack([k * to_token, b * to_token], axis=-4),
    )
    keep = np.stack([lower, lower - np.eye(leaf)]) > 0
    return _select(keep[:, :, None, :], A, 0), tuple(
        x.reshape(log_decay.shape) for x in (from_start, before, to_end)
    )


def _merge(
    A: jax.Array,
    sums: tuple[jax.Array, ...],
    rows: Pair,
    columns: Pair,
    radix: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """From A and the sums of log decay within blocks to those within blocks `radix` times as long.

    Between a row in block p and a column in an earlier block q lie the decays from the column to
    the end of q, those of the blocks in between, and those from the beginning of p to the row.
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
    A = _select(diagonal, jnp.broadcast_to(A[..., None, :], below.shape), below)
    passed = jnp.stack([decay_of(0, p) for p in range(radix)], axis=-2)[..., None, :]
    ahead = jnp.stack([decay_of(q + 1, radix) for q in range(radix)], axis=-2)[..., None, :]
    sums = (from_start + passed, before + passed, to_end + ahead)
    A = A.reshape(*lead, count, 2, radix * size, 2, radix * size)
    return A, tuple(x.reshape(*lead, -1, x.shape[-1]) for x in sums)


def _products(
    log_decay: jax.Array,
    rows: Pair,
    columns: Pair,
    masks: Masks | None,
    leaf: int,
) -> Products:
    """Everything that decays. Differentiated by JAX, and exact for any decay down to -inf:

    Above the leaves every exponent is a sum of log decays, never a difference, so that none is
    positive and nothing cancels; their transpose gives the gradient of log_decay the same way.

    Args:
      log_decay: `[G, B, H, L, K]`.
      rows: r and a, `[G, B, H, L, K]`.
      columns: k and b, `[G, B, H, L, K]`.
      masks: with index `[G, B, L]` and entry `[G, B]`, or None.
      leaf: tokens in a leaf.
    """
    A, sums = _leaf_products(log_decay, rows, columns, masks, leaf)
    while (blocks := A.shape[-5]) > 1:
        A, sums = _merge(A, sums, rows, columns, min(RADIX, blocks))
    from_start, before, to_end = sums
    A = A[..., 0, :, :, :, :]
    rows = (rows[0] * jnp.exp(from_start), rows[1] * jnp.exp(before))
    columns = (columns[0] * jnp.exp(to_end), columns[1] * jnp.exp(to_end))
    decay = jnp.exp(from_start[..., -1, :])
    if masks is not None:
        index, entry = masks.index, masks.entry
        last = index[..., -1]
        same = index[..., :, None] == index[..., None, :]  # [G, B, L, L]
        A = jnp.where(same[:, :, None, None, :, None, :], A, 0)
        enters, leaves = index == entry[..., None], index == last[..., None]
        r, a = (jnp.where(enters[:, :, None, :, None], x, 0) for x in rows)
        k, b = (jnp.where(leaves[:, :, None, :, None], x, 0) for x in columns)
        rows, columns = (r, a), (k, b)
        decay = jnp.where((entry == last)[:, :, None, None], decay, 0)
    return Products(A, rows, columns, decay)


def _inverse(A: jax.Array) -> jax.Array:
    """`(I - A)^-1` of strictly lower triangular `[..., L, L]`, L a power of two.

    Merges inverses of diagonal blocks, so every intermediate is a block of the result; a series in
    powers of A would lose everything to cancellation when tokens repeat.
    """
    lower_left, diagonal = [], A[..., None, :, :]
    while (size := diagonal.shape[-1] // 2) >= 1:
        lower_left.append(diagonal[..., size:, :size])
        diagonal = jnp.stack([diagonal[..., :size, :size], diagonal[..., size:, size:]], axis=-3)
        diagonal = diagonal.reshape(*A.shape[:-2], -1, size, size)
    X = jnp.ones_like(diagonal)
    for block in reversed(lower_left):
        first, second = jnp.moveaxis(X.reshape(*block.shape[:-2], 2, *X.shape[-2:]), -3, 0)
        block = second @ (block @ first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        X = jnp.concatenate([upper, jnp.concatenate([block, second], axis=-1)], axis=-2)
    return X[..., 0, :, :]


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _to_chunks(x: jax.Array, plan: Plan, dtype: np.dtype) -> jax.Array:
    """`[B, G L, H, _]` to `[G, B, H, L, _]`."""
    x = x.reshape(len(x), plan.group, plan.chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2)).astype(dtype)


def _from_chunks(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The inverse of `_to_chunks`."""
    x = jnp.moveaxis(x.astype(dtype), (0, 2), (1, 3))  # [B, G, L, H, _]
    return x.reshape(len(x), -1, *x.shape[3:])


def _read_group(inputs, boundaries, plan, dtype):
    """What a group reads, chunk by chunk: log decay, rows, columns, values, masks."""
    r, log_decay, k, v, a, b = (_to_chunks(x, plan, dtype) for x in inputs)
    masks = None
    if isinstance(boundaries, Masks):
        index = boundaries.index.reshape(-1, plan.group, plan.chunk).swapaxes(0, 1)
        masks = Masks(index, boundaries.entry)
    return log_decay, (r, a), (k, b), v, masks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    plan: Plan,
    inputs: tuple[jax.Array, ...],
    boundaries: Boundaries,
    stored: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """Outputs `[B, T, H, V]`, the state after the last token, and `stored` with the stores made."""
    return _chunked_forward(plan, inputs, boundaries, stored, state)[0]


def _in_groups(x: jax.Array, plan: Plan) -> jax.Array:
    """`[B, T, ...]` to `[T / (G L), B, G L, ...]`."""
    return jnp.swapaxes(x.reshape(len(x), -1, plan.group * plan.chunk, *x.shape[2:]), 0, 1)


def _from_groups(x: jax.Array) -> jax.Array:
    """The inverse of `_in_groups`."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])


def _grouped(
    inputs: tuple[jax.Array, ...], boundaries: Boundaries, plan: Plan
) -> tuple[tuple[jax.Array, ...], Boundaries]:
    """Inputs and boundaries with the axis of groups first, to be scanned over."""

    def group_chunks(x):
        return x.reshape(-1, plan.group, x.shape[-1])

    if isinstance(boundaries, Masks):
        index = _in_groups(boundaries.index, plan)
        boundaries = Masks(index, group_chunks(boundaries.entry))
    elif isinstance(boundaries, Transfers):
        boundaries = jax.tree.map(group_chunks, boundaries)
    return tuple(_in_groups(x, plan) for x in inputs), boundaries


def _precision(inputs: tuple[jax.Array, ...]) -> contextlib.AbstractContextManager[Any]:
    """Full products for float32 inputs; for 16-bit ones what JAX is set to suffices."""
    if jnp.result_type(*inputs).itemsize >= 4:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _chunked_forward(plan, inputs, boundaries, stored, state):
    dtype, initially_stored = state.dtype, stored

    def group(carry, group_inputs):
        inputs, at = group_inputs
        log_decay, rows, columns, v, masks = _read_group(inputs, at, plan, dtype)
        products = _products(log_decay, rows, columns, masks, plan.leaf)
        A, (r_in, a_in), (k_out, b_out), decay = products
        X = _inverse(A[..., 1, :, 1, :])
        u_from_state = X @ a_in
        u_from_v = X @ (A[..., 1, :, 0, :] @ v)

        def chunk(carry, x):
            state, stored = carry
            u_from_state, u_from_v, k_out, b_out, v, decay, at = x
            if stored is not None:
                state = load_state(state, initially_stored, at.load)
            u = u_from_state @ state + u_from_v
            after = decay[..., None] * state + _transpose(k_out) @ v + _transpose(b_out) @ u
            if stored is not None:
                stored = store_state(stored, at.store, after)
            return (after, stored), (state, u)

        transfers = at if isinstance(at, Transfers) else None
        carry, (entries, u) = jax.lax.scan(
            chunk, carry, (u_from_state, u_from_v, k_out, b_out, v, decay, transfers)
        )
        o = r_in @ entries + A[..., 0, :, 0, :] @ v + A[..., 0, :, 1, :] @ u
        return carry, (entries, _from_chunks(plan.scale * o, inputs[3].dtype))

    with _precision(inputs):
        (state, stored), (entries, o) = jax.lax.scan(
            group, (state, stored), _grouped(inputs, boundaries, plan)
        )
    return (_from_groups(o), state, stored), Residuals(inputs, boundaries, entries)


def _chunked_backward(plan, residuals, gradients):
    do, d_state, d_stored = gradients
    dtype = d_state.dtype
    at = residuals.boundaries

    def group(carry, group_inputs):
        (inputs, at), entries, do = group_inputs
        log_decay, rows, columns, v, masks = _read_group(inputs, at, plan, dtype)
        (A, (r_in, a_in), (k_out, b_out), decay), products_backward = jax.vjp(
            functools.partial(_products, masks=masks, leaf=plan.leaf), log_decay, rows, columns
        )
        X = _inverse(A[..., 1, :, 1, :])
        u_from_state = X @ a_in
        u = u_from_state @ entries + X @ (A[..., 1, :, 0, :] @ v)
        do = plan.scale * _to_chunks(do, plan, dtype)
        du_from_o = _transpose(A[..., 0, :, 1, :]) @ do

        def chunk(carry, x):
            d_after, d_loaded = carry
            u_from_state, r_in, b_out, decay, do, du_from_o, at = x
            if d_loaded is not None:
                d_after += store_state_backward(d_stored, at.store)
            du = du_from_o + b_out @ d_after
            d_state = decay[..., None] * d_after
            d_state += _transpose(r_in) @ do + _transpose(u_from_state) @ du
            if d_loaded is not None:
                d_state, d_loaded = load_state_backward(d_state, d_loaded, at.load)
            return (d_state, d_loaded), (d_after, du)

        transfers = at if isinstance(at, Transfers) else None
        carry, (d_after, du) = jax.lax.scan(
            chunk,
            carry,
            (u_from_state, r_in, b_out, decay, do, du_from_o, transfers),
            reverse=True,
        )
        dw = _transpose(X) @ du  # of a_in S0 + A_ak V
        dv = _transpose(A[..., 0, :, 0, :]) @ do + _transpose(A[..., 1, :, 0, :]) @ dw
        dv += k_out @ d_after
        d_products = Products(
            A=jnp.einsum(
                "...xiv,...yjv->...xiyj", jnp.stack([do, dw], axis=-3), jnp.stack([v, u], axis=-3)
            ),
            rows=(do @ _transpose(entries), dw @ _transpose(entries)),
            columns=(v @ _transpose(d_after), u @ _transpose(d_after)),
            decay=jnp.sum(entries * d_after, axis=-1),
        )
        d_log_decay, (dr, da), (dk, db) = products_backward(d_products)
        d_inputs = (dr, d_log_decay, dk, dv, da, db)
        return carry, tuple(_from_chunks(d, x.dtype) for d, x in zip(d_inputs, inputs, strict=True))

    d_loaded = None if d_stored is None else never_stored(d_stored, at.store)
    with _precision(residuals.inputs):
        (d_state, d_loaded), d_inputs = jax.lax.scan(
            group,
            (d_state, d_loaded),
            (_grouped(residuals.inputs, at, plan), residuals.entries, _in_groups(do, plan)),
            reverse=True,
        )
    return tuple(_from_groups(x) for x in d_inputs), None, d_loaded, d_state


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _plan(
    T: int,
    segment_length: int,
    matrices: int,
    scale: float,
    min_log_decay: float | None,
    num_segments: int = 1,
) -> tuple[Plan, int]:
    """How to cut rows of B * H = `matrices` heads, and the length of a row that fits the cut.

    Each segment may need up to L - 1 tokens of padding to fill its last chunk.
    """
    chunk = 1 << (segment_length - 1).bit_length()  # the next power of two
    leaf = 1
    if min_log_decay is not None:
        while leaf < min(chunk, MAX_CHUNK) and -min_log_decay * leaf <= MAX_EXPONENT:
            leaf *= 2
    chunk = min(chunk, MAX_CHUNK if leaf > 1 else MAX_CHUNK_UNBOUNDED)
    chunks = (T + min(T, num_segments) * (chunk - 1)) // chunk
    wanted = MATRICES.get(jax.default_backend(), MATRICES_ELSEWHERE)
    group = min(chunks, -(-wanted // matrices))
    chunks += -chunks % group
    return Plan(chunk, leaf, group, scale), chunks * chunk


def _mask_segments(segment_ids: SegmentIds, plan: Plan, T: int) -> Masks:
    """Masks for a row that is padded to T tokens."""
    index = find_segments(segment_ids).index
    index = jnp.pad(index, ((0, 0), (0, T - index.shape[1])), mode="edge")
    last = index[:, plan.chunk - 1 : -1 : plan.chunk]
    entry = jnp.pad(last, ((0, 0), (1, 0)))  # the row's first segment has index 0
    return Masks(index, entry.T)


def _align_segments(
    segment_ids: SegmentIds, num_segments: int, plan: Plan, T: int
) -> tuple[jax.Array, Transfers]:
    """Lets each segment begin a chunk, so that its states enter and leave between chunks.

    Returns:
      The position `[B, T]` of each token in rows of the new length T, which padding falls out of;
      and the transfers of the chunks there.
    """
    B, N = len(segment_ids), num_segments
    row = jnp.arange(B)[:, None]
    segments = find_segments(segment_ids)
    slot = jnp.where(segments.valid, segment_ids - 1, N)
    tokens = jnp.zeros((B, N), jnp.int32).at[row, slot].add(1, mode="drop")
    chunks = -(-tokens // plan.chunk)
    end = jnp.cumsum(chunks, axis=1)  # [B, N], in chunks
    begin = end - chunks
    count = jnp.cumsum(segments.valid, axis=1)
    rank = count - jax.lax.cummax(jnp.where(segments.start, count, 0), axis=1)
    position = begin.at[row, slot].get(mode="clip") * plan.chunk + rank
    position = jnp.where(segments.valid, position, T)

    chunk = jnp.arange(T // plan.chunk)[None]
    owner = jax.vmap(lambda end: jnp.searchsorted(end, chunk[0], side="right"))(end)  # [B, T / L]
    load = jnp.where(chunk == begin.at[row, owner].get(mode="clip"), owner, N)
    store = jnp.where(chunk + 1 == end.at[row, owner].get(mode="clip"), owner, N)
    return position, Transfers(load.T, store.T)


def wkv7_xla(
    r: FloatArray,
    log_decay: FloatArray,
    k: FloatArray,
    v: FloatArray,
    a: FloatArray,
    b: FloatArray,
    *,
    scale: float,
    initial_state: FloatArray | None,
    segment_ids: SegmentIds | None,
    num_segments: int | None,
    min_log_decay: float | None,
) -> tuple[FloatArray, FloatArray]:
    """The operator of `pallas_kernels.wkv7`, which documents the arguments, in chunks."""
    B, T, H, _ = r.shape
    inputs, initial, segment_ids = prepare(
        (r, log_decay, k, v, a, b), initial_state, segment_ids, num_segments
    )
    if segment_ids is None or num_segments is None:
        plan, length = _plan(T, T, B * H, scale, min_log_decay)
        inputs = [jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0))) for x in inputs]
        masks = None if segment_ids is None else _mask_segments(segment_ids, plan, length)
        o, final, _ = _chunked(plan, tuple(inputs), masks, None, initial)
        return o[:, :T], final
    segment_length = -(-T // num_segments)  # on average
    plan, length = _plan(T, segment_length, B * H, scale, min_log_decay, num_segments)
    position, transfers = _align_segments(segment_ids, num_segments, plan, length)
    row = jnp.arange(B)[:, None]
    empty = [jnp.zeros_like(x, shape=(B, length, *x.shape[2:])) for x in inputs]
    inputs = [e.at[row, position].set(x, mode="drop") for e, x in zip(empty, inputs, strict=True)]
    none = jnp.zeros_like(initial[:, 0])
    o, _, final = _chunked(plan, tuple(inputs), transfers, initial, none)
    return o.at[row, position].get(mode="fill", fill_value=0), final
