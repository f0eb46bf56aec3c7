"""Whole tokens in the registers of a block, for kernels that pass over tokens.

A token is a float32 vector `[C]`, padded with zeros so that each thread of a warpgroup holds eight
neighbouring channels of every 1024. Memory holds bfloat16. A block of the grid works on a few
tokens at a time, and its threads keep the same channels all the time. Several warpgroups can share
a token: each has a vector of its own, with every other 1024 channels if there are two.

Sums over channels cross warps, through shared memory. So sums of several tokens are made at once.
Kernels without such sums can divide tokens into columns, so that blocks share a token.
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
from jaxlib.mlir.dialects import arith, gpu, llvm, memref

from pallas_kernels.hopper.registers import (
    SCALAR,
    address_of,
    integer,
    narrow_to_bits,
    thread_index,
    widen_bits,
)
from pallas_kernels.hopper.target import is_interpreted
from pallas_kernels.hopper.vectors import (
    VECTOR,
    load_if,
    load_shared,
    make_vector,
    store_if,
    values_of,
)

_THREADS = 128
WIDTH = VECTOR * _THREADS
"""Channels that all threads hold in one register each."""

LOWEST = -3e38
"""Stands for minus infinity, close to the lowest float32: differences to it stay finite."""

_WARPS = 4


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How tokens `[N, C]` are divided among the blocks of a grid.

    Attributes:
      count: N.
      channels: C, a multiple of 8.
      most_blocks: most blocks of the grid; for example as many as the GPU runs at once.
      warpgroups: number of warpgroups of a block, which share each token.
      columns: number of blocks that share each token, the fastest axis "column" of the grid. Each
        has one warpgroup, and 1024 channels or, in the last column, the rest.
      vectors: number of vectors of 1024 channels that a block works on at a time, in `for_each`:
        those of several tokens if one has fewer.
      in_order: whether the tokens of a block follow one another, in `for_each`. Else blocks take
        tokens in turn.
    """

    count: int
    channels: int
    most_blocks: int
    warpgroups: int = 1
    columns: int = 1
    vectors: int = 4
    in_order: bool = False

    @property
    def padded(self) -> int:
        """Channels of a vector, which one warpgroup holds."""
        return -(-self.channels // (WIDTH * self.parts)) * WIDTH

    @property
    def channels_of_block(self) -> int:
        """Channels of a token that a block has; the last column may have fewer."""
        return min(self.channels, WIDTH) if self.columns > 1 else self.channels

    @property
    def parts(self) -> int:
        """Number of vectors of a token, one for each of the warpgroups that share it."""
        return self.warpgroups * self.columns

    @property
    def at_once(self) -> int:
        """Tokens that a block works on at a time, in `for_each`."""
        return max(1, self.vectors * WIDTH // self.padded)

    @property
    def _steps(self) -> int:
        """Number of steps of all blocks in `for_each`."""
        return -(-self.count // self.at_once)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return min(self.most_blocks, self._steps)

    @property
    def grid(self) -> dict[str, int]:
        """The grid of a kernel, for `Target.kernel`."""
        return {"block": self.blocks}

    def scratch_type(self, sums: int) -> Any:
        """Returns the type of shared memory for one call of `sum_channels`.

        Args:
          sums: number of vectors that are summed.
        """
        return plgpu.SMEM((sums, _WARPS * self.warpgroups), jnp.float32)

    def scratch_barrier_type(self) -> plgpu.Barrier:
        """Returns the type of the barrier by which warpgroups that are interpreted share sums."""
        return plgpu.Barrier(num_arrivals=self.warpgroups)

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
        if self.in_order:
            turns = jnp.int32(-(-self._steps // self.blocks))
            begin, stride = block * turns, 1
        else:
            turns = jax.lax.div(self._steps - 1 - block, jnp.int32(self.blocks)) + 1
            begin, stride = block, self.blocks

        def step(i, carry):
            first = (begin + i * stride) * self.at_once
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
            token = x_gmem[jnp.minimum(position, x_gmem.shape[0] - 1)].astype(jnp.float32)
            return self._own_channels(jnp.where(position < self.count, token, 0))
        inline = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), SCALAR), return_type=self._vector_type()
        )
        return inline(functools.partial(_load, self))(x_gmem, position)

    def load_shared(self, tokens_smem: Any, index: int) -> jax.Array:
        """Loads one of some tokens in shared memory.

        There is no barrier: what copied the token must be waited for before.

        Args:
          tokens_smem: bfloat16, one token after the other, each in the order of its channels:
            those of the column if there are several.
          index: of the token.
        """
        if is_interpreted():
            token = tokens_smem[index].reshape(-1).astype(jnp.float32)
            return self._own_channels(token) if self.columns == 1 else self.mask(token)
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=self._vector_type())
        return inline(functools.partial(_load_shared, self, index))(tokens_smem)

    def where(self, condition: jax.Array, x: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """Returns x if a scalar is true, else y, or zeros if there is no y."""
        y = self.zeros() if y is None else y
        if is_interpreted():
            return jnp.where(condition, x, y)
        layout = _layout(self.padded)
        inline = plgpu.inline_mgpu(
            arg_types=(SCALAR, layout, layout), return_type=self._vector_type()
        )
        return inline(functools.partial(_where, self))(condition.astype(jnp.int32), x, y)

    def load_parameter(self, parameter_gmem: Any, condition: jax.Array | None = None) -> jax.Array:
        """Loads parameters `[C]` float32; zeros if there is a scalar condition, which is false."""
        if is_interpreted():
            values = parameter_gmem[...]
            values = values if condition is None else jnp.where(condition, values, 0)
            return self._own_channels(values)
        conditions = () if condition is None else (condition.astype(jnp.int32),)
        inline = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *(SCALAR for _ in conditions)),
            return_type=self._vector_type(),
        )
        return inline(functools.partial(_load_parameter, self))(parameter_gmem, *conditions)

    def store(
        self, x_gmem: Any, position: jax.Array, token: jax.Array, *, streams: bool = False
    ) -> None:
        """Rounds a token to bfloat16 and writes it, unless its position is N or more.

        Args:
          x_gmem: `[N, C]` bfloat16.
          position: of the token.
          token: a vector.
          streams: as for `store_if`.
        """
        if is_interpreted():

            @pl.when(position < self.count)
            def _():
                self._store_own_channels(x_gmem.at[position], token.astype(x_gmem.dtype))

            return
        layout = _layout(self.padded)
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, layout))
        inline(functools.partial(_store, self, streams))(x_gmem, position, token)

    def own_rows(self, warpgroup: int, width: int) -> Any:
        """Returns which rows of a token `[C / width, width]` a warpgroup holds.

        Only for tokens of which each warpgroup holds 1024 channels at most.
        """
        if self.padded != WIDTH:
            raise ValueError(f"expected at most {WIDTH} channels, got {self.padded}")
        first = warpgroup * WIDTH
        return pl.ds(first // width, min(WIDTH, self.channels - first) // width)

    def store_sums(self, sums_gmem: Any, sums: jax.Array) -> None:
        """Writes a vector to `[C]` float32."""
        if is_interpreted():
            self._store_own_channels(sums_gmem, sums)
            return
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _layout(self.padded)))
        inline(functools.partial(_store_sums, self))(sums_gmem, sums)

    def mask(self, vector: jax.Array) -> jax.Array:
        """Sets the channels of padding to zero."""
        if self.padded * self.parts == self.channels:
            return vector
        if is_interpreted():
            return jnp.where(self._own_channels(jnp.ones(self.channels)) > 0, vector, 0)
        layout = _layout(self.padded)
        inline = plgpu.inline_mgpu(arg_types=(layout,), return_type=self._vector_type())
        return inline(functools.partial(_mask, self))(vector)

    def sum_channels(
        self, scratch: Any, vectors: Sequence[jax.Array], barrier: Any = None
    ) -> list[jax.Array]:
        """Sums vectors over their channels.

        All threads of the block wait for each other.

        Args:
          scratch: shared memory of `scratch_type`. A kernel needs two of them at least, to use in
            turn: a sum may still be read when the next one is written.
          vectors: as many as `scratch` is for.
          barrier: of `scratch_barrier_type`, if several warpgroups share tokens.

        Returns:
          Each sum, repeated for all channels.
        """
        if is_interpreted():
            sums = [x.sum() for x in vectors]
            if self.warpgroups > 1:
                for i, total in enumerate(sums):
                    scratch[i, jax.lax.axis_index("warpgroup")] = total
                plgpu.barrier_arrive(barrier)
                plgpu.barrier_wait(barrier)
                parts = range(self.warpgroups)
                sums = [sum(scratch[i, w] for w in parts) for i in range(len(sums))]
            return [jnp.full(x.shape, total) for x, total in zip(vectors, sums, strict=True)]
        return self._reduce(arith.addf, scratch, vectors)

    def max_channels(self, scratch: Any, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns the largest channel of each vector, like `sum_channels`, but with padding.

        Only for tokens of one warpgroup.
        """
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
        reduce = functools.partial(_reduce, combine, self.warpgroups)
        return list(inline(reduce)(scratch, tuple(vectors)))

    def _own_channels(self, channels: jax.Array) -> jax.Array:
        """Returns this warpgroup's vector of all channels, for the interpreter."""
        padding = self.padded * self.parts - self.channels
        parts = jnp.pad(channels, (0, padding)).reshape(-1, self.parts, WIDTH)
        if self.parts == 1:
            return parts.reshape(-1)
        own = jax.lax.dynamic_index_in_dim(parts, self._part(), axis=1, keepdims=False)
        return own.reshape(-1)

    def _part(self) -> jax.Array:
        return jax.lax.axis_index("warpgroup" if self.columns == 1 else "column")

    def _store_own_channels(self, ref: Any, vector: jax.Array) -> None:
        """Writes this warpgroup's vector to its channels, for the interpreter."""
        for part in range(self.parts):

            def store(part: int = part) -> None:
                for i in range(self.padded // WIDTH):
                    first = (i * self.parts + part) * WIDTH
                    size = min(WIDTH, self.channels - first)
                    if size > 0:
                        ref[first : first + size] = vector[i * WIDTH : i * WIDTH + size]

            if self.parts == 1:
                store()
            else:
                pl.when(self._part() == part)(store)

    def _vector_type(self) -> plgpu.ShapeDtypeStruct:
        layout = _layout(self.padded)
        return plgpu.ShapeDtypeStruct((self.padded,), jnp.float32, layout=layout)


def _layout(padded: int) -> Any:
    return plgpu.Layout.WG_STRIDED((padded,), vec_size=VECTOR)


# The functions below take and return MLIR values, or the registers that a thread holds. Register i
# of a vector holds channels `1024 warpgroups i + 8 thread` and the seven after it, where threads of
# all warpgroups that share a token are counted; or `1024 column + 8 thread`.


def _channel(tokens: Tokens, i: int) -> Any:
    thread = thread_index()
    if tokens.warpgroups == 1:
        thread = arith.andi(thread, integer(_THREADS - 1))
    channel = arith.muli(thread, integer(VECTOR))
    if tokens.columns > 1:
        column = arith.index_cast(integer(0).type, gpu.block_id(gpu.Dimension.x))
        return arith.addi(channel, arith.muli(column, integer(WIDTH)))
    return arith.addi(channel, integer(i * WIDTH * tokens.warpgroups))


def _vector(tokens: Tokens, registers: Sequence[Any]) -> Any:
    layout = _layout(tokens.padded).to_mgpu()
    shape = layout.registers_shape((tokens.padded,))
    array = np.array(registers, dtype=object).reshape(shape)
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def _less(x: Any, y: int) -> Any:
    return arith.cmpi(arith.CmpIPredicate.slt, x, integer(y))


def _is_true(condition: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ne, condition.registers.item(), integer(0))


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
        channel = _channel(tokens, i)
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


def _load_shared(tokens: Tokens, index: int, _: Any, ref: Any) -> Any:
    # All loads of a step share an address. The compiler may keep it, unlike those of other memory.
    i32, registers = integer(0).type, []
    thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
    if tokens.warpgroups == 1:
        thread = arith.andi(thread, integer(_THREADS - 1))
    address = arith.addi(address_of(ref), arith.muli(thread, integer(2 * VECTOR)))
    for i in range(tokens.padded // WIDTH):
        first = i * WIDTH * tokens.warpgroups
        exists = None  # without a condition if all threads have channels
        if first + WIDTH * tokens.parts > tokens.channels:
            exists = _less(_channel(tokens, i), tokens.channels)
        offset = 2 * (index * tokens.channels_of_block + first)
        words = load_shared(address, offset, exists)
        registers.append(make_vector([x for word in words for x in widen_bits(word)]))
    return _vector(tokens, registers)


def _where(tokens: Tokens, _: Any, condition: Any, x: Any, y: Any) -> Any:
    is_true = _is_true(condition)
    pairs = zip(x.registers.flat, y.registers.flat, strict=True)
    return _vector(tokens, [arith.select(is_true, *pair) for pair in pairs])


def _load_parameter(tokens: Tokens, _: Any, ref: Any, condition: Any | None = None) -> Any:
    f32, registers = ir.F32Type.get(), []
    for exists, address in _places(tokens, ref, None, 4):
        if condition is not None:
            exists = arith.andi(exists, _is_true(condition))
        second = arith.addi(address, mgpu.c(16, address.type))
        words = load_if(exists, address) + load_if(exists, second)
        registers.append(make_vector([utils.bitcast(word, f32) for word in words]))
    return _vector(tokens, registers)


def _store(tokens: Tokens, streams: bool, _: Any, ref: Any, position: Any, token: Any) -> None:
    places = _places(tokens, ref, position.registers.item(), 2)
    for (exists, address), register in zip(places, token.registers.flat, strict=True):
        values = values_of(register)
        words = [narrow_to_bits(*values[i : i + 2]) for i in range(0, VECTOR, 2)]
        store_if(exists, address, words, streams=streams)


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
        exists = _less(_channel(tokens, i), tokens.channels)
        zero = mgpu.c(0.0, ir.F32Type.get())
        registers.append(make_vector([arith.select(exists, x, zero) for x in values_of(register)]))
    return _vector(tokens, registers)


def _channel_numbers(tokens: Tokens, _: Any) -> Any:
    f32, registers = ir.F32Type.get(), []
    for i in range(tokens.padded // WIDTH):
        numbers = [arith.addi(_channel(tokens, i), integer(n)) for n in range(VECTOR)]
        registers.append(make_vector([arith.uitofp(f32, number) for number in numbers]))
    return _vector(tokens, registers)


def _store_scalars(_: Any, ref: Any, vectors: Sequence[Any]) -> None:
    i32, i64 = integer(0).type, ir.IntegerType.get_signless(64)
    words = [utils.bitcast(values_of(x.registers.flat[0])[0], i32) for x in vectors]
    thread = arith.andi(thread_index(), integer(_THREADS - 1))
    is_first = arith.cmpi(arith.CmpIPredicate.eq, thread, integer(0))
    store_if(is_first, llvm.ptrtoint(i64, utils.memref_ptr(ref)), words)


def _tree(combine: Any, values: Sequence[Any]) -> Any:
    """Combines values in pairs, so that few combinations wait for each other."""
    while len(values) > 1:
        pairs = [combine(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = pairs + list(values[2 * len(pairs) :])
    return values[0]


def _reduce(
    combine: Any, warpgroups: int, _: Any, scratch: Any, vectors: Sequence[Any]
) -> list[Any]:
    index = ir.IndexType.get()
    thread = thread_index()
    if warpgroups == 1:
        thread = arith.andi(thread, integer(_THREADS - 1))
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
    utils.warpgroup_barrier() if warpgroups == 1 else gpu.barrier()
    results = []
    for i, vector in enumerate(vectors):
        of_warps = [
            memref.load(scratch, [mgpu.c(i, index), mgpu.c(w, index)])
            for w in range(_WARPS * warpgroups)
        ]
        register = make_vector([_tree(combine, of_warps)] * VECTOR)
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
