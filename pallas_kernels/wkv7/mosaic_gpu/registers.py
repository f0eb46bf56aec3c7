"""Below the level of Pallas: what is done to tiles in registers, two numbers at a time.

LLVM converts and masks numbers of 16 bits one by one, though a register holds two neighbours of a
row. The interpreter does not know PTX; for it each function has an equal computation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper import TILE, is_interpreted

LAYOUT = plgpu.Layout.WGMMA

SWIZZLE = 128
TRANSFORMS = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(SWIZZLE))
"""How tiles lie in shared memory, for tensor cores."""

TILE16 = plgpu.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16, layout=LAYOUT)
TILE32 = plgpu.ShapeDtypeStruct((TILE, TILE), jnp.float32, layout=LAYOUT)
"""Types of tiles in registers."""


def widen(x: jax.Array) -> jax.Array:
    """A tile of bfloat16 in float32."""
    if is_interpreted():
        return x.astype(jnp.float32)
    return plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=TILE32)(_widen)(x)


def narrow(x: jax.Array) -> jax.Array:
    """A tile of float32 rounded to bfloat16."""
    if is_interpreted():
        return x.astype(jnp.bfloat16)
    return plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=TILE16)(_narrow)(x)


def halves_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two tiles of bfloat16 that together hold twice the digits of x, for a sum of two products."""
    if is_interpreted():
        high = x.astype(jnp.bfloat16)
        return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=(TILE16,) * 2)(_halves_of)(x)


def store(*pairs: tuple[Any, jax.Array]) -> None:
    """Writes tiles of 16 bits to tiles of shared memory, ready for tensor cores.

    All other threads of the warpgroup have read them before; none goes on before all are written.
    """
    refs, tiles = zip(*pairs, strict=True)
    if is_interpreted():
        for ref, tile in pairs:
            ref[...] = tile
        plgpu.commit_smem()
    else:
        types = (plgpu.RefType(TRANSFORMS),) * len(pairs), (LAYOUT,) * len(pairs)
        plgpu.inline_mgpu(arg_types=types)(_store)(refs, tiles)


def keep_triangle(*tiles: jax.Array, lower: bool, strictly: bool = False) -> tuple[jax.Array, ...]:
    """Tiles of bfloat16 with the entries of one triangle, and zeros elsewhere.

    Args:
      *tiles: for one mask.
      lower: whether it is the lower triangle, or the upper one.
      strictly: whether the diagonal is to be zero too.
    """
    if is_interpreted():
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
        mask = (row - column if lower else column - row) >= int(strictly)
        return tuple(jnp.where(mask, x, jnp.zeros_like(x)) for x in tiles)
    count = len(tiles)
    inline = plgpu.inline_mgpu(arg_types=(LAYOUT,) * count, return_type=(TILE16,) * count)
    return inline(functools.partial(_keep_triangle, lower=lower, strictly=strictly))(*tiles)


# Of what follows, arguments and results are values of MLIR, and arrays of them in each thread. In a
# tile, thread 32 w + 4 i + j has rows 16 w + i and 16 w + i + 8, and of each 8 columns 2 j and
# 2 j + 1; its registers are ordered by columns, then rows.


def integer(value: int) -> Any:
    """A constant of 32 bits."""
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def thread_index() -> Any:
    """The index of a thread in its block."""
    # Side effects keep LLVM from computing once, and keeping in all registers there are, what
    # follows from the index.
    return utils.inline_ptx(
        "mov.u32 $0, %tid.x;", result_types=integer(0).type, has_side_effects=True
    )


def to_bits(pair: Any) -> Any:
    """Two numbers of 16 bits as an integer, the first one in its lower half."""
    return utils.bitcast(pair, integer(0).type)


def widen_bits(bits: Any) -> list[Any]:
    """Two numbers of bfloat16 in float32."""
    f32 = ir.F32Type.get()
    first, second = arith.shli(bits, integer(16)), arith.andi(bits, integer(-(1 << 16)))
    return [utils.bitcast(first, f32), utils.bitcast(second, f32)]


