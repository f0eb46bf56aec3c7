"""Operations on tiles in registers that Pallas lacks or compiles badly, written in PTX.

LLVM converts and masks 16-bit numbers one by one, although a register holds two of them, neighbours
in a row. These functions work on both at once. The interpreter does not know PTX, so each function
has an equal computation in JAX for it.

A tile of 16 bits is of the type bfloat16 for the compiler. Its bits may also be those of float16
numbers: a kernel may choose at run time, and its memory has one type. So functions that interpret
the bits take a `dtype`, and the others work on both.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.hopper.target import TILE, is_interpreted

TILE_LAYOUT = plgpu.Layout.WGMMA
"""Layout of a tile in the registers of a warpgroup, as tensor cores take and give it."""

TRANSFORMS = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
"""How tiles lie in shared memory, for tensor cores."""
_SMEM = plgpu.RefType(TRANSFORMS)

SCALAR = plgpu.Layout.WG_SPLAT
"""Layout of a number that all threads have."""

STRIP = TILE // 2
"""Columns of a strip: half of a tile, for work that has no registers for a whole one."""


class Strip(NamedTuple):
    """32 columns of a tile in shared memory.

    Attributes:
      tile: `[64, 64]` in shared memory.
      number: int32 scalar, 0 for the first 32 columns, 1 for the others; known at run time only.
    """

    tile: Any
    number: jax.Array


def in_registers(dtype: Any, columns: int = TILE) -> plgpu.ShapeDtypeStruct:
    """Returns the type of a tile, or of a strip with fewer columns, in registers."""
    return plgpu.ShapeDtypeStruct((TILE, columns), dtype, layout=TILE_LAYOUT)


TILE16, TILE32 = in_registers(jnp.bfloat16), in_registers(jnp.float32)


def load(x: Any) -> jax.Array:
    """Loads a 16-bit tile or a `Strip` of one from shared memory.

    There is no barrier. What another warpgroup wrote must be behind one already. Each warp loads
    the entries that `store` writes from the same warp.
    """
    tile, number = x if isinstance(x, Strip) else (x, None)
    if is_interpreted():
        return tile[...] if number is None else tile[:, pl.ds(number * STRIP, STRIP)]
    if number is None:
        inline = plgpu.inline_mgpu(arg_types=(_SMEM,), return_type=in_registers(tile.dtype))
        return inline(_load)(tile)
    result = in_registers(tile.dtype, STRIP)
    return plgpu.inline_mgpu(arg_types=(_SMEM, SCALAR), return_type=result)(_load)(tile, number)


def numbers_of(bits: jax.Array, dtype: Any) -> jax.Array:
    """Returns a 16-bit tile as an array of its dtype, in the interpreter."""
    return bits if dtype == jnp.bfloat16 else jax.lax.bitcast_convert_type(bits, dtype)


def _bits_of(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds a tile to a dtype of 16 bits, in the interpreter."""
    return jax.lax.bitcast_convert_type(x.astype(dtype), jnp.bfloat16)


def widen(x: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Converts a 16-bit tile to float32.

    Args:
      x: the tile.
      dtype: of its numbers, bfloat16 or float16.
    """
    if is_interpreted():
        return numbers_of(x, dtype).astype(jnp.float32)
    result = in_registers(jnp.float32, x.shape[1])
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=result)
    return inline(functools.partial(_widen, dtype=dtype))(x)


def narrow(x: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Rounds a tile from float32 to bfloat16 or float16."""
    if is_interpreted():
        return _bits_of(x, dtype)
    result = in_registers(jnp.bfloat16, x.shape[1])
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=result)
    return inline(functools.partial(_narrow, dtype=dtype))(x)


