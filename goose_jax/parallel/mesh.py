"""The mesh: devices in a grid of four named axes, and what must divide what."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from goose_jax.config import RWKV7Config
from pallas_kernels.validation import check_positive

AXES = ("data", "fsdp", "tensor", "context")
"""The axes of a mesh, as users name them.

- data: each device has all parameters and reads rows of its own.
- fsdp: each device reads rows of its own and stores a part of the parameters and of the optimizer's
  state. Parameters are gathered layer by layer when they are needed.
- tensor: each device has some heads, and some inner channels of the channel mix.
- context: each device reads a part of every row.
"""

_ORDER = ("data", "fsdp", "context", "tensor")
# From the outside in: devices that talk most, those of `tensor`, are neighbours in one host.

_EXAMPLE = "data=2,fsdp=4"


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arranges devices in a mesh with the axes "data", "fsdp", "tensor" and "context".

    The axes have the type `AxisType.Auto`. Training steps make them manual, by `jax.shard_map`.

    Args:
      data: size of the axis "data"; None takes all devices that the other axes leave.
      fsdp: size of the axis "fsdp".
      tensor: size of the axis "tensor".
      context: size of the axis "context".
      devices: the devices; None takes all devices of all processes. In a single process they may be
        more than the mesh needs: then the first ones are used.

    Raises:
      ValueError: if a size is not a positive integer, or the sizes do not fit the number of
        devices; the message says which size would.

    Example:
      >>> mesh = make_mesh(fsdp=jax.device_count())
      >>> mesh.shape["data"]
      1
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    for name, size in sizes.items():
        if size is not None:
            check_positive(name, size)
    devices = jax.devices() if devices is None else list(devices)
    count, others = len(devices), fsdp * tensor * context
    named = ", ".join(f"{name} of {size}" for name, size in sizes.items() if size not in (None, 1))
    if data is None:
        if count % others:
            raise ValueError(
                f"a mesh with {named} needs a multiple of {others} devices, but there are {count}; "
                f"the product of its sizes must divide {count}"
            )
        data = count // others
    needed = data * others
    if needed > count or (needed < count and jax.process_count() > 1):
        raise ValueError(
            f"a mesh with {named or 'data of 1'} has {needed} devices, but there are {count}"
            + (f"; data of {count // others} would fit" if count % others == 0 else "")
        )
    shape = tuple(
        {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}[axis] for axis in _ORDER
    )
    types = (AxisType.Auto,) * len(_ORDER)
    return jax.make_mesh(shape, _ORDER, axis_types=types, devices=devices[:needed])


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh from a text such as "data=2,fsdp=4", for `make_mesh`.

    Raises:
      ValueError: if an axis is unknown or given twice, or a size is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not equals:
            raise ValueError(
                f"mesh {text!r} has {part.strip()!r}, but each part must be AXIS=SIZE, with an "
                f"axis of {', '.join(AXES)}, as in {_EXAMPLE!r}"
            )
        if name in sizes:
            raise ValueError(f"mesh {text!r} gives the axis {name} twice")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ValueError(f"mesh {text!r}: the size of {name!r} must be an integer >= 1")
        sizes[name] = int(size)
    return sizes


def describe_mesh(mesh: Mesh) -> str:
    """Returns the axes with more than one device, such as "data=2 x fsdp=4"; "1 device" if none."""
    sizes = axis_sizes(mesh)
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1 device"


def axis_sizes(mesh: Any) -> Mapping[str, int]:
    """Returns the sizes of the four axes; an axis that the mesh lacks has one device."""
    return {axis: mesh.shape.get(axis, 1) for axis in AXES}


def check_mesh(
    mesh: Mesh,
    config: RWKV7Config,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
) -> None:
    """Checks that the axes of a mesh divide a model and its batches.

    Args:
      mesh: a mesh of `make_mesh`.
      config: configuration of the model.
      batch_size: B, rows of each microbatch; None leaves it unchecked.
      sequence_length: T, tokens of each row; None leaves it unchecked.

    Raises:
      ValueError: if an axis does not divide what it must divide. The message names the axis, the
        size, and sizes that would fit.
    """
    check_mesh_of_batches(mesh, batch_size=batch_size, sequence_length=sequence_length)
    sizes = axis_sizes(mesh)
    wanted = [
        ("fsdp", "hidden_size", config.hidden_size),
        ("tensor", "num_heads", config.num_heads),
        ("tensor", "intermediate_size", config.intermediate_size),
    ]
    for axis, name, total in wanted:
        if total % sizes[axis]:
            raise ValueError(
                f"mesh axis {axis}={sizes[axis]} cannot divide {name}={total}; sizes that would "
                f"fit: {_divisors(total)}"
            )


def check_mesh_of_batches(
    mesh: Mesh, *, batch_size: int | None = None, sequence_length: int | None = None
) -> None:
    """Checks that the axes of a mesh divide batches. `check_mesh` includes this.

    Args:
      mesh: a mesh of `make_mesh`.
      batch_size: B, rows of each microbatch; None leaves it unchecked.
      sequence_length: T, tokens of each row; None leaves it unchecked.

    Raises:
      ValueError: if an axis does not divide what it must divide, as for `check_mesh`.
    """
    sizes = axis_sizes(mesh)
    rows = sizes["data"] * sizes["fsdp"]  # both divide the rows of a batch
    if batch_size is not None and batch_size % rows:
        nearest = math.ceil(batch_size / rows) * rows
        raise ValueError(
            f"the mesh axes data and fsdp, of {sizes['data']} x {sizes['fsdp']} devices, cannot "
            f"divide {batch_size=}: the batch must be a multiple of {rows}, such as {nearest}, or "
            f"their product one of {_divisors(batch_size)}"
        )
    # The loss divides the tokens over "tensor", too.
    parts = sizes["context"] * sizes["tensor"]
    if sequence_length is not None and sequence_length % parts:
        raise ValueError(
            f"mesh context={sizes['context']} x tensor={sizes['tensor']} cannot divide "
            f"sequence_length={sequence_length}: it must be a multiple of {parts}, such as "
            f"{math.ceil(sequence_length / parts) * parts}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)


__all__ = [
    "AXES",
    "axis_sizes",
    "check_mesh",
    "check_mesh_of_batches",
    "describe_mesh",
    "make_mesh",
    "parse_mesh",
]
