"""Whole tokens in the registers of a warpgroup, for kernels that sum over a token's channels.

A token is a float32 vector `[C]`, padded with zeros so that each thread holds eight neighbouring
channels of every 1024. Memory holds bfloat16. A block of the grid works on a few tokens at a time,
and its threads keep the same channels all the time.

Sums over channels cross warps, through shared memory. So sums of several tokens are made at once.
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
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.hopper.registers import integer, narrow_to_bits, thread_index, widen_bits
from pallas_kernels.hopper.target import is_interpreted
from pallas_kernels.hopper.vectors import VECTOR, load_if, make_vector, store_if, values_of

_THREADS = 128
WIDTH = VECTOR * _THREADS
"""Channels that all threads hold in one register each."""

LOWEST = -3e38
"""Stands for minus infinity, close to the lowest float32: differences to it stay finite."""

_WARPS = 4
_AT_ONCE = 4
"""Registers, of eight channels each, that a thread holds of all tokens it works on at once."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How tokens `[N, C]` are divided among the blocks of a grid.

    Attributes:
      count: N.
      channels: C, a multiple of 8.
      most_blocks: number of blocks that the GPU runs at once.
    """

    count: int
    channels: int
    most_blocks: int

    @property
    def padded(self) -> int:
        """Channels of a vector."""
        return -(-self.channels // WIDTH) * WIDTH

    @property
    def at_once(self) -> int:
        """Tokens that a block works on at a time."""
        return max(1, _AT_ONCE * WIDTH // self.padded)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return min(self.most_blocks, -(-self.count // self.at_once))

    @property
    def grid(self) -> dict[str, int]:
        """The grid of a kernel, for `Target.kernel`."""
        return {"block": self.blocks}

    def scratch_type(self, sums: int) -> Any:
        """Returns the type of shared memory for one call of `sum_channels`.

        Args:
          sums: number of vectors that are summed.
        """
        return plgpu.SMEM((sums, _WARPS), jnp.float32)

    def for_each[Carry](
        self, work: Callable[[list[jax.Array], Carry], Carry], carry: Carry
    ) -> Carry:
        """Calls a function for all tokens of this block, some at a time.

        Args:
          work: from `at_once` positions and the carry to the next carry. A position of N or more
            stands for no token.
          carry: for the first tokens.

        Returns:
          The carry after the last tokens.
        """
        block = jax.lax.axis_index("block")
        steps = -(-self.count // self.at_once)
        turns = jax.lax.div(steps - 1 - block, jnp.int32(self.blocks)) + 1

        def step(i, carry):
            first = (block + i * self.blocks) * self.at_once
            return work([first + n for n in range(self.at_once)], carry)

        return jax.lax.fori_loop(0, turns, step, carry)

    def zeros(self) -> jax.Array:
        """Returns a vector of zeros."""
        zeros = jnp.zeros((self.padded,), jnp.float32)
        return plgpu.layout_cast(zeros, _layout(self.padded))

    def load(self, x_gmem: Any, position: jax.Array) -> jax.Array:
        """Loads a token of `[N, C]` bfloat16; zeros if the position is N or more."""
        if x_gmem.dtype != jnp.bfloat16:
            raise TypeError(f"expected a reference to bfloat16, got {x_gmem.dtype}")
        if is_interpreted():
            token = x_gmem[jnp.minimum(position, self.count - 1)].astype(jnp.float32)
            token = jnp.where(position < self.count, token, 0)
            return jnp.pad(token, (0, self.padded - self.channels))
        inline = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=self._vector_type()
        )
        return inline(functools.partial(_load, self))(x_gmem, position)

    def load_parameter(self, parameter_gmem: Any) -> jax.Array:
        """Loads parameters `[C]` float32."""
        if is_interpreted():
            return jnp.pad(parameter_gmem[...], (0, self.padded - self.channels))
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=self._vector_type())
        return inline(functools.partial(_load_parameter, self))(parameter_gmem)

    def store(self, x_gmem: Any, position: jax.Array, token: jax.Array) -> None:
        """Rounds a token to bfloat16 and writes it, unless its position is N or more."""
        if is_interpreted():

            @pl.when(position < self.count)
            def _():
                x_gmem[position] = token[: self.channels].astype(x_gmem.dtype)

            return
        layout = _layout(self.padded)
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, layout))
        inline(functools.partial(_store, self))(x_gmem, position, token)

    def store_sums(self, sums_gmem: Any, sums: jax.Array) -> None:
        """Writes a vector to `[C]` float32."""
        if is_interpreted():
            sums_gmem[...] = sums[: self.channels]
            return
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _layout(self.padded)))
        inline(functools.partial(_store_sums, self))(sums_gmem, sums)

    def mask(self, vector: jax.Array) -> jax.Array:
        """Sets the channels of padding to zero."""
        if self.padded == self.channels:
            return vector
        if is_interpreted():
            return jnp.where(jnp.arange(self.padded) < self.channels, vector, 0)
        layout = _layout(self.padded)
        inline = plgpu.inline_mgpu(arg_types=(layout,), return_type=self._vector_type())
        return inline(functools.partial(_mask, self))(vector)

    def sum_channels(self, scratch: Any, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        """Sums vectors over their channels.

        Args:
          scratch: shared memory of `scratch_type`. A kernel needs two of them at least, to use in
            turn: a sum may still be read when the next one is written.
          vectors: as many as `scratch` is for.

        Returns:
          Each sum, repeated for all channels.
        """
        if is_interpreted():
            return [jnp.broadcast_to(x.sum(), x.shape) for x in vectors]
        return self._reduce(arith.addf, scratch, vectors)

    def max_channels(self, scratch: Any, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns the largest channel of each vector, like `sum_channels`, but with padding."""
        if is_interpreted():
            return [jnp.broadcast_to(x.max(), x.shape) for x in vectors]
        return self._reduce(arith.maximumf, scratch, vectors)

    def channel_numbers(self) -> jax.Array:
        """Returns the number of each channel, in float32."""
        if is_interpreted():
            return jnp.arange(self.padded, dtype=jnp.float32)
        inline = plgpu.inline_mgpu(arg_types=(), return_type=self._vector_type())
        return inline(functools.partial(_channel_numbers, self))()

    def store_scalars(self, scalars_gmem: Any, vectors: Sequence[jax.Array]) -> None:
        """Writes one number of each of four vectors, whose channels are all the same.

        Args:
          scalars_gmem: `[4]` float32.
          vectors: four, as `sum_channels` makes them.
        """
        if is_interpreted():
            scalars_gmem[...] = jnp.stack([x[0] for x in vectors])
            return
        layout = _layout(self.padded)
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (layout,) * len(vectors)))
        inline(_store_scalars)(scalars_gmem, tuple(vectors))

    def _reduce(self, combine: Any, scratch: Any, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        layout = _layout(self.padded)
        inline = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), (layout,) * len(vectors)),
            return_type=(self._vector_type(),) * len(vectors),
        )
        return list(inline(functools.partial(_reduce, combine))(scratch, tuple(vectors)))

    def _vector_type(self) -> plgpu.ShapeDtypeStruct:
        layout = _layout(self.padded)
        return plgpu.ShapeDtypeStruct((self.padded,), jnp.float32, layout=layout)


