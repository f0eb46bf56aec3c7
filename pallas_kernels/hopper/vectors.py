"""Vectors of eight neighbouring channels, which one thread loads, holds and stores.

The functions take and return MLIR values; kernels use them within `plgpu.inline_mgpu`. Memory holds
such a vector in 16 bytes if the channels are bfloat16, in twice 16 bytes if they are float32.
"""

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.registers import integer

VECTOR = 8
"""Number of channels."""


def make_vector(values: Sequence[Any]) -> Any:
    """Makes a register of a fragmented array of eight float32 numbers."""
    vector = llvm.mlir_undef(ir.VectorType.get((VECTOR,), values[0].type))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, position=integer(i))
    return vector


def values_of(vector: Any) -> list[Any]:
    """Returns the eight numbers of a register."""
    return [llvm.extractelement(vector, position=integer(i)) for i in range(VECTOR)]


def load_if(condition: Any, address: Any) -> list[Any]:
    """Loads four integers from global memory, which nobody writes to, if a condition is true.

    Returns:
      The integers; zeros if the condition is false.
    """
    i32 = integer(0).type
    words = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        [arith.extui(i32, condition), address],
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
        "mov.b32 $3, 0; @p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$5]; }",
        "=&r,=&r,=&r,=&r,r,l",
    )
    return [llvm.extractvalue(i32, words, [i]) for i in range(4)]


def load_shared(address: Any, offset: int, condition: Any | None = None) -> list[Any]:
    """Loads four integers from shared memory.

    Args:
      address: in bytes.
      offset: added to the address.
      condition: false gives zeros; None stands for true.
    """
    i32 = integer(0).type
    load = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
    if condition is None:
        operands, text, outputs = [address], load, "=r,=r,=r,=r,r"
    else:
        operands = [address, arith.extui(i32, condition)]
        zeros = "".join(f"mov.b32 ${i}, 0; " for i in range(4))
        text = f"{{ .reg .pred p; setp.ne.s32 p, $5, 0; {zeros}@p {load} }}"
        outputs = "=&r,=&r,=&r,=&r,r,r"
    words = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        operands,
        text,
        f"{outputs},~{{memory}}",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, words, [i]) for i in range(4)]


def store_if(condition: Any, address: Any, words: Sequence[Any], *, streams: bool = False) -> None:
    """Writes four integers to global memory if a condition is true.

    Args:
      condition: whether to write.
      address: in bytes.
      words: the integers.
      streams: whether caches should give them up first: what is read much later, by another
        kernel, would be gone by then, and displaces what this one reads again.
    """
    kind = ".cs" if streams else ""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [arith.extui(integer(0).type, condition), address, *words],
        "{ .reg .pred p; setp.ne.s32 p, $0, 0; "
        f"@p st.global{kind}.v4.b32 [$1], {{$2, $3, $4, $5}}; }}",
        "r,l,r,r,r,r",
        has_side_effects=True,
    )


__all__ = ["VECTOR", "load_if", "load_shared", "make_vector", "store_if", "values_of"]