def narrow_pairs(x: jax.Array, *, keep_zeros: bool) -> jax.Array:
    """Rounds a tile from float32 to bfloat16 so that sums of two neighbours in a row err less.

    The second one of two columns is rounded first, and its error is added to the first one before
    that is rounded.

    Args:
      x: the tile.
      keep_zeros: whether zeros stay zeros beside other numbers.
    """
    if is_interpreted():
        first, second = x[:, 0::2], x[:, 1::2]
        rest = second - widen(narrow(second))
        first = jnp.where((first == 0) & keep_zeros, first, first + rest)
        return narrow(jnp.stack([first, second], axis=-1).reshape(x.shape))
    result = in_registers(jnp.bfloat16, x.shape[1])
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=result)
    return inline(functools.partial(_narrow_pairs, keep_zeros=keep_zeros))(x)


def halves_of(x: jax.Array, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into two 16-bit tiles: x rounded to `dtype`, and the rounded rest.

    Their sum has twice the digits of one of them, so that two products with tensor cores replace
    one of higher precision.
    """
    if is_interpreted():
        high = _bits_of(x, dtype)
        return high, _bits_of(x - widen(high, dtype), dtype)
    result = in_registers(jnp.bfloat16, x.shape[1])
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=(result,) * 2)
    return inline(functools.partial(_halves_of, dtype=dtype))(x)


def are_between(*tiles: tuple[jax.Array, float, float]) -> jax.Array:
    """Returns whether the numbers of tiles are within bounds, a boolean scalar.

    Waits for all threads of the warpgroup.

    Args:
      *tiles: a bfloat16 or float32 tile, the least magnitude and the greatest one. No number may
        exceed the greatest one, or be NaN. Of each 16 rows, some number must reach the least one,
        unless all are zero.
    """
    if is_interpreted():
        within = jnp.bool_(True)
        for tile, least, most in tiles:
            magnitudes = jnp.abs(tile.astype(jnp.float32))
            largest = magnitudes.reshape(4, -1).max(axis=1)
            within &= (magnitudes <= most).all() & ((largest >= least) | (largest == 0)).all()
        return within
    arrays = [tile for tile, _, _ in tiles]
    inline = plgpu.inline_mgpu(
        arg_types=(TILE_LAYOUT,) * len(tiles),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    bounds = [(least, most) for _, least, most in tiles]
    return uniform(inline(functools.partial(_are_between, bounds=bounds))(*arrays)) != 0


def largest_exponent(x: jax.Array, vector: Any, first: jax.Array) -> jax.Array:
    """Returns the exponent of the largest magnitude in a tile, an int32 scalar.

    It is e if that magnitude is at least 2^e and less than 2^(e + 1); 128 if there is an infinite
    number or a NaN; -127 if all magnitudes are less than 2^-126. Waits for all threads of the
    warpgroup.

    Args:
      x: bfloat16.
      vector: float32 in shared memory, to exchange numbers between warps.
      first: the first one of four entries of `vector` for that. No other warpgroup may use them.
    """
    if is_interpreted():
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) & 0x7FFF
        return (bits.max() >> 7) - 127
    inline = plgpu.inline_mgpu(
        arg_types=(TILE_LAYOUT, plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    return uniform(inline(_largest_exponent)(x, vector, first))


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns `2^exponent`, a float32 scalar, of an int32 scalar between -126 and 127."""
    bits = (exponent + 127) << 23
    if is_interpreted():
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    result = plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR)
    return plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=result)(_float_of_bits)(bits)


def store(*pairs: tuple[Any, jax.Array]) -> None:
    """Writes 16-bit tiles to shared memory and makes them visible to tensor cores.

    Waits for all threads of the warpgroup before it writes, so that they have read the old tiles,
    and after it, so that they find the new ones.

    Args:
      *pairs: a tile in shared memory, and the value for it.
    """
    refs, tiles = zip(*pairs, strict=True)
    if is_interpreted():
        for ref, tile in pairs:
            ref[...] = tile
        plgpu.commit_smem()
    else:
        types = (_SMEM,) * len(pairs), (TILE_LAYOUT,) * len(pairs)
        plgpu.inline_mgpu(arg_types=types)(_store)(refs, tiles)


