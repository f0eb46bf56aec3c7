"""Tiles of tokens by channels, for kernels that pass over arrays `[B, T, C]` once.

A tile has up to 256 channels. It is in the registers of one warpgroup, in float32, eight
neighbouring channels in each thread; memory holds bfloat16. So each thread loads 16 bytes at a
time. With 256 channels each warp has one token; with 128 or 64 channels it has two or four tokens.

Which tokens a tile holds is a vector of positions, one for each of its rows. `NONE` stands for a
token of zeros.

Each block of the grid works on some channels of many tiles. Its threads keep the same channels all
the time. They can hold parameters in registers, and sum gradients of parameters there.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.grid import divide
from pallas_kernels.hopper.registers import integer, narrow_to_bits, thread_index, widen_bits
from pallas_kernels.hopper.target import Target, is_interpreted
from pallas_kernels.hopper.vectors import VECTOR, load_if, make_vector, store_if, values_of

NONE = -1
"""Position of a token of zeros. Results for it are not written."""

HEAD = 64
"""Channels of a head."""

_LANES = 32
_WARPS = 4

_GOLDEN = 40503
"""The fraction of the golden ratio, times 65536.

Its multiples modulo 65536 are spread evenly, and so is every second, every third, and so on.
"""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How arrays `[B, T, C]` are divided into tiles, and tiles among the blocks of a grid.

    Attributes:
      rows: B.
      tokens: T.
      channels: C, a multiple of 64.
      blocks: number of blocks that the GPU runs at once.
    """

    rows: int
    tokens: int
    channels: int
    blocks: int

    @property
    def width(self) -> int:
        """Channels of a tile."""
        return next(width for width in (256, 128, 64) if self.channels % width == 0)

    @property
    def height(self) -> int:
        """Tokens of a tile."""
        return _WARPS * _LANES * VECTOR // self.width

    @property
    def columns(self) -> int:
        """Number of tiles beside each other."""
        return self.channels // self.width

    @property
    def tiles_per_row(self) -> int:
        """Number of tiles below each other in a row of the batch."""
        return -(-self.tokens // self.height)

    @property
    def splits(self) -> int:
        """Number of blocks that share a column."""
        return min(max(1, self.blocks // self.columns), self.rows * self.tiles_per_row)

    @property
    def grid(self) -> dict[str, int]:
        """The grid of a kernel, for `Target.kernel`."""
        return {"column": self.columns, "split": self.splits}

    @property
    def layout(self) -> Any:
        """Layout of a tile in registers."""
        return _layout(self.width)

    def channels_of_block(self) -> Any:
        """Returns the channels that this block works on, as an index."""
        return pl.ds(jax.lax.axis_index("column") * self.width, self.width)

    def for_each[Carry](
        self, work: Callable[[jax.Array, jax.Array, Carry], Carry], carry: Carry
    ) -> Carry:
        """Calls a function for each tile of this block.

        Args:
          work: from the row of the batch, the `positions` of the tile and the carry, to the next
            carry.
          carry: for the first tile.

        Returns:
          The carry after the last tile.
        """
        split = jax.lax.axis_index("split")
        total = self.rows * self.tiles_per_row
        count = jax.lax.div(total - 1 - split, jnp.int32(self.splits)) + 1

        def step(i, carry):
            row, tile = divide(split + i * self.splits, self.tiles_per_row)
            tokens = tile * self.height + self._row_numbers()
            positions = jnp.where(tokens < self.tokens, tokens, jnp.full_like(tokens, NONE))
            return work(row, positions, carry)

        return jax.lax.fori_loop(0, count, step, carry)

    def _row_numbers(self) -> jax.Array:
        layout = self.layout.reduce(1)
        return plgpu.broadcasted_iota(jnp.int32, (self.height,), 0, layout=layout)

    def load_parameter(self, parameter_gmem: Any) -> jax.Array:
        """Loads parameters `[channels]` float32, and repeats them for each token of a tile."""
        if is_interpreted():
            return jnp.broadcast_to(parameter_gmem[...][None], (self.height, self.width))
        result = _tile_type(self.width)
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
        return inline(functools.partial(_load_parameter, width=self.width))(parameter_gmem)

    def zeros(self) -> jax.Array:
        """Returns a tile of zeros."""
        zeros = jnp.zeros((self.height, self.width), jnp.float32)
        return plgpu.layout_cast(zeros, self.layout)

    def partial_sums(self, *axes: int) -> jax.ShapeDtypeStruct:
        """Returns the type of the sums that `store_sums` writes for parameters `[*axes, C]`."""
        shape = (self.splits, *axes, self.height, self.channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)


def check_served(**arrays: Any) -> None:
    """Raises NotServed unless all arrays are bfloat16, with a multiple of 64 channels `[.., C]`."""
    for name, x in arrays.items():
        if x.dtype != jnp.bfloat16 or x.shape[-1] % HEAD:
            raise NotServed(
                f"mosaic_gpu needs bfloat16 and channels in multiples of {HEAD}, got "
                f"{name}.dtype={x.dtype.name}, {name}.shape={x.shape}"
            )


def check_bfloat16(ref: Any) -> None:
    """Raises TypeError unless memory that is read as bfloat16 holds that."""
    if ref.dtype != jnp.bfloat16:
        raise TypeError(f"expected a reference to bfloat16, got {ref.dtype}")


def check_heads(**arrays: Any) -> None:
    """Raises NotServed unless all arrays `[B, T, H, _]` are bfloat16, with 64 channels per head."""
    for name, x in arrays.items():
        if x.dtype != jnp.bfloat16 or x.shape[-1] != HEAD:
            raise NotServed(
                f"mosaic_gpu needs bfloat16 and heads of {HEAD} channels, got "
                f"{name}.dtype={x.dtype.name}, {name}.shape={x.shape}"
            )


def tiles_of(target: Target, x: jax.Array, *, registers: int) -> Tiles:
    """Returns the tiles of an array `[B, T, C]`.

    Args:
      target: what the kernel is compiled for.
      x: the array.
      registers: about as many as a thread of the kernel needs.
    """
    rows, tokens, channels = x.shape
    return Tiles(rows, tokens, channels, target.blocks_at_once(registers))


def load(x_gmem: Any, positions: jax.Array) -> jax.Array:
    """Loads the tokens at some positions.

    Args:
      x_gmem: `[T, channels]` bfloat16 in global memory, the channels of a tile.
      positions: int32, as `Tiles.for_each` gives them. A position below 0 gives zeros.

    Returns:
      A float32 tile.
    """
    check_bfloat16(x_gmem)
    if is_interpreted():
        taken = jnp.take(x_gmem[...], jnp.maximum(positions, 0), axis=0).astype(jnp.float32)
        return jnp.where((positions < 0)[:, None], 0, taken)
    width = x_gmem.shape[-1]
    inline = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _layout(width).reduce(1)), return_type=_tile_type(width)
    )
    return inline(functools.partial(_load, width=width))(x_gmem, positions)


def store(x_gmem: Any, positions: jax.Array, tile: jax.Array, *, dithered: bool = False) -> None:
    """Rounds a float32 tile to bfloat16 and writes it.

    Rounding to nearest rounds equal tokens alike. A sum over tokens, such as the state of `wkv7`,
    then has the same error many times. With `dithered`, the token's position helps to decide
    whether a number is rounded up or down, so that errors of equal tokens cancel. A single error is
    up to twice as large. Numbers that bfloat16 holds do not change.

    Args:
      x_gmem: `[T, channels]` bfloat16 in global memory.
      positions: of the tile. Rows whose position is below 0 are not written.
      tile: float32.
      dithered: whether to round by position.
    """
    if is_interpreted():
        tile = _dithered(tile, positions) if dithered else tile
        for row in range(tile.shape[0]):
            _store_row(x_gmem, positions[row], tile[row])
        return
    layout = _layout(tile.shape[1])
    inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout.reduce(1), layout))
    inline(functools.partial(_store, dithered=dithered))(x_gmem, positions, tile)


