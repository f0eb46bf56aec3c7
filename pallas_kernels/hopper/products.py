"""Sums of products of tiles, by tensor cores (`wgmma`), written in PTX.

`plgpu.wgmma` costs more instructions: it zeroes accumulators first, one register at a time, and
computes addresses in 64 bits. It also cannot multiply by some of the columns of a tile.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.registers import (
    SCALAR,
    STRIP,
    TILE_LAYOUT,
    TRANSFORMS,
    Strip,
    address_of,
    in_registers,
    integer,
    pair_of,
    tile_of,
    to_bits,
)
from pallas_kernels.hopper.target import TILE

_DEPTH = 16
"""Columns of x, and rows of y, that one instruction multiplies."""


class Transposed(NamedTuple):
    """The transpose of a tile in shared memory, as an operand."""

    tile: Any


type Sum = Sequence[tuple[Any, Any]]


def multiply(
    sums: Sequence[Sum], start: Sequence[jax.Array | None], dtype: Any = jnp.bfloat16
) -> tuple[jax.Array, ...]:
    """Computes `start + x @ y + ...` in float32 for each sum. All are in flight together.

    Args:
      sums: pairs (x, y) of 16-bit tiles. x is in registers, or in shared memory and then maybe
        `Transposed`. y is in shared memory, maybe `Transposed`; or every y is a `Strip`, all with
        one number.
      start: float32 tiles, in registers, that the sums start from; None for zero.
      dtype: of the numbers of x and y, bfloat16 or float16.

    Returns:
      Float32 tiles in registers, `[64, 32]` if every y is a strip.
    """
    operands, kinds, numbers = [], [], []
    for x, y in (pair for pairs in sums for pair in pairs):
        for operand in (x, y):
            if isinstance(operand, Strip):
                numbers = [operand.number]
            operands.append(operand.tile if isinstance(operand, (Strip, Transposed)) else operand)
            transposed = isinstance(operand, Transposed)
            kinds.append("registers" if isinstance(operand, jax.Array) else transposed)
    counts = [len(pairs) for pairs in sums]
    begins = [x is not None for x in start]
    starts = [x for x in start if x is not None]

    def emit(_, starts, operands, numbers):
        number = numbers[0].registers.item() if numbers else None
        pairs = list(zip(operands, kinds, strict=True))
        return _multiply(counts, begins, starts, pairs, number, dtype)

    smem = plgpu.RefType(TRANSFORMS)
    types = [TILE_LAYOUT if kind == "registers" else smem for kind in kinds]
    result = in_registers(jnp.float32, STRIP if numbers else TILE)
    inline = plgpu.inline_mgpu(
        arg_types=([TILE_LAYOUT] * len(starts), types, [SCALAR] * len(numbers)),
        return_type=(result,) * len(sums),
    )
    return inline(emit)(starts, operands, numbers)


def _multiply(
    counts: Sequence[int],
    begins: Sequence[bool],
    starts: Sequence[Any],
    operands: Sequence[tuple[Any, Any]],
    strip_number: Any | None,
    dtype: Any,
) -> list[Any]:
    """Emits one piece of PTX that computes all sums and waits until they are done.

    Args:
      counts: number of products in each sum.
      begins: whether a sum starts from a value, for each sum.
      starts: fragmented arrays, one for each sum that does.
      operands: pairs of a fragmented array or a reference, and its kind: "registers", or whether
        it is transposed.
      strip_number: which strips the second operands are; None if they are whole tiles.
      dtype: of the numbers of all operands.
    """
    columns = TILE if strip_number is None else STRIP
    kind_of_number = "f16" if dtype == jnp.float16 else "bf16"
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32"
    instruction += f".{kind_of_number}.{kind_of_number}"
    f32, size = ir.F32Type.get(), TILE * columns // 128
    outputs, constraints = size * len(counts), list[str]()
    arguments: list[Any] = []
    tied = [i * size + j for i, begin in enumerate(begins) if begin for j in range(size)]
    for array in starts:
        for pair in array.registers.flat:
            arguments += [llvm.extractelement(pair, position=integer(i)) for i in range(2)]
    constraints += map(str, tied)

    def argument(value, constraint):
        arguments.append(value)
        constraints.append(constraint)
        return f"${outputs + len(arguments) - 1}"

    before, body = ["setp.ne.s32 add, 0, 0;"], ["wgmma.fence.sync.aligned;"]
    descriptors = 0

    def slices_of(ref, transposed, first):
        """Returns descriptors of the slices that one instruction takes, and its flag for them.

        The flag is 1 if the tile is to be read along its columns.
        """
        nonlocal descriptors
        along_rows = transposed != first
        step = _DEPTH * 2 if along_rows else _DEPTH * TILE * 2  # bytes
        name = argument(_descriptor(ref, along_rows, None if first else strip_number), "l")
        names = [name]
        for i in range(1, TILE // _DEPTH):
            names.append(f"d{descriptors}")
            descriptors += 1
            before.append(f"add.s64 {names[-1]}, {name}, {i * step // 16};")
        return names, str(int(not along_rows))

    pairs = iter(zip(operands[::2], operands[1::2], strict=True))
    for i, count in enumerate(counts):
        accumulator = "{" + ", ".join(f"${i * size + j}" for j in range(size)) + "}"
        for j in range(count):
            (x, kind), (y, transposed) = next(pairs)
            if kind == "registers":
                names = [argument(to_bits(pair), "r") for pair in x.registers.flat]
                x_slices = ["{" + ", ".join(names[4 * k : 4 * k + 4]) + "}" for k in range(4)]
                flags = []
            else:
                x_slices, flag = slices_of(x, kind, first=True)
                flags = [flag]
            y_slices, flag = slices_of(y, transposed, first=False)
            flags.append(flag)
            for k, (x_slice, y_slice) in enumerate(zip(x_slices, y_slices, strict=True)):
                add = "add" if j == k == 0 and not begins[i] else "1"
                listed = ", ".join([accumulator, x_slice, y_slice, add, "1", "1", *flags])
                body.append(f"{instruction} {listed};")
    body += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    declarations = f".reg .pred add; .reg .b64 d<{descriptors}>;"
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * outputs),
        arguments,
        "{ " + declarations + "\n" + "\n".join(before + body) + " }",
        ",".join(["=f"] * outputs + constraints + ["~{memory}"]),
        asm_dialect=0,
        has_side_effects=True,
    )
    values = [llvm.extractvalue(f32, result, [i]) for i in range(outputs)]
    registers = [pair_of(*values[i : i + 2]) for i in range(0, outputs, 2)]
    each = size // 2
    return [tile_of(registers[i : i + each], columns, f32) for i in range(0, len(registers), each)]


def _descriptor(ref: Any, along_rows: bool, strip_number: Any | None) -> Any:
    """Returns the 64 bits that tell tensor cores where a tile lies in shared memory.

    They hold its address, how far apart groups of 8 rows are, and that rows are swizzled. Addresses
    and distances are counted in 16 bytes.
    """
    i64 = ir.IntegerType.get_signless(64)
    stride = 8 * TILE * 2 // 16
    low = arith.shrui(address_of(ref), integer(4))
    if strip_number is not None:
        low = arith.addi(low, arith.muli(strip_number, integer(STRIP * 2 // 16)))
    if not along_rows:
        low = arith.ori(low, integer(stride << 16))
    swizzled = 1 << 30
    high = arith.shli(arith.extui(i64, integer(swizzled | stride)), mgpu.c(32, i64))
    return arith.ori(arith.extui(i64, low), high)


__all__ = ["Transposed", "multiply"]