def _layout(padded: int) -> Any:
    return plgpu.Layout.WG_STRIDED((padded,), vec_size=VECTOR)


# The functions below take and return MLIR values, or the registers that a thread holds. Register i
# of a vector holds channels `1024 i + 8 thread` and the seven after it.


def _channel(i: int) -> Any:
    thread = arith.andi(thread_index(), integer(_THREADS - 1))
    return arith.addi(arith.muli(thread, integer(VECTOR)), integer(i * WIDTH))


def _vector(tokens: Tokens, registers: Sequence[Any]) -> Any:
    layout = _layout(tokens.padded).to_mgpu()
    shape = layout.registers_shape((tokens.padded,))
    array = np.array(registers, dtype=object).reshape(shape)
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def _less(x: Any, y: int) -> Any:
    return arith.cmpi(arith.CmpIPredicate.slt, x, integer(y))


def _places(tokens: Tokens, ref: Any, position: Any | None, size: int) -> list[tuple[Any, Any]]:
    """Returns for each register of a vector whether it is in memory, and its address there.

    Args:
      tokens: of the kernel.
      ref: `[N, C]`, or `[C]` if there is no position.
      position: of the token.
      size: bytes of a channel in memory.
    """
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    if position is not None:
        row = arith.muli(arith.extsi(i64, position), mgpu.c(tokens.channels * size, i64))
        base = arith.addi(base, row)
    places = []
    for i in range(tokens.padded // WIDTH):
        channel = _channel(i)
        exists = _less(channel, tokens.channels)
        if position is not None:
            exists = arith.andi(exists, _less(position, tokens.count))
        offset = arith.extui(i64, arith.muli(channel, integer(size)))
        places.append((exists, arith.addi(base, offset)))
    return places


def _load(tokens: Tokens, _: Any, ref: Any, position: Any) -> Any:
    places = _places(tokens, ref, position.registers.item(), 2)
    loaded = [load_if(exists, address) for exists, address in places]
    return _vector(
        tokens, [make_vector([x for word in words for x in widen_bits(word)]) for words in loaded]
    )


def _load_parameter(tokens: Tokens, _: Any, ref: Any) -> Any:
    f32, registers = ir.F32Type.get(), []
    for exists, address in _places(tokens, ref, None, 4):
        second = arith.addi(address, mgpu.c(16, address.type))
        words = load_if(exists, address) + load_if(exists, second)
        registers.append(make_vector([utils.bitcast(word, f32) for word in words]))
    return _vector(tokens, registers)


def _store(tokens: Tokens, _: Any, ref: Any, position: Any, token: Any) -> None:
    places = _places(tokens, ref, position.registers.item(), 2)
    for (exists, address), register in zip(places, token.registers.flat, strict=True):
        values = values_of(register)
        words = [narrow_to_bits(*values[i : i + 2]) for i in range(0, VECTOR, 2)]
        store_if(exists, address, words)


def _store_sums(tokens: Tokens, _: Any, ref: Any, sums: Any) -> None:
    i32 = integer(0).type
    places = _places(tokens, ref, None, 4)
    for (exists, address), register in zip(places, sums.registers.flat, strict=True):
        words = [utils.bitcast(value, i32) for value in values_of(register)]
        store_if(exists, address, words[:4])
        store_if(exists, arith.addi(address, mgpu.c(16, address.type)), words[4:])


def _mask(tokens: Tokens, _: Any, vector: Any) -> Any:
    registers = []
    for i, register in enumerate(vector.registers.flat):
        exists = _less(_channel(i), tokens.channels)
        zero = mgpu.c(0.0, ir.F32Type.get())
        registers.append(make_vector([arith.select(exists, x, zero) for x in values_of(register)]))
    return _vector(tokens, registers)


def _channel_numbers(tokens: Tokens, _: Any) -> Any:
    f32, registers = ir.F32Type.get(), []
    for i in range(tokens.padded // WIDTH):
        numbers = [arith.addi(_channel(i), integer(n)) for n in range(VECTOR)]
        registers.append(make_vector([arith.uitofp(f32, number) for number in numbers]))
    return _vector(tokens, registers)


def _store_scalars(_: Any, ref: Any, vectors: Sequence[Any]) -> None:
    i32, i64 = integer(0).type, ir.IntegerType.get_signless(64)
    words = [utils.bitcast(values_of(x.registers.flat[0])[0], i32) for x in vectors]
    thread = arith.andi(thread_index(), integer(_THREADS - 1))
    is_first = arith.cmpi(arith.CmpIPredicate.eq, thread, integer(0))
    store_if(is_first, llvm.ptrtoint(i64, utils.memref_ptr(ref)), words)


def _reduce(combine: Any, _: Any, scratch: Any, vectors: Sequence[Any]) -> list[Any]:
    index = ir.IndexType.get()
    thread = arith.andi(thread_index(), integer(_THREADS - 1))
    warp = arith.index_cast(index, arith.shrui(thread, integer(5)))
    is_first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, integer(31)), integer(0))
    totals = []
    for vector in vectors:
        values = [x for register in vector.registers.flat for x in values_of(register)]
        total = functools.reduce(combine, values)
        for distance in (1, 2, 4, 8, 16):
            total = combine(total, utils.shfl_bfly(total, distance))
        totals.append(total)
    with mgpu.when(is_first):
        for i, total in enumerate(totals):
            memref.store(total, scratch, [mgpu.c(i, index), warp])
    utils.warpgroup_barrier()
    results = []
    for i, vector in enumerate(vectors):
        of_warps = [
            memref.load(scratch, [mgpu.c(i, index), mgpu.c(w, index)]) for w in range(_WARPS)
        ]
        register = make_vector([functools.reduce(combine, of_warps)] * VECTOR)
        registers = np.array([register] * vector.registers.size, dtype=object)
        results.append(
            mgpu.FragmentedArray(
                _registers=registers.reshape(vector.registers.shape),
                _layout=vector.layout,
                _is_signed=None,
            )
        )
    return results


__all__ = ["LOWEST", "WIDTH", "Tokens"]