def store_strips(number: jax.Array, *pairs: tuple[Any, jax.Array]) -> None:
    """Writes strips of 16-bit tiles to shared memory.

    Waits for all threads of the warpgroup before it writes, but not after it:
    `plgpu.commit_smem()` must follow before the strips are read.

    Args:
      number: which strip of each tile, as in `Strip`.
      *pairs: a tile in shared memory, and the value `[64, 32]` for its strip.
    """
    refs, strips = zip(*pairs, strict=True)
    if is_interpreted():
        for ref, strip in pairs:
            ref[:, pl.ds(number * STRIP, STRIP)] = strip
    else:
        types = (_SMEM,) * len(pairs), (TILE_LAYOUT,) * len(pairs), SCALAR
        plgpu.inline_mgpu(arg_types=types)(_store_strips)(refs, strips, number)


def store_exp2_of_row(ref: Any, strip: jax.Array, row: int, number: jax.Array) -> None:
    """Writes 2 to the power of each entry of a row to half of a vector in shared memory.

    There is no barrier: one must come before it, after the vector was last read, and one after it,
    before the vector is read again.

    Args:
      ref: the vector, `[64]` float32.
      strip: `[64, 32]` float32 in registers.
      row: which row of the strip.
      number: which half of the vector, as in `Strip`.
    """
    if is_interpreted():
        ref[pl.ds(number * STRIP, STRIP)] = jnp.exp2(strip[row])
    else:
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE_LAYOUT, SCALAR))
        inline(functools.partial(_store_exp2_of_row, row=row))(ref, strip, number)


def keep_triangle(*tiles: jax.Array, lower: bool, strictly: bool = False) -> tuple[jax.Array, ...]:
    """Replaces the entries outside of one triangle by zeros.

    Args:
      *tiles: bfloat16; all are masked alike, by masks that are computed once.
      lower: whether the lower triangle is kept, or the upper one.
      strictly: whether the diagonal becomes zero too.
    """
    if is_interpreted():
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
        mask = (row - column if lower else column - row) >= int(strictly)
        return tuple(jnp.where(mask, x, jnp.zeros_like(x)) for x in tiles)
    count = len(tiles)
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,) * count, return_type=(TILE16,) * count)
    return inline(functools.partial(_keep_triangle, lower=lower, strictly=strictly))(*tiles)


def with_diagonal(x: jax.Array, value: float, *, negated: bool = False) -> jax.Array:
    """Replaces the diagonal of a tile by one number.

    Args:
      x: bfloat16.
      value: the number.
      negated: whether the other entries change their sign.
    """
    if is_interpreted():
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
        return jnp.where(row == column, jnp.asarray(value, jnp.bfloat16), -x if negated else x)
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=TILE16)
    return inline(functools.partial(_with_diagonal, value=value, negated=negated))(x)


def first_zeros(x: jax.Array) -> jax.Array:
    """Finds zeros in the rows of a tile.

    Args:
      x: float32.

    Returns:
      `[64, 8]` float32. Entry (i, j) is the first of the columns j, j + 8, ... where row i is zero,
      or infinite if none is.
    """
    if is_interpreted():
        groups = x.reshape(TILE, TILE // 8, 8)
        first = jnp.arange(0, TILE, 8, dtype=jnp.float32)[None, :, None]
        firsts = jnp.where(groups == 0, first, jnp.inf).min(1)
        return firsts + jnp.arange(8, dtype=jnp.float32)[None]
    inline = plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=in_registers(jnp.float32, 8))
    column = plgpu.broadcasted_iota(jnp.int32, (TILE, 8), 1, layout=TILE_LAYOUT)
    return inline(_first_zeros)(x) + column.astype(jnp.float32)


def uniform(number: jax.Array) -> jax.Array:
    """Returns a number, an int32 scalar, that the compiler knows to be the same in all threads.

    Where threads of a warp may take different branches, it finds addresses in registers of each
    thread, instead of those that a warp has once.
    """
    if is_interpreted():
        return number
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
    return plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=result)(_uniform)(number)


def begin_branch() -> None:
    """Begins a branch with an instruction that no other branch has; it does nothing.

    LLVM would move what several branches begin with, such as addresses, to before them, and keep
    it in more registers than there are.
    """
    if not is_interpreted():
        plgpu.inline_mgpu()(_begin_branch)()