def narrow_to_bits(first: Any, second: Any) -> Any:
    """Two numbers of float32, rounded to bfloat16."""
    convert = "cvt.rn.bf16x2.f32 $0, $1, $2;"
    return utils.inline_ptx(convert, second, first, result_types=integer(0).type)


def like(array: Any, registers: Sequence[Any], dtype: Any = None) -> Any:
    """A tile laid out as another one.

    Args:
      array: the other one.
      registers: of the new tile, each an integer or a pair of numbers.
      dtype: of the new tile, if not that of the other one.
    """
    pair = ir.VectorType.get((2,), array.mlir_dtype if dtype is None else dtype)
    registers = [x if x.type == pair else utils.bitcast(x, pair) for x in registers]
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(array.registers.shape),
        _layout=array.layout,
        _is_signed=None,
    )


def _widen(_: Any, x: Any) -> Any:
    f32 = ir.F32Type.get()
    undefined = llvm.mlir_undef(ir.VectorType.get((2,), f32))

    def widen_pair(pair):
        first, second = widen_bits(to_bits(pair))
        result = llvm.insertelement(undefined, first, position=integer(0))
        return llvm.insertelement(result, second, position=integer(1))

    return like(x, [widen_pair(pair) for pair in x.registers.flat], f32)


def _narrow(_: Any, x: Any) -> Any:
    def narrow_pair(pair):
        return narrow_to_bits(*(llvm.extractelement(pair, position=integer(i)) for i in (0, 1)))

    return like(x, [narrow_pair(pair) for pair in x.registers.flat], ir.BF16Type.get())


def _halves_of(_: Any, x: Any) -> list[Any]:
    halves: tuple[list[Any], list[Any]] = [], []
    for pair in x.registers.flat:
        numbers = [llvm.extractelement(pair, position=integer(i)) for i in (0, 1)]
        high = narrow_to_bits(*numbers)
        # LLVM would fuse the subtraction with what x is a product of, and negate beforehand.
        rest = [
            utils.inline_ptx("sub.rn.f32 $0, $1, $2;", exact, rounded, result_types=exact.type)
            for exact, rounded in zip(numbers, widen_bits(high), strict=True)
        ]
        for half, bits in zip(halves, (high, narrow_to_bits(*rest)), strict=True):
            half.append(bits)
    return [like(x, half, ir.BF16Type.get()) for half in halves]


def _store(_: Any, refs: Sequence[Any], tiles: Sequence[Any]) -> None:
    utils.warpgroup_barrier()
    for ref, tile in zip(refs, tiles, strict=True):
        tile.store_tiled(ref, swizzle=SWIZZLE)
    utils.commit_shared()


def _keep_triangle(_: Any, *tiles: Any, lower: bool, strictly: bool) -> list[Any]:
    """Shifts ones into the pairs of a row, 16 bits for each column up to the diagonal."""
    thread = thread_index()
    row = arith.andi(arith.shrui(thread, integer(2)), integer(7))
    row = arith.addi(row, arith.andi(arith.shrui(thread, integer(1)), integer(TILE - 16)))
    column = arith.shli(arith.andi(thread, integer(3)), integer(1))
    distance = arith.shli(arith.subi(row, column), integer(4))
    masks = []
    for i in range(tiles[0].registers.size):
        columns, half = divmod(i, 2)
        offset = 8 * half - 8 * columns + int(lower != strictly)
        shift = arith.maxsi(arith.addi(distance, integer(16 * offset)), integer(0))
        # PTX defines shifts by 32 bits and more, LLVM does not.
        from_column = utils.inline_ptx("shl.b32 $0, -1, $1;", shift, result_types=shift.type)
        masks.append(arith.xori(from_column, integer(-1)) if lower else from_column)

    def masked(x):
        pairs = zip(x.registers.flat, masks, strict=True)
        return like(x, [arith.andi(to_bits(pair), mask) for pair, mask in pairs])

    return [masked(x) for x in tiles]
