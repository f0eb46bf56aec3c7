"""Inverts the blocks of 16 rows on the diagonal of a tile, each in the registers of one warp.

The older instruction of tensor cores, `mma`, multiplies matrices of 16 x 16 within a warp. So no
warp waits for another one or for shared memory. Pallas offers `mma` only where all warps share an
operand, so it is written in PTX here.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.hopper.registers import (
    TILE16,
    TILE_LAYOUT,
    integer,
    like,
    narrow_to_bits,
    thread_index,
    to_bits,
    widen_bits,
)
from pallas_kernels.hopper.target import is_interpreted
from pallas_kernels.hopper.tiles import row_and_column

_ONE = 0x3F80
"""1.0 in bfloat16."""


def invert_diagonal(A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverts blocks of 16 rows on the diagonal of `I - A`, and multiplies the rest of A by them.

    The inverse of a block of 4 s rows is made of the inverses D of the four blocks of s rows on its
    diagonal. Let N be D times the rest of A in the larger block. Then N^4 = 0, and the inverse is

        (I - A)^-1 = (I - N)^-1 D = (I + N + N^2 + N^3) D = Y + N^2 Y    with Y = D + N D

    No intermediate matrix is more than a few times as large as the inverse. That matters where
    tokens repeat: powers of A itself would be far larger than the inverse.

    Args:
      A: `[64, 64]` bfloat16, strictly lower triangular, in registers.

    Returns:
      D, the inverses, zero outside of the blocks; and N, D times A outside of the blocks. Both are
      bfloat16 tiles in registers.
    """
    if is_interpreted():
        return _invert_by_dot(A)
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=(TILE16,) * 2)
    return inline(_invert_in_warps)(A)


def _invert_by_dot(A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`invert_diagonal`, for the interpreter."""
    row, column = row_and_column()

    def within(size):
        return row // size == column // size

    def dot(x, y, start=0.0):
        return start + jnp.dot(x, y, preferred_element_type=jnp.float32)

    def round16(x):
        return x.astype(jnp.bfloat16)

    D = round16(jnp.where(row == column, 1.0, 0.0))
    for size in (4, 16):
        rest = jnp.where(within(size) & ~within(size // 4), A, jnp.zeros_like(A))
        N = round16(dot(D, rest))
        Y = dot(N, D, D)
        D = round16(dot(round16(dot(N, N)), round16(Y), Y))
    return D, round16(dot(D, jnp.where(within(16), jnp.zeros_like(A), A)))


# A warp holds a block of 16 x 16 as four registers `[half of columns][half of rows]`. Each register
# has two numbers of a quarter, 8 x 8: lane 4 i + j has row i, columns 2 j and 2 j + 1. A quarter of
# zeros is None.

type _Block = list[list[Any]]


def _invert_in_warps(_: Any, A: Any) -> list[Any]:
    """`invert_diagonal`, of a fragmented array."""
    bits = [to_bits(pair) for pair in A.registers.flat]
    halves = [bits[i : i + 2] for i in range(0, len(bits), 2)]  # of 8 columns, by rows
    thread = thread_index()
    warp = arith.andi(arith.shrui(thread, integer(5)), integer(3))
    row = arith.andi(arith.shrui(thread, integer(2)), integer(7))
    column = arith.shli(arith.andi(thread, integer(3)), integer(1))  # the first of two
    (first, below), (_, second) = (_of_warp(warp, halves[i::2]) for i in range(2))

    near = _equal(arith.shrui(row, integer(2)), arith.shrui(column, integer(2)))
    of_identity = _select(
        _equal(row, column),
        integer(_ONE),
        _select(_equal(row, arith.addi(column, integer(1))), integer(_ONE << 16)),
    )
    N = _diagonal(_select(near, first), _select(near, second))
    Y = _diagonal(*(arith.ori(x, of_identity) for x in (N[0][0], N[1][1])))
    N2 = _round(_products(N, N))
    D = _round(_products(_diagonal(N2[0][0], N2[1][1]), Y, _unpack(Y)))
    D = _diagonal(D[0][0], D[1][1])

    rest = [[_select(near, None, first), below], [None, _select(near, None, second)]]
    N = _lower(_round(_products(D, rest)))
    N2 = _lower(_round(_products(N, N)))
    Y_exact = _products(N, D, _unpack(D))
    D = _lower(_round(_products(N2, _lower(_round(Y_exact)), Y_exact)))

    inverse, left = [], []
    for i, columns in enumerate(halves):
        block, half = divmod(i, 2)
        inverse += [_select(_equal(warp, integer(block)), x) for x in D[half]]
        is_left = arith.cmpi(arith.CmpIPredicate.ugt, warp, integer(block))
        left.append([_select(is_left, x) for x in columns])
    # Nothing is left of the last blocks' columns.
    N = [x for columns in _round(_products(D, left[:6])) for x in columns] + [integer(0)] * 4
    return [like(A, inverse), like(A, N)]


def _register(x: Any) -> Any:
    return integer(0) if x is None else x


def _select(condition: Any, x: Any, y: Any = None) -> Any:
    return arith.select(condition, _register(x), _register(y))


def _equal(x: Any, y: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, x, y)


def _of_warp(warp: Any, blocks: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns one of four lists of registers, by the number of the warp."""
    result = list(blocks[0])
    for i, block in enumerate(blocks[1:], start=1):
        is_own = _equal(warp, integer(i))
        result = [_select(is_own, x, y) for x, y in zip(block, result, strict=True)]
    return result


def _diagonal(first: Any, second: Any) -> _Block:
    return [[first, None], [None, second]]


def _lower(x: _Block) -> _Block:
    return [x[0], [None, x[1][1]]]


def _products(
    x: _Block, y: _Block, start: Sequence[Sequence[Any]] | None = None
) -> list[list[Any]]:
    """Computes `start + x y`, as float32 registers for each 8 columns of y.

    Args:
      x: a block.
      y: a block, or more than 16 columns of 16 rows.
      start: as the result; None for zero.
    """
    f32 = ir.F32Type.get()
    zeros = [mgpu.c(0.0, f32)] * 4
    return [
        list(
            utils.inline_ptx(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
                *(_register(quarter) for half in x for quarter in half),
                *(_transposed(quarter) for quarter in columns),
                *(zeros if start is None else start[i]),
                result_types=[f32] * 4,
                convergent=True,
            )
        )
        for i, columns in enumerate(y)
    ]


def _transposed(quarter: Any) -> Any:
    """Returns a quarter as `mma` takes it in its second operand."""
    if quarter is None:
        return integer(0)
    return utils.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        quarter,
        result_types=quarter.type,
        convergent=True,
    )


def _round(x: Sequence[Sequence[Any]]) -> _Block:
    """Rounds what `_products` returns to blocks."""
    return [[narrow_to_bits(*columns[:2]), narrow_to_bits(*columns[2:])] for columns in x]


def _unpack(x: _Block) -> list[list[Any]]:
    """Converts a block to float32, as `_products` returns it."""
    return [[number for bits in columns for number in widen_bits(_register(bits))] for columns in x]
