"""Products of a few rows with many weights, several at a time.

Each row of activations meets each weight once, so reading the weights takes the time. A block of
the grid computes 64 columns of one product, for up to 128 rows. It streams its weights through a
ring of tiles in shared memory, and keeps the ring full of copies under way. Two blocks share a
multiprocessor, so that one reads while the other begins or ends.

    grid    columns of all products x splits of the inner axis x blocks of rows

Tensor cores take 64 rows of their first operand at a time, but as few as 8 columns of the second.
So the kernel computes the transpose, `weights^T x^T`, whose first operand always has 64 rows.

Products with few columns are also split along the inner axis, so that every multiprocessor has a
part. The kernel that reads the result adds the parts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.ring import Ring, slots_that_fit
from pallas_kernels.hopper.target import TILE, Target

MAX_ROWS = 128
"""Rows of activations that a block of the grid works on at most."""

_GROUP = 8
"""Tensor cores take so many rows at a time: activations are padded to a multiple of these."""

_RING_BYTES = 96 * 1024

_MAX_STEP = 2 * TILE
"""So many rows of weights arrive at a time, at most, where there are few rows of activations."""


class Product(NamedTuple):
    """One product `activation(x @ weights[layer])`.

    Attributes:
      x: `[rows, inner]`, as many rows as `padded_rows` says.
      weights: `[layers, inner, columns]`; both sizes are multiples of 64.
      activation: of float32 numbers; None is the identity.
    """

    x: jax.Array
    weights: jax.Array
    activation: Callable[[jax.Array], jax.Array] | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks of 64 columns."""
        return self.weights.shape[-1] // TILE


