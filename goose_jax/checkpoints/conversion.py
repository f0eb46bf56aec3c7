"""From the tensors of a file to a model and back, by the key map."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from goose_jax.checkpoints.key_map import TRANSPOSED, Entry, Layout, Shape, axis_sizes, key_map
from goose_jax.checkpoints.native import CheckpointError
from goose_jax.checkpoints.stored_tensor import StoredTensor
from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7

_ALIGNMENT = 64  # of an array in memory that JAX takes over
_ROWS_AT_ONCE = 16  # of a matrix that is transposed: several times as fast as all rows at once


def build_model(tensors: Mapping[str, StoredTensor], layout: Layout, config: RWKV7Config) -> RWKV7:
    """The model of that configuration with the tensors' values, in `config.param_dtype`.

    One parameter at a time is filled layer by layer and then handed to JAX, which on a CPU takes
    the memory as it is; nothing else of a tensor's size is held. Tensors that are absent, as the
    first layer's value residual may be, are zero.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)
    for path in dict.fromkeys(entry.parameter for entry in key_map(layout)):
        entries = [entry for entry in key_map(layout) if entry.parameter == path]
        _replace(params, path, functools.partial(_fill, tensors, entries, config))
    return nnx.merge(graphdef, params)


def split_params(
    params: Mapping[str, Any], layout: Layout, *, unused: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file: names and values, layer by layer.

    Args:
      params: pure dict of a model's parameters, or of a tree like it, as gradients are.
      layout: of the file.
      unused: whether the first layer's value residual, which has no effect, is among them.
    """
    entries = key_map(layout)
    host = {entry.parameter: np.asarray(_get(params, entry.parameter)) for entry in entries}
    num_layers = len(host["blocks.time_mix.bonus"])
    stacked = [entry for entry in entries if entry.is_stacked]
    begin, end = entries.index(stacked[0]), entries.index(stacked[-1]) + 1
    for entry in entries[:begin]:
        yield entry.name, _to_stored(host[entry.parameter], entry)
    for i in range(num_layers):
        for entry in stacked:
            if unused or i or not entry.is_optional:
                yield entry.name.format(i=i), _to_stored(host[entry.parameter][i], entry)
    for entry in entries[end:]:
        yield entry.name, _to_stored(host[entry.parameter], entry)


def split_model(model: RWKV7, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file for a model: names and values.

    FLA's layout has no place for the first layer's value residual. The official one has, but it is
    left out, as from released files, if it is zero, as it is after such a file was loaded.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optional = [entry.parameter for entry in key_map(layout) if entry.is_optional]
    has_unused = any(np.asarray(_get(params, path)[0]).any() for path in optional)
    return split_params(params, layout, unused=layout == "pth" and has_unused)


def _fill(
    tensors: Mapping[str, StoredTensor], entries: list[Entry], config: RWKV7Config, leaf: Any
) -> jax.Array:
    sizes = axis_sizes(config)
    values = _aligned(leaf.shape, leaf.dtype)
    for entry in entries:
        for i, name in enumerate(entry.names(config.num_layers)):
            target = values[i] if entry.is_stacked else values
            target = target if entry.row is None else target[entry.row]
            if name in tensors:
                _copy(tensors[name].read(), entry, sizes, target)
                check_range(name, target, tensors[name].dtype)
            else:
                target[...] = 0
    return jax.device_put(values).block_until_ready()  # so that only one waits on the host


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array that JAX on a CPU takes over instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _copy(value: np.ndarray, entry: Entry, sizes: Mapping[str, int], target: np.ndarray) -> None:
    value = value.reshape(entry.stored_shape(sizes))
    if value.dtype == target.dtype and value.dtype.itemsize == 2:
        value, target = value.view(np.uint16), target.view(np.uint16)  # numpy copies these faster
    with np.errstate(over="ignore"):  # which is looked for afterwards
        if entry.form != TRANSPOSED:
            np.copyto(target, value.reshape(target.shape), casting="unsafe")
            return
        for row in range(0, len(value), _ROWS_AT_ONCE):
            rows = slice(row, row + _ROWS_AT_ONCE)
            np.copyto(target[:, rows], value[rows].T, casting="unsafe")


def check_range(name: str, rounded: Any, original: np.dtype) -> None:
    """Checks that rounding to float16, whose range is small, has left numbers.

    Raises:
      CheckpointError: if not.
    """
    if rounded.dtype == jnp.float16 != original and not np.isfinite(rounded).all():
        raise CheckpointError(f"{name} has values that float16 cannot hold; choose another dtype")


def _to_stored(value: np.ndarray, entry: Entry) -> np.ndarray:
    value = value if entry.row is None else value[entry.row]
    match entry.form:
        case "transposed":
            return value.T
        case "flat":
            return value.reshape(-1)
        case "row":
            return value.reshape(1, 1, -1)
        case _:
            return value


def _get(tree: Mapping[str, Any], path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("."), tree)


def _replace(tree: dict[str, Any], path: str, replacement: Callable[[Any], Any]) -> None:
    *parents, last = path.split(".")
    node = _get(tree, ".".join(parents)) if parents else tree
    node[last] = replacement(node[last])