def store_sums(sums_gmem: Any, tile: jax.Array) -> None:
    """Writes sums over tokens, one for each row of the tile, which are to be added up.

    Args:
      sums_gmem: `[height, channels]` float32 in global memory, of `Tiles.partial_sums`.
      tile: float32.
    """
    if is_interpreted():
        sums_gmem[...] = tile
        return
    inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _layout(tile.shape[1])))
    inline(_store_sums)(sums_gmem, tile)


def sum_over_heads(tile: jax.Array) -> jax.Array:
    """Sums a float32 tile over each head of 64 channels, and repeats the sum for each of them."""
    if is_interpreted():
        heads = tile.reshape(tile.shape[0], -1, HEAD)
        return jnp.broadcast_to(heads.sum(-1, keepdims=True), heads.shape).reshape(tile.shape)
    layout = _layout(tile.shape[1])
    inline = plgpu.inline_mgpu(arg_types=(layout,), return_type=_tile_type(tile.shape[1]))
    return inline(_sum_over_heads)(tile)


def _layout(width: int) -> Any:
    of_warp = _LANES * VECTOR // width  # tokens
    if of_warp == 1:
        tiling = plgpu.Tiling(((_WARPS, width), (VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((_WARPS * of_warp, width), (of_warp, width), (VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _tile_type(width: int) -> plgpu.ShapeDtypeStruct:
    height = _WARPS * _LANES * VECTOR // width
    return plgpu.ShapeDtypeStruct((height, width), jnp.float32, layout=_layout(width))


def _dithered(tile: jax.Array, positions: jax.Array) -> jax.Array:
    """Rounds a tile as `_dither_to_bits` does, for the interpreter."""
    bits = jax.lax.bitcast_convert_type(tile, jnp.int32)
    threshold = (positions * _GOLDEN) & 0xFFFF
    rounded = (bits + threshold[:, None]) & -0x10000
    return jnp.where(jnp.isnan(tile), tile, jax.lax.bitcast_convert_type(rounded, jnp.float32))


def _store_row(x_gmem: Any, position: jax.Array, row: jax.Array) -> None:
    @pl.when(position >= 0)
    def _():
        x_gmem[position] = row.astype(x_gmem.dtype)


# The functions below take and return MLIR values, or the registers that a thread holds. A thread
# holds eight channels of one token: one register of a fragmented array.


def _tile(values: Sequence[Any], width: int) -> Any:
    """Makes a tile of the eight float32 numbers of each thread."""
    layout = _layout(width).to_mgpu()
    shape = layout.registers_shape((_WARPS * _LANES * VECTOR // width, width))
    registers = np.array([make_vector(values)], dtype=object).reshape(shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _values(tile: Any) -> list[Any]:
    (vector,) = tile.registers.flat
    return values_of(vector)


def _position(positions: Any) -> Any:
    """Returns the position of this thread's token, an integer."""
    (vector,) = positions.registers.flat
    return llvm.extractelement(vector, position=integer(0))


def _pointer(ref: Any, position: Any | None, width: int, first: int = 0) -> Any:
    """Returns the address of this thread's channels, of the token at a position if there is one."""
    i64 = ir.IntegerType.get_signless(64)
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    size = utils.bytewidth(ir.MemRefType(ref.type).element_type)
    lane = arith.andi(thread_index(), integer(width // VECTOR - 1))
    offset = arith.extui(i64, arith.addi(arith.muli(lane, integer(VECTOR * size)), integer(first)))
    if position is not None:
        row = arith.muli(arith.extsi(i64, position), mgpu.c(strides[0] * size, i64))
        offset = arith.addi(offset, row)
    return arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(ref)), offset)


def _load(_: Any, ref: Any, positions: Any, width: int) -> Any:
    position = _position(positions)
    exists = arith.cmpi(arith.CmpIPredicate.sge, position, integer(0))
    words = load_if(exists, _pointer(ref, position, width))
    return _tile([value for word in words for value in widen_bits(word)], width)


def _load_parameter(_: Any, ref: Any, width: int) -> Any:
    f32 = ir.F32Type.get()
    always = mgpu.c(1, ir.IntegerType.get_signless(1))
    words = [
        word
        for first in (0, 16)  # bytes
        for word in load_if(always, _pointer(ref, None, width, first))
    ]
    return _tile([utils.bitcast(word, f32) for word in words], width)


def _store(_: Any, ref: Any, positions: Any, tile: Any, dithered: bool) -> None:
    position, values = _position(positions), _values(tile)
    exists = arith.cmpi(arith.CmpIPredicate.sge, position, integer(0))
    pairs = list(zip(values[::2], values[1::2], strict=True))
    if dithered:
        threshold = arith.andi(arith.muli(position, integer(_GOLDEN)), integer(0xFFFF))
        words = [_dither_to_bits(first, second, threshold) for first, second in pairs]
    else:
        words = [narrow_to_bits(first, second) for first, second in pairs]
    store_if(exists, _pointer(ref, position, tile.shape[1]), words)


def _dither_to_bits(first: Any, second: Any, threshold: Any) -> Any:
    """Rounds two float32 numbers to a pair of bfloat16.

    Adding the threshold carries into the bits of bfloat16 if the bits below them are large enough.
    """
    # NaN stays as it is: a carry could make it a number.
    add = "add.u32 {0}, ${1}, $3; setp.nan.f32 nan, ${1}, ${1}; selp.b32 {0}, ${1}, {0}, nan;"
    ptx = (
        "{ .reg .pred nan; .reg .b32 low, high;"
        f" {add.format('low', 1)} {add.format('high', 2)}"
        " prmt.b32 $0, low, high, 0x7632; }"
    )
    bits = [utils.bitcast(value, integer(0).type) for value in (first, second)]
    return utils.inline_ptx(ptx, *bits, threshold, result_types=integer(0).type)


def _store_sums(_: Any, ref: Any, tile: Any) -> None:
    width, values = tile.shape[1], _values(tile)
    row = arith.divui(thread_index(), integer(width // VECTOR))
    words = [utils.bitcast(value, integer(0).type) for value in values]
    always = mgpu.c(1, ir.IntegerType.get_signless(1))
    for i in (0, 4):
        store_if(always, _pointer(ref, row, width, 4 * i), words[i : i + 4])


def _sum_over_heads(_: Any, tile: Any) -> Any:
    total = functools.reduce(arith.addf, _values(tile))
    for distance in (1, 2, 4):
        total = arith.addf(total, utils.shfl_bfly(total, distance))
    return _tile([total] * VECTOR, tile.shape[1])


__all__ = [
    "HEAD",
    "NONE",
    "Tiles",
    "check_bfloat16",
    "check_heads",
    "check_served",
    "load",
    "store",
    "store_sums",
    "sum_over_heads",
    "tiles_of",
]