# The functions below take and return MLIR values, or the array of values that a thread holds. Of a
# tile, thread 32 w + 4 i + j holds rows 16 w + i and 16 w + i + 8, and of each 8 columns those
# numbered 2 j and 2 j + 1. Its registers are ordered by columns, then by rows.


def integer(value: int) -> Any:
    """Makes a 32-bit constant."""
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def thread_index() -> Any:
    """Returns the index of this thread in its block."""
    # LLVM would compute all that follows from the index once and keep it, in more registers than
    # there are. It may not reuse an instruction that is declared to have side effects.
    return utils.inline_ptx(
        "mov.u32 $0, %tid.x;", result_types=integer(0).type, has_side_effects=True
    )


def address_of(ref: Any) -> Any:
    """Returns the address of a reference in shared memory, in bytes."""
    return llvm.ptrtoint(integer(0).type, utils.memref_ptr(ref))


def to_bits(pair: Any) -> Any:
    """Returns a pair of 16-bit numbers as an integer, the first one in its lower half."""
    return utils.bitcast(pair, integer(0).type)


def widen_bits(bits: Any, dtype: Any = jnp.bfloat16) -> list[Any]:
    """Converts a pair of bfloat16 or float16 numbers to float32."""
    f32 = ir.F32Type.get()
    if dtype == jnp.float16:
        convert = (
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        )
        return list(utils.inline_ptx(convert, bits, result_types=[f32, f32]))
    first, second = arith.shli(bits, integer(16)), arith.andi(bits, integer(-(1 << 16)))
    return [utils.bitcast(first, f32), utils.bitcast(second, f32)]


def pair_of(first: Any, second: Any) -> Any:
    """Makes a register of a tile of two numbers."""
    undefined = llvm.mlir_undef(ir.VectorType.get((2,), first.type))
    result = llvm.insertelement(undefined, first, position=integer(0))
    return llvm.insertelement(result, second, position=integer(1))


def narrow_to_bits(first: Any, second: Any, dtype: Any = jnp.bfloat16) -> Any:
    """Rounds two float32 numbers to a pair of bfloat16 or float16."""
    convert = f"cvt.rn.{'f16x2' if dtype == jnp.float16 else 'bf16x2'}.f32 $0, $1, $2;"
    return utils.inline_ptx(convert, second, first, result_types=integer(0).type)


def tile_of(registers: Sequence[Any], columns: int, dtype: Any) -> Any:
    """Makes a tile of its registers, each an integer or a pair of numbers."""
    pair = ir.VectorType.get((2,), dtype)
    registers = [x if x.type == pair else utils.bitcast(x, pair) for x in registers]
    layout = mgpu.WGMMA_LAYOUT
    shape = layout.registers_shape((TILE, columns))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape),
        _layout=layout,
        _is_signed=None,
    )


def like(array: Any, registers: Sequence[Any], dtype: Any = None) -> Any:
    """Makes a tile of registers, in the shape of another one, and in its type if none is given."""
    return tile_of(registers, array.shape[1], array.mlir_dtype if dtype is None else dtype)


def numbers_in(pair: Any) -> list[Any]:
    """Returns the two numbers of a register of a tile."""
    return [llvm.extractelement(pair, position=integer(i)) for i in (0, 1)]


def _begin_branch(_: Any) -> None:
    utils.inline_ptx("// branch", has_side_effects=True)


def _uniform(_: Any, number: Any) -> Any:
    value = utils.inline_ptx(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;",
        number.registers.item(),
        result_types=integer(0).type,
        has_side_effects=True,
        convergent=True,
    )
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)


def _widen(_: Any, x: Any, dtype: Any) -> Any:
    pairs = [pair_of(*widen_bits(to_bits(pair), dtype)) for pair in x.registers.flat]
    return like(x, pairs, ir.F32Type.get())


def _narrow(_: Any, x: Any, dtype: Any) -> Any:
    pairs = [numbers_in(pair) for pair in x.registers.flat]
    bits = [narrow_to_bits(first, second, dtype) for first, second in pairs]
    return like(x, bits, ir.BF16Type.get())


