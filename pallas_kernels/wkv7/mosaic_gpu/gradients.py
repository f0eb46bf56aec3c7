"""Kernel 4 of 4: gradients of the inputs, each chunk in a block of its own."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wkv7.mosaic_gpu.chunk import (
    LOG2E,
    Plan,
    chunk_of,
    constants,
    decays_from_middle,
    load_masks,
    state_tile_of,
)
from pallas_kernels.wkv7.mosaic_gpu.tiles import (
    LAYOUT,
    TILE,
    halves_of,
    keep,
    load,
    products,
    split,
    tiles_smem,
    transposed,
)


class Tiles(NamedTuple):
    """Shared memory: lists with a tile for each 64 channels, the block's own first, and tiles.

    Named by what they are loaded with; p, q, u and dw by what they hold longest.
    """

    r: Any
    w: Any
    k: Any
    a: Any
    b: Any
    s: Any
    ds: Any
    v: Any
    x: Any
    do: Any
    p: Any
    q: Any
    u: Any
    dw: Any

    def own(self) -> list[Any]:
        """r, w, k, a, b, s, ds of the block's own channels."""
        return [tiles[0] for tiles in self[:7]]


def input_gradients(
    plan: Plan,
    inputs: tuple[jax.Array, ...],
    X: jax.Array,
    do: jax.Array,
    entries: jax.Array,
    exits: jax.Array,
    bounds: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Gradients of r, log_decay, k, v, a, b, with the states at both ends of each chunk known.

    One warpgroup per chunk, head, 64 channels and 64 values. With everything decayed to the middle
    of the chunk, as in `chunk`, and the matrices A masked:

        U    = X (a^ S^ + A_ak V)                  dU  = A_rb^T dO + b^ dS^        dW = X^T dU
        dV   = A_rk^T dO + A_ak^T dW + k^ dS^
        dA_rk = dO V^T    dA_rb = dO U^T           dA_ak = dW V^T                  dA_ab = dW U^T
        dr^  = dO S^^T + dA_rk k^ + dA_rb b^       da^ = dW S^^T + dA_ak k^ + dA_ab b^
        dk^  = V dS^^T + dA_rk^T r^ + dA_ak^T a^   db^ = U dS^^T + dA_rb^T r^ + dA_ab^T a^

    The log decay of token j takes part in `r^_i` and `a^_i` of later tokens, in `k^_i` and `b^_i`
    of earlier ones, and in what passes or leaves the whole chunk:

        dw_j = sum_{i >= j} (r^ dr^ - k^ dk^ - b^ db^)_i + sum_{i > j} (a^ da^)_i
               + sum_i (k^ (V dS^^T) + b^ (U dS^^T))_i + sum_V S^ dS^

    Args:
      plan: how to compile.
      inputs: r, log_decay, k, v, a, b, `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      X: of `inverses`.
      do: `[B, T, H, V]` bfloat16.
      entries: S^ of `forward.outputs`.
      exits: dS^ of `backward.state_gradients`.
      bounds: as for `forward.outputs`.

    Returns:
      dr, dlog_decay, dk, dv, da, db in bfloat16, like the inputs.
    """
    r, _, _, v, _, _ = inputs
    B, T, H, K = r.shape
    V = v.shape[-1]
    chunks, blocks, parts = plan.chunks(T), K // TILE, V // TILE
    product = functools.partial(products, interpret=plan.interpret)
    bf16 = jnp.bfloat16

    def body(
        r_gmem, w_gmem, k_gmem, v_gmem, a_gmem, b_gmem, x_gmem, do_gmem, s_gmem, ds_gmem,
        constants_gmem, *rest,
        tiles_smem, loaded, constants_loaded,
    ):  # fmt: skip
        def tiles():
            """All tiles, found anew: LLVM would keep the address of each from use to use."""
            zero = jax.lax.optimization_barrier(jnp.int32(0))
            return Tiles(
                *([tile.at[zero] for tile in of_blocks] for of_blocks in tiles_smem[:7]),
                *(tile.at[zero] for tile in tiles_smem[7:]),
            )

        bounds_gmem, rest = rest[: len(bounds)], rest[len(bounds) :]
        dr_gmem, dw_gmem, dk_gmem, dv_gmem, da_gmem, db_gmem = rest
        row, head, chunk, part, own = (
            jax.lax.axis_index(name) for name in ("row", "head", "chunk", "part", "block")
        )

        t = tiles()

        def copy(source, smem):
            plgpu.copy_gmem_to_smem(source, smem, loaded)

        copy(constants_gmem.at[pl.ds(0, TILE)], t.u)
        for i in range(blocks):
            block = jax.lax.rem(own + i, jnp.int32(blocks))  # the first is the one of this block
            for gmem, smem in (
                (w_gmem, t.w), (a_gmem, t.a), (k_gmem, t.k), (b_gmem, t.b),
                (r_gmem, t.r),
            ):  # fmt: skip
                copy(chunk_of(gmem, row, chunk, head, block), smem[i])
            copy(state_tile_of(s_gmem, row, head, chunk, part, block), t.s[i])
            copy(state_tile_of(ds_gmem, row, head, chunk, part, block), t.ds[i])
        copy(chunk_of(v_gmem, row, chunk, head, part), t.v)
        copy(x_gmem.at[row, head, chunk], t.x)
        copy(chunk_of(do_gmem, row, chunk, head, part), t.do)
        masks = load_masks(bounds_gmem, row, chunk)
        plgpu.barrier_wait(loaded)

        def over_blocks(xs, ys):
            return [(x, transposed(y)) for x, y in zip(xs, ys, strict=True)]

        def write(smem, gradient, gmem):
            smem[...] = gradient.astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, gmem)

        def of_input(gmem):
            return chunk_of(gmem.at[part], row, chunk, head, own)

        def times(x, gradient):
            return load(x).astype(jnp.float32) * gradient

        # Where tokens repeat, U and dW are small differences of W and of dU, because X takes away
        # what neighbours have in common; so these are computed with operands of twice the digits.
        # Few tiles fit registers at a time, hence the order, and decays that are computed again.
        a_low, b_low = [], []
        for r, w, k, a, b in zip(t.r, t.w, t.k, t.a, t.b, strict=True):
            g = decays_from_middle(product, w, t.u)
            from_token = jnp.exp2(-g)
            k[...] = (load(k) * from_token).astype(bf16)
            b[...], low = halves_of(load(b) * from_token)
            b_low.append(low)
            r[...] = (load(r) * (jnp.exp2(g) * plan.scale)).astype(bf16)
            before_token = jnp.exp2(g - load(w).astype(jnp.float32) * LOG2E)
            a[...], low = halves_of(load(a) * before_token)
            a_low.append(low)
        plgpu.commit_smem()

        t = tiles()
        (A_ak,) = product(over_blocks([*t.a, *a_low], t.k * 2))
        A_ak_halves = halves_of(keep(masks.lower(strictly=True), A_ak))
        t.p[...] = A_ak_halves[0]
        reads = over_blocks(map(masks.entered, [*t.a, *a_low]), t.s * 2)
        (W,) = product([*reads, *((x, t.v) for x in A_ak_halves)])
        (U,) = product([(t.x, half) for half in split(W, t.q, t.dw)])
        t.u[...] = U.astype(bf16)

        t = tiles()
        (A_rb,) = product(over_blocks([*t.b, *b_low], t.r * 2))  # transposed
        A_rb_halves = halves_of(keep(masks.upper(), A_rb))
        writes = over_blocks(map(masks.leaving, [*t.b, *b_low]), t.ds * 2)
        (dU,) = product([*writes, *((x, t.do) for x in A_rb_halves)])
        halves = split(dU, t.q, t.dw)
        (dW,) = product([(transposed(t.x), half) for half in halves])
        t.dw[...] = dW.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(constants_gmem.at[pl.ds(0, TILE)], t.x, constants_loaded)

        t = tiles()
        (A_rk,) = product(over_blocks(t.k, t.r))  # transposed
        A_rk = keep(masks.upper(), A_rk).astype(bf16)
        writes = over_blocks(map(masks.leaving, t.k), t.ds)
        (dV,) = product([*writes, (A_rk, t.do), (transposed(t.p), t.dw)])
        t.p[...] = dV.astype(bf16)
        plgpu.commit_smem()

        @pl.when(own == 0)
        def _():
            plgpu.copy_smem_to_gmem(t.p, chunk_of(dv_gmem, row, chunk, head, part))

        t = tiles()
        # From here on for the channels of this block only.
        r, w, k, a, b, s, ds = t.own()
        dA_rk, dA_rb = product([(t.do, transposed(t.v))], [(t.do, transposed(t.u))])
        dA_rk, dA_rb = (keep(masks.lower(), x).astype(bf16) for x in (dA_rk, dA_rb))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        t.p[...], t.q[...] = dA_rk, dA_rb
        (dr,) = product([(masks.entered(t.do), s), (dA_rk, k), (dA_rb, b)])
        d_inclusive = times(r, dr)  # of sums of log decay up to a token, with it
        plgpu.barrier_wait(constants_loaded)
        g = decays_from_middle(product, w, t.x)
        write(t.do, dr * (jnp.exp2(g) * plan.scale), of_input(dr_gmem))

        t = tiles()
        r, w, k, a, b, s, ds = t.own()
        dA_ak, dA_ab = product([(t.dw, transposed(t.v))], [(t.dw, transposed(t.u))])
        dA_ak, dA_ab = (keep(masks.lower(strictly=True), x).astype(bf16) for x in (dA_ak, dA_ab))
        (da,) = product([(masks.entered(t.dw), s), (dA_ak, k), (dA_ab, b)])
        d_exclusive = times(a, da)  # of sums up to a token, without it
        # Of the sum over the whole chunk, which passes the state on and lets tokens leave.
        d_whole = masks.passing(times(s, load(ds).astype(jnp.float32)))
        s[...], t.dw[...] = dA_ak, dA_ab
        g = decays_from_middle(product, w, t.x)
        before_token = jnp.exp2(g - load(w).astype(jnp.float32) * LOG2E)
        write(t.x, da * before_token, of_input(da_gmem))
        from_token = jnp.exp2(-g)

        for is_b in (False, True):
            t = tiles()
            r, w, k, a, b, s, ds = t.own()
            x, value, dA_r, dA_a, staging, gmem = (
                (b, t.u, t.q, t.dw, t.x, db_gmem) if is_b else (k, t.v, t.p, s, t.do, dk_gmem)
            )
            (dx,) = product([(masks.leaving(value), ds)])
            d_whole += times(x, dx)
            (dx,) = product([(transposed(dA_r), r), (transposed(dA_a), a)], start=[dx])
            d_inclusive -= times(x, dx)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            write(staging, dx * from_token, of_input(gmem))

        # Sums over tokens, as products with ones; operands of 16 bits each carry half the digits.
        t = tiles()
        r, w, k, a, b, s, ds = t.own()
        ones = plgpu.layout_cast(jnp.ones((TILE, TILE), bf16), LAYOUT)
        from_token, of_chunk = keep(masks.upper(), ones), masks.leaving(ones)
        totals = split(d_inclusive + d_exclusive, r, a), split(d_whole, k, b)
        (d_log_decay,) = product(
            [
                (x, half)
                for x, pair in zip((from_token, of_chunk), totals, strict=True)
                for half in pair
            ],
            start=[-d_exclusive],
        )
        write(t.p, d_log_decay, of_input(dw_gmem))
        plgpu.wait_smem_to_gmem(0)

    def like(x):
        return jax.ShapeDtypeStruct((parts, *x.shape), bf16)

    kernel = plan.kernel(
        body,
        name="wkv7_input_gradients",
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, bf16) if x is v else like(x) for x in inputs),
        grid={"block": blocks, "part": parts, "head": H, "chunk": chunks, "row": B},
        scratch_types={
            "tiles_smem": Tiles(*[[tiles_smem(1)] * blocks] * 7, *[tiles_smem(1)] * 7),
            "loaded": plgpu.Barrier(num_arrivals=7 * blocks + 4),
            "constants_loaded": plgpu.Barrier(),
        },
    )

    def over_parts(x):
        return x[0] if parts == 1 else jnp.sum(x.astype(jnp.float32), axis=0).astype(bf16)

    gradients = kernel(*inputs, X, do, entries, exits, constants(bf16), *bounds)
    dr, dw, dk, dv, da, db = gradients
    return (*map(over_parts, (dr, dw, dk)), dv, *map(over_parts, (da, db)))