def row_blocks(rows: int) -> tuple[int, int]:
    """Into how many blocks rows are divided, and how many each has."""
    blocks = -(-rows // MAX_ROWS)
    return blocks, -(-rows // (blocks * _GROUP)) * _GROUP


def padded_rows(rows: int) -> int:
    """How many rows the arrays have that projections read and write. The last may hold anything."""
    blocks, each = row_blocks(rows)
    return blocks * each


def splits_of(target: Target, inner: int, columns: int) -> int:
    """How many parts the inner axis is split into, so that most multiprocessors have one."""
    steps = inner // TILE
    wanted = max(1, target.multiprocessors // (columns // TILE))
    return max(n for n in range(1, min(wanted, steps) + 1) if steps % n == 0)


def projections(
    target: Target, layer: jax.Array, products: Sequence[Product], rows: int
) -> list[jax.Array]:
    """All products, in one kernel: each `[padded rows, columns]`, in the dtype of x.

    Args:
      target: what it is compiled for.
      layer: `[1]` int32, which of the stacked weights.
      products: to compute.
      rows: number of rows that matter.
    """
    dtype = products[0].x.dtype
    results = [
        jax.ShapeDtypeStruct((1, padded_rows(rows), p.weights.shape[-1]), dtype) for p in products
    ]
    return [y[0] for y in _project(target, layer, products, rows, results)]


def split_projection(target: Target, layer: jax.Array, product: Product, rows: int) -> jax.Array:
    """Parts `[splits, padded rows, columns]` float32, whose sum is the product.

    Args:
      target: what it is compiled for.
      layer: `[1]` int32, which of the stacked weights.
      product: without an activation.
      rows: number of rows that matter.
    """
    results = [_parts_like(target, product.weights, rows)]
    (parts,) = _project(target, layer, [product], rows, results)
    return parts


def empty_parts(target: Target, weights: jax.Array, rows: int) -> jax.Array:
    """Zeros like what `split_projection` gives for these weights."""
    like = _parts_like(target, weights, rows)
    return jnp.zeros(like.shape, like.dtype)


def _parts_like(target: Target, weights: jax.Array, rows: int) -> jax.ShapeDtypeStruct:
    _, inner, columns = weights.shape
    shape = (splits_of(target, inner, columns), padded_rows(rows), columns)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _project(
    target: Target,
    layer: jax.Array,
    products: Sequence[Product],
    rows: int,
    results: Sequence[jax.ShapeDtypeStruct],
) -> Sequence[jax.Array]:
    """The kernel; `results` are `[splits, padded rows, columns]`, all of one dtype and splits."""
    count, each = row_blocks(rows)
    splits, dtype = results[0].shape[0], results[0].dtype
    inners = [p.x.shape[1] // splits for p in products]
    # Each step costs the same time, in which a step of few activations uses few bytes.
    depth = math.gcd(_MAX_STEP if each <= TILE else TILE, *inners)
    slot_bytes = (each + TILE) * depth * 2
    ring = Ring(slots_that_fit(slot_bytes, room=_RING_BYTES, most=max(inners) // depth))

    def body(
        layer_gmem: Any,
        xs_gmem: list[Any],
        all_weights_gmem: list[Any],
        *ys_gmem: Any,
        x_smem: Any,
        w_smem: Any,
        y_smem: Any,
        loaded: Any,
    ) -> None:
        def compute(product, layer, x_gmem, weights_gmem, y_gmem, columns):
            steps = product.x.shape[1] // splits // depth
            own_rows = pl.ds(jax.lax.axis_index("rows") * each, each)
            split = jax.lax.axis_index("split")

            def fetch(step):
                inner = pl.ds((split * steps + step) * depth, depth)
                w, x = weights_gmem.at[layer, inner, columns], x_gmem.at[own_rows, inner]
                ring.copy(step, loaded, [(w, w_smem), (x, x_smem)])

            ring.fill(fetch, steps)

            def accumulate(accumulator):
                def step(i, _):
                    slot = ring.slot(i)
                    plgpu.barrier_wait(ring.loaded(loaded, i))
                    w, x = (smem.at[slot].transpose((1, 0)) for smem in (w_smem, x_smem))
                    plgpu.wgmma(accumulator, w, x)
                    if steps > ring.slots:
                        plgpu.wgmma_wait(1)  # only the product of this step may still read tiles
                        following = ring.next_step(i - 1)

                        @pl.when((i > 0) & (following < steps))
                        def _():
                            plgpu.commit_smem()  # so that all warps have waited
                            fetch(following)

                jax.lax.fori_loop(0, steps, step, None)
                return accumulator[...]

            y = pl.run_scoped(accumulate, plgpu.ACC((TILE, each), jnp.float32))
            if product.activation is not None:
                y = product.activation(y)
            y = plgpu.layout_cast(y.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            y_smem.transpose((1, 0))[...] = y
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[split, own_rows, columns])
            plgpu.wait_smem_to_gmem(0)

        first = 0
        block = jax.lax.axis_index("columns")
        for product, x_gmem, weights_gmem, y_gmem in zip(
            products, xs_gmem, all_weights_gmem, ys_gmem, strict=True
        ):
            end = first + product.blocks

            @pl.when((block >= first) & (block < end))
            def _(
                first=first,
                product=product,
                x_gmem=x_gmem,
                weights_gmem=weights_gmem,
                y_gmem=y_gmem,
            ):
                columns = pl.ds((block - first) * TILE, TILE)
                compute(product, layer_gmem[0], x_gmem, weights_gmem, y_gmem, columns)

            first = end

    kernel = target.kernel(
        body,
        name="projections",
        out_type=tuple(results),
        grid={"rows": count, "split": splits, "columns": sum(p.blocks for p in products)},
        scratch_types={
            "x_smem": _tiles_smem(jnp.bfloat16, ring.slots, each, depth),
            "w_smem": _tiles_smem(jnp.bfloat16, ring.slots, depth, TILE),
            "y_smem": _tiles_smem(dtype, each, TILE),
            "loaded": ring.loaded_type(copies=2),
        },
    )
    return kernel(layer, [p.x for p in products], [p.weights for p in products])


def _tiles_smem(dtype: Any, *shape: int) -> Any:
    """Shared memory for matrices, laid out for tensor cores and copies by the hardware."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


__all__ = ["Product", "empty_parts", "padded_rows", "projections", "split_projection"]
