"""Converts the tensors of a file to a model and back, as the key map says."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.key_map import TRANSPOSED, Entry, Shape, axis_sizes
from goose_jax.checkpoints.layouts import Layout
from goose_jax.checkpoints.stored_tensor import StoredTensor
from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7, abstract_model
from goose_jax.parallel import tree_shardings

_ALIGNMENT = 64  # bytes; JAX adopts arrays with this alignment without copying them
_ROWS_AT_ONCE = 16  # transposing 16 rows at a time is several times as fast as all at once


def build_model(
    tensors: Mapping[str, StoredTensor],
    layout: Layout,
    config: RWKV7Config,
    mesh: Mesh | None = None,
) -> RWKV7:
    """Builds a model from the tensors of a file.

    One parameter at a time is filled layer by layer on the host and then passed to JAX, which on a
    CPU adopts the memory. No other array of a tensor's size is in memory.

    Args:
      tensors: tensors by their names in the file. A missing tensor gives zeros; only the value
        residual of the first layer may be missing.
      layout: layout of the file.
      config: configuration of the model. Values are rounded to its `param_dtype`.
      mesh: the mesh that each parameter is divided over, by `goose_jax.parallel.PARTITION_RULES`;
        None passes all to the default device.

    Raises:
      CheckpointError: if a value is out of the range of float16 and `param_dtype` is float16.
    """
    layout = layout.for_config(config)
    graphdef, state = nnx.split(abstract_model(config))
    params = nnx.to_pure_dict(state)
    shardings = None if mesh is None else tree_shardings(params, mesh)
    for path in dict.fromkeys(entry.parameter for entry in layout.entries):
        entries = [entry for entry in layout.entries if entry.parameter == path]
        sharding = None if shardings is None else _get(shardings, path)
        _replace(params, path, functools.partial(_fill, tensors, entries, config, sharding))
    return nnx.merge(graphdef, params)


def split_params(
    params: Mapping[str, Any], layout: Layout, *, unused: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the names and values of a file's tensors, layer by layer.

    Args:
      params: the parameters of a model as a pure dict, or a tree of the same structure, such as
        gradients.
      layout: layout of the file.
      unused: whether to include the value residual of the first layer, which has no effect.
    """
    entries = layout.entries
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
    """Yields the names and values of the tensors that a file holds for a model.

    Tensors for the value residual of the first layer are left out if they are zero, as released
    files leave them out, or if the layout has none.
    """
    layout = layout.for_config(model.config)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optional = [entry.parameter for entry in layout.entries if entry.is_optional]
    has_unused = any(np.asarray(_get(params, path)[0]).any() for path in optional)
    return split_params(params, layout, unused=layout.unused and has_unused)


def _fill(
    tensors: Mapping[str, StoredTensor],
    entries: list[Entry],
    config: RWKV7Config,
    sharding: NamedSharding | None,
    leaf: Any,
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
    placed = (
        jax.device_put(values)
        if sharding is None
        else jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
    )
    return placed.block_until_ready()  # so that only one array is on the host


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Makes an uninitialised array that JAX adopts on a CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _copy(value: np.ndarray, entry: Entry, sizes: Mapping[str, int], target: np.ndarray) -> None:
    value = value.reshape(entry.stored_shape(sizes))
    if value.dtype == target.dtype and value.dtype.itemsize == 2:
        value, target = (
            value.view(np.uint16),
            target.view(np.uint16),
        )  # faster in numpy
    with np.errstate(over="ignore"):  # `check_range` finds overflow afterwards
        if entry.form != TRANSPOSED:
            np.copyto(target, value.reshape(target.shape), casting="unsafe")
            return
        for row in range(0, len(value), _ROWS_AT_ONCE):
            rows = slice(row, row + _ROWS_AT_ONCE)
            np.copyto(target[:, rows], value[rows].T, casting="unsafe")


def check_range(name: str, rounded: Any, original: np.dtype) -> None:
    """Checks that rounding to float16, whose range is small, has not made values infinite.

    Args:
      name: name of the array, for the error.
      rounded: the rounded array. Arrays of other dtypes are not checked.
      original: dtype before rounding.

    Raises:
      CheckpointError: if a value is not finite.
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