def _narrow_pairs(_: Any, x: Any, keep_zeros: bool) -> Any:
    bits = []
    for pair in x.registers.flat:
        first, second = numbers_in(pair)
        rounded = widen_bits(narrow_to_bits(first, second))[1]
        rest = _difference(second, rounded)
        sum_of_both = arith.addf(first, rest)
        if keep_zeros:
            is_zero = arith.cmpf(arith.CmpFPredicate.OEQ, first, utils.c(0.0, first.type))
            sum_of_both = arith.select(is_zero, first, sum_of_both)
        bits.append(narrow_to_bits(sum_of_both, second))
    return like(x, bits, ir.BF16Type.get())


def _difference(x: Any, y: Any) -> Any:
    """Returns x - y. In PTX, because LLVM would fuse it with the product that x came from."""
    return utils.inline_ptx("sub.rn.f32 $0, $1, $2;", x, y, result_types=x.type)


def _halves_of(_: Any, x: Any, dtype: Any) -> list[Any]:
    halves: tuple[list[Any], list[Any]] = [], []
    for pair in x.registers.flat:
        numbers = numbers_in(pair)
        high = narrow_to_bits(numbers[0], numbers[1], dtype)
        rest = list(map(_difference, numbers, widen_bits(high, dtype)))
        low = narrow_to_bits(rest[0], rest[1], dtype)
        for half, bits in zip(halves, (high, low), strict=True):
            half.append(bits)
    return [like(x, half, ir.BF16Type.get()) for half in halves]


def _largest(x: Any) -> Any:
    """Returns the largest magnitude among a thread's numbers, as float32.

    It is NaN if there is a NaN.
    """
    f32 = ir.F32Type.get()
    if x.mlir_dtype == f32:
        numbers = [number for pair in x.registers.flat for number in numbers_in(pair)]
        largest = mgpu.c(0.0, f32)
        for number in numbers:
            largest = utils.inline_ptx(
                "{ .reg .f32 x; abs.f32 x, $2; max.NaN.f32 $0, $1, x; }",
                largest,
                number,
                result_types=f32,
            )
        return largest
    # Without signs, numbers are ordered like integers.
    largest = integer(0)
    for pair in x.registers.flat:
        magnitude = arith.andi(to_bits(pair), integer(0x7FFF7FFF))
        largest = utils.inline_ptx(
            "max.u16x2 $0, $1, $2;", largest, magnitude, result_types=largest.type
        )
    first, second = (
        arith.andi(largest, integer(0xFFFF)),
        arith.shrui(largest, integer(16)),
    )
    largest = arith.shli(arith.maxui(first, second), integer(16))
    return utils.bitcast(largest, f32)


def _float_of_bits(_: Any, bits: Any) -> Any:
    number = utils.bitcast(bits.registers.item(), ir.F32Type.get())
    return mgpu.FragmentedArray.splat(number, (), is_signed=None)


def _largest_exponent(_: Any, x: Any, vector: Any, first: Any) -> Any:
    i32, index = integer(0).type, ir.IndexType.get()
    largest = utils.inline_ptx(
        "redux.sync.max.u32 $0, $1, 0xffffffff;",
        utils.bitcast(_largest(x), i32),
        result_types=i32,
        has_side_effects=True,
        convergent=True,
    )
    thread = thread_index()
    warp = arith.andi(arith.shrui(thread, integer(5)), integer(3))
    in_warp = arith.andi(thread, integer(31))
    start = first.registers.item()
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, in_warp, integer(0))):
        at = arith.index_cast(index, arith.addi(start, warp))
        memref.store(utils.bitcast(largest, ir.F32Type.get()), vector, [at])
    utils.warpgroup_barrier()
    for i in range(4):
        at = arith.index_cast(index, arith.addi(start, integer(i)))
        largest = arith.maxui(largest, utils.bitcast(memref.load(vector, [at]), i32))
    exponent = arith.subi(arith.shrui(largest, integer(23)), integer(127))
    return mgpu.FragmentedArray.splat(exponent, (), is_signed=True)


