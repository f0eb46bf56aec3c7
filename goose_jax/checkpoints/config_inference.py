"""Infers the configuration of a model from the names and shapes of its tensors."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.key_map import TRANSPOSED, Entry, Layout, Shape, key_map
from goose_jax.checkpoints.stored_tensor import STORED_DTYPES, StoredTensor
from goose_jax.config import RWKV7Config

_READ_FROM = {  # for each axis the parameter, and its dimension, that the size is read from
    "vocab": ("embedding", 0),
    "C": ("embedding", 1),
    "K": ("blocks.time_mix.bonus", 1),
    "F": ("blocks.channel_mix.key", 1),
    "decay_rank": ("blocks.time_mix.decay_down", 1),
    "alpha_rank": ("blocks.time_mix.alpha_down", 1),
    "value_rank": ("blocks.time_mix.value_residual_down", 1),
    "gate_rank": ("blocks.time_mix.gate_down", 1),
}


def infer_config(
    tensors: Mapping[str, StoredTensor],
    layout: Layout,
    source: str,
    *,
    default_value_rank: int | None = None,
    **settings: Any,
) -> RWKV7Config:
    """Infers the configuration of a model, and checks all names, shapes and dtypes.

    Args:
      tensors: all tensors of the file by name.
      layout: layout of the file.
      source: name of the file, for the error.
      default_value_rank: rank of the value residual for a model of one layer whose file holds no
        value residual, which the first layer does not use. None means the official rank.
      **settings: fields of `RWKV7Config` that cannot be inferred.

    Raises:
      CheckpointError: if tensors are missing, unknown, or of a wrong shape or dtype. The message
        lists all of them.
    """
    num_layers = len({_layer(layout, name) for name in tensors} - {None})
    sizes = _read_sizes(tensors, layout, num_layers)
    if problems := _problems(tensors, layout, num_layers, sizes):
        raise CheckpointError(f"{source} is no RWKV-7 checkpoint: " + "; ".join(problems))
    value_rank = {"value_rank": sizes.get("value_rank", default_value_rank)}
    return RWKV7Config(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["C"],
        num_layers=num_layers,
        head_size=sizes["K"],
        intermediate_size=sizes["F"],
        decay_rank=sizes["decay_rank"],
        alpha_rank=sizes["alpha_rank"],
        gate_rank=sizes["gate_rank"],
        **(value_rank | settings),
    )


def _layer(layout: Layout, name: str) -> str | None:
    prefix = "blocks" if layout == "pth" else r"model\.layers"
    match = re.match(rf"{prefix}\.(\d+)\.", name)
    return match[1] if match else None


def _read_sizes(
    tensors: Mapping[str, StoredTensor], layout: Layout, num_layers: int
) -> dict[str, int]:
    """Returns the sizes of the axes that can be read from the tensors."""
    sizes = {"6": 6}
    entries = {entry.parameter: entry for entry in key_map(layout)}
    for axis, (parameter, position) in _READ_FROM.items():
        entry = entries[parameter]
        for name in entry.names(num_layers):
            if name in tensors and len(shape := tensors[name].shape) == 2:
                sizes[axis] = shape[::-1][position] if entry.form == TRANSPOSED else shape[position]
                break
    if "C" in sizes and "K" in sizes:
        sizes["H"] = sizes["C"] // max(sizes["K"], 1)
    return sizes


def _problems(
    tensors: Mapping[str, StoredTensor], layout: Layout, num_layers: int, sizes: Mapping[str, int]
) -> list[str]:
    expected: dict[str, Entry] = {}
    optional = set()
    for entry in key_map(layout):
        names = entry.names(max(num_layers, 1))
        expected |= dict.fromkeys(names, entry)
        if entry.is_optional:
            optional.add(names[0])
    missing = expected.keys() - tensors.keys()
    if optional <= missing:
        missing -= optional
    problems = [f"missing: {', '.join(sorted(missing))}"] if missing else []
    if unknown := sorted(tensors.keys() - expected.keys()):
        problems.append(f"unknown: {', '.join(unknown)}")
    for name in sorted(tensors.keys() & expected.keys()):
        problems += _misfits(name, tensors[name], expected[name], sizes)
    return problems


def _misfits(
    name: str, tensor: StoredTensor, entry: Entry, sizes: Mapping[str, int]
) -> Iterator[str]:
    if tensor.dtype not in STORED_DTYPES:
        yield f"{name} has dtype {tensor.dtype.name}"
    if not set(entry.axes) <= set(sizes):  # a size could not be read
        tells = any(entry.parameter == parameter for parameter, _ in _READ_FROM.values())
        if tells and len(tensor.shape) != 2:
            yield f"{name} has shape {list(tensor.shape)} rather than two axes"
        return
    expected = entry.stored_shape(sizes)
    if _without_ones(tensor.shape) != _without_ones(expected):
        yield f"{name} has shape {list(tensor.shape)} rather than {list(expected)}"


def _without_ones(shape: Shape) -> Shape:
    """Removes axes of size 1: a vector is [C] in some files and [1, 1, C] in others."""
    return tuple(size for size in shape if size != 1)
