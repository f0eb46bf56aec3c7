"""Below the level of Pallas: sums of products of tiles, by the tensor cores (`wgmma`).

Pallas offers the same instruction, in a way that takes more of others: accumulators are zeroed
first, in one instruction for each register, and addresses are found in 64 bits. Nor can it multiply
by some columns of a tile.
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
    NUMBER,
    PART,
    TILE_LAYOUT,
    TRANSFORMS,
    Part,
    address_of,
    in_registers,
    integer,
    pair_of,
    tile_of,
    to_bits,
)
from pallas_kernels.hopper.target import TILE

_DEPTH = 16
"""Of how many columns and rows an instruction multiplies."""


class Transposed(NamedTuple):
    """The transpose of a tile in shared memory, as an operand."""

    tile: Any


type Sum = Sequence[tuple[Any, Any]]


def multiply(sums: Sequence[Sum], start: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """For each sum `start + x @ y + ...` in float32, for 16-bit tiles.

    Args:
      sums: pairs (x, y): x a tile in registers or in shared memory, y one in shared memory; those
        in shared memory also `Transposed`. All y may be a `Part`, of the same number.
      start: what each sum starts from; None is zero.
    """
    operands, kinds, numbers = [], [], []
    for x, y in (pair for pairs in sums for pair in pairs):
        for operand in (x, y):
            if isinstance(operand, Part):
                numbers = [operand.number]
            operands.append(operand.tile if isinstance(operand, (Part, Transposed)) else operand)
            transposed = isinstance(operand, Transposed)
            kinds.append("registers" if isinstance(operand, jax.Array) else transposed)
    counts = [len(pairs) for pairs in sums]
    begins = [x is not None for x in start]
    starts = [x for x in start if x is not None]

    def emit(_, starts, operands, numbers):
        number = numbers[0].registers.item() if numbers else None
        return _multiply(counts, begins, starts, list(zip(operands, kinds, strict=True)), number)

    smem = plgpu.RefType(TRANSFORMS)
    types = [TILE_LAYOUT if kind == "registers" else smem for kind in kinds]
    result = in_registers(jnp.float32, PART if numbers else TILE)
    inline = plgpu.inline_mgpu(
        arg_types=([TILE_LAYOUT] * len(starts), types, [NUMBER] * len(numbers)),
        return_type=(result,) * len(sums),
    )
    return inline(emit)(starts, operands, numbers)


def _multiply(
    counts: Sequence[int],
    begins: Sequence[bool],
    starts: Sequence[Any],
    operands: Sequence[tuple[Any, Any]],
    number: Any | None,
) -> list[Any]:
    """`multiply`, of fragmented arrays and references: one piece of PTX that waits for its end."""
    columns = TILE if number is None else PART
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

    def steps(ref, transposed, first):
        """Descriptors of the parts of a tile in shared memory, and whether its rows are those of
        the result, or columns.
        """
        nonlocal descriptors
        along_rows = transposed != first
        step = _DEPTH * 2 if along_rows else _DEPTH * TILE * 2  # bytes
        name = argument(_descriptor(ref, along_rows, None if first else number), "l")
        names = [name]
        for i in range(1, TILE // _DEPTH):
            names.append(f"d{descriptors}")
            descriptors += 1
            before.append(f"add.s64 {names[-1]}, {name}, {i * step // 16};")
        return names, int(not along_rows)

    pairs = iter(zip(operands[::2], operands[1::2], strict=True))
    for i, count in enumerate(counts):
        accumulator = "{" + ", ".join(f"${i * size + j}" for j in range(size)) + "}"
        for j in range(count):
            (x, kind), (y, transposed) = next(pairs)
            if kind == "registers":
                names = [argument(to_bits(pair), "r") for pair in x.registers.flat]
                parts = ["{" + ", ".join(names[4 * k : 4 * k + 4]) + "}" for k in range(4)]
                flags = []
            else:
                parts, flag = steps(x, kind, first=True)
                flags = [flag]
            y_parts, flag = steps(y, transposed, first=False)
            flags.append(flag)
            for k, (part, y_part) in enumerate(zip(parts, y_parts, strict=True)):
                add = "add" if j == k == 0 and not begins[i] else "1"
                body.append(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "
                    f"{accumulator}, {part}, {y_part}, {add}, 1, 1, {', '.join(map(str, flags))};"
                )
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


def _descriptor(ref: Any, along_rows: bool, number: Any | None) -> Any:
    """Tells the tensor cores where a tile lies: 8 rows of 128 bytes, swizzled, follow 8 rows."""
    i64 = ir.IntegerType.get_signless(64)
    stride = 8 * TILE * 2 // 16
    low = arith.shrui(address_of(ref), integer(4))
    if number is not None:
        low = arith.addi(low, arith.muli(number, integer(PART * 2 // 16)))
    if not along_rows:
        low = arith.ori(low, integer(stride << 16))
    swizzled = 1 << 30
    high = arith.shli(arith.extui(i64, integer(swizzled | stride)), mgpu.c(32, i64))
    return arith.ori(arith.extui(i64, low), high)


__all__ = ["Transposed", "multiply"]