def _are_between(_: Any, *tiles: Any, bounds: Sequence[tuple[float, float]]) -> Any:
    f32, i1 = ir.F32Type.get(), ir.IntegerType.get_signless(1)
    predicate = arith.CmpFPredicate
    flags, within = integer(0), mgpu.c(1, i1)
    for i, (x, (least, most)) in enumerate(zip(tiles, bounds, strict=True)):
        largest = _largest(x)
        within = arith.andi(within, arith.cmpf(predicate.OLE, largest, mgpu.c(most, f32)))
        if least > 0:
            reached = arith.cmpf(predicate.OGE, largest, mgpu.c(least, f32))
            some = arith.cmpf(predicate.OGT, largest, mgpu.c(0.0, f32))
            flags = arith.ori(flags, arith.select(reached, integer(1 << 2 * i), integer(0)))
            flags = arith.ori(flags, arith.select(some, integer(2 << 2 * i), integer(0)))
    flags = utils.inline_ptx(
        "redux.sync.or.b32 $0, $1, 0xffffffff;",
        flags,
        result_types=flags.type,
        has_side_effects=True,
        convergent=True,
    )
    # In a pair of flags, the second one without the first one: some number, but none is large.
    missed = arith.andi(arith.shrui(flags, integer(1)), arith.xori(flags, integer(-1)))
    missed = arith.andi(missed, integer(0x55555555))
    within = arith.andi(within, arith.cmpi(arith.CmpIPredicate.eq, missed, integer(0)))
    result = utils.inline_ptx(
        "{ .reg .pred in, out; setp.ne.s32 in, $1, 0;"
        f" barrier.cta.red.and.pred out, $2, {utils.WARPGROUP_SIZE}, in;"
        " selp.s32 $0, 1, 0, out; }",
        arith.extui(flags.type, within),
        utils.warpgroup_barrier_idx(sync=False),
        result_types=flags.type,
        has_side_effects=True,
        convergent=True,
    )
    return mgpu.FragmentedArray.splat(result, (), is_signed=True)


# Four consecutive registers hold the four quarters, 8 x 8, of a block of 16 x 16, in the order in
# which tensor cores take their first operand. One instruction loads or stores such a block; each
# thread gives the address of one row of a quarter.


def _addresses(ref: Any, columns: int, number: Any | None) -> list[Any]:
    """Returns the address of this thread's row of a quarter, for each 16 columns.

    Tiles are swizzled in shared memory: group g of 8 columns, 16 bytes, of row i lies where group
    `g xor (i % 8)` would.
    """
    thread = thread_index()
    in_quarter = arith.andi(thread, integer(7))
    below = arith.andi(arith.shrui(thread, integer(3)), integer(1))
    right = arith.andi(arith.shrui(thread, integer(4)), integer(1))
    warp = arith.andi(arith.shrui(thread, integer(5)), integer(3))
    row = arith.addi(arith.shli(warp, integer(4)), arith.shli(below, integer(3)))
    row = arith.addi(row, in_quarter)
    place = arith.shli(arith.xori(in_quarter, right), integer(4))
    address = arith.addi(arith.shli(row, integer(7)), place)
    if number is not None:
        place = arith.muli(number.registers.item(), integer(2 * STRIP))
        address = arith.xori(address, place)
    address = arith.addi(address, address_of(ref))
    return [arith.xori(address, integer(32 * i)) for i in range(columns // 16)]


def _load(_: Any, ref: Any, number: Any | None = None) -> Any:
    columns = TILE if number is None else STRIP
    dtype = ir.MemRefType(ref.type).element_type
    i32 = integer(0).type
    registers = []
    for address in _addresses(ref, columns, number):
        quarters = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * 4),
            [address],
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r,~{memory}",
            has_side_effects=True,
        )
        registers += [llvm.extractvalue(i32, quarters, [i]) for i in range(4)]
    return tile_of(registers, columns, dtype)


def _write(ref: Any, tile: Any, number: Any | None = None) -> None:
    quarters = [to_bits(pair) for pair in tile.registers.flat]
    for i, address in enumerate(_addresses(ref, tile.shape[1], number)):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, *quarters[4 * i : 4 * i + 4]],
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
            "r,r,r,r,r,~{memory}",
            has_side_effects=True,
        )


def _store(_: Any, refs: Sequence[Any], tiles: Sequence[Any]) -> None:
    utils.warpgroup_barrier()
    for ref, tile in zip(refs, tiles, strict=True):
        _write(ref, tile)
    utils.commit_shared()


def _store_strips(_: Any, refs: Sequence[Any], strips: Sequence[Any], number: Any) -> None:
    utils.warpgroup_barrier()
    for ref, strip in zip(refs, strips, strict=True):
        _write(ref, strip, number)


def _store_exp2_of_row(_: Any, ref: Any, strip: Any, number: Any, row: int) -> None:
    warp, in_warp = divmod(row, 16)
    half, in_half = divmod(in_warp, 8)
    thread = arith.andi(thread_index(), integer(127))
    holds = arith.cmpi(
        arith.CmpIPredicate.eq, arith.shrui(thread, integer(2)), integer(8 * warp + in_half)
    )
    column = arith.shli(arith.andi(thread, integer(3)), integer(1))
    column = arith.addi(column, arith.muli(number.registers.item(), integer(STRIP)))
    with mgpu.when(holds):
        for i, pair in enumerate(strip.registers.flat[half::2]):
            for j in range(2):
                power = llvm.extractelement(pair, position=integer(j))
                power = utils.inline_ptx(
                    "ex2.approx.ftz.f32 $0, $1;", power, result_types=power.type
                )
                at = arith.index_cast(ir.IndexType.get(), arith.addi(column, integer(8 * i + j)))
                memref.store(power, ref, [at])


def _with_diagonal(_: Any, x: Any, value: float, negated: bool) -> Any:
    thread = thread_index()
    warp = arith.andi(arith.shrui(thread, integer(5)), integer(3))
    row = arith.andi(arith.shrui(thread, integer(2)), integer(7))
    column = arith.shli(arith.andi(thread, integer(3)), integer(1))
    equal = arith.CmpIPredicate.eq
    second = arith.cmpi(equal, row, arith.addi(column, integer(1)))
    mask = arith.select(second, integer(-(1 << 16)), integer(0))
    mask = arith.select(arith.cmpi(equal, row, column), integer((1 << 16) - 1), mask)
    bits = int(np.asarray(value, jnp.bfloat16).view(np.uint16))
    new = integer(bits << 16 | bits)
    registers = []
    for i, pair in enumerate(x.registers.flat):
        columns, half = divmod(i, 2)
        register = to_bits(pair)
        if negated:
            register = arith.xori(register, integer((1 << 31) | (1 << 15)))
        if columns % 2 == half:
            of_warp = arith.cmpi(equal, warp, integer(columns // 2))
            diagonal = arith.select(of_warp, mask, integer(0))
            others = arith.xori(diagonal, integer(-1))
            register = arith.ori(arith.andi(register, others), arith.andi(new, diagonal))
        registers.append(register)
    return like(x, registers)


def _first_zeros(_: Any, x: Any) -> Any:
    f32 = ir.F32Type.get()
    zero, none = mgpu.c(0.0, f32), mgpu.c(float("inf"), f32)
    firsts = [[none, none], [none, none]]
    for i, pair in reversed(list(enumerate(x.registers.flat))):
        columns, half = divmod(i, 2)
        for j, number in enumerate(numbers_in(pair)):
            is_zero = arith.cmpf(arith.CmpFPredicate.OEQ, number, zero)
            firsts[half][j] = arith.select(is_zero, mgpu.c(8.0 * columns, f32), firsts[half][j])
    return tile_of([pair_of(*pair) for pair in firsts], 8, f32)


def _keep_triangle(_: Any, *tiles: Any, lower: bool, strictly: bool) -> list[Any]:
    """`keep_triangle`, of fragmented arrays.

    The mask of a pair is made by one shift: of ones, by 16 bits for each column from the pair to
    the diagonal.
    """
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
