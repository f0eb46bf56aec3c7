"""What a model does on a mesh: it gathers parameters where it needs them, and sums over devices.

`on_mesh` runs a function on each device's part of its arguments, by `jax.shard_map`. Nothing moves
between devices there but what this module moves. Outside of `on_mesh` its functions return what
they are given.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from goose_jax.parallel.mesh import AXES
from goose_jax.parallel.rules import batch_spec, dimensions_of, tree_specs


def on_mesh[Result](
    function: Callable[[Any, Any, Any], Result], mesh: Mesh | None, *, gradient: bool
) -> Callable[[Any, Any, Any], Result]:
    """Runs `function(params, frozen, batch)` on each device's part.

    Args:
      function: gets each device's part of the parameters, as the rules divide them, and of the
        batch. Its results are numbers that are equal on all devices; with `gradient`, it is
        `(numbers, gradient)` with a gradient like `params`.
      mesh: the mesh; None returns the function.
      gradient: whether the function returns a gradient, too.
    """
    if mesh is None:
        return function

    def run(params: Any, frozen: Any, batch: Any) -> Result:
        of_params = tree_specs(params, mesh)
        of_batch = jax.tree.map(lambda array: batch_spec(array.ndim), batch)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(of_params, tree_specs(frozen, mesh), of_batch),
            out_specs=(P(), of_params) if gradient else P(),
        )(params, frozen, batch)

    return run


def compiler_options(mesh: Mesh | None) -> dict[str, int]:
    """Returns XLA's options for a training step on a mesh.

    On GPUs, two collectives may be under way at a time. XLA's default is one: then the gradient of
    a layer must have been summed before parameters of the next layer are asked for, and the sum has
    almost no computation to hide behind. Sums of gradients are combined up to 256 MiB: XLA's
    default, 30 MiB, starts eight times as many.

    Args:
      mesh: the mesh of the step; None for one device.

    Returns:
      `compiler_options` of `jax.jit`; none for one device, and for devices other than GPUs.
    """
    if mesh is None or mesh.size == 1 or mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return {}
    return {
        "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
        "xla_gpu_all_reduce_combine_threshold_bytes": 256 * 2**20,
    }


def gather_parameters(
    params: Any, dtype: Any = None, *, within: str = "", over: tuple[str, ...] = ("fsdp",)
) -> Any:
    """Gathers each device's parts of parameters.

    Their gradients are summed over devices in float32, and divided again. A layer that gathers its
    parameters where it uses them needs memory for the parameters of one layer.

    Args:
      params: a pytree of parameters.
      dtype: dtype that parameters are cast to before they are gathered, so that fewer bytes are
        moved; None keeps each dtype.
      within: path of `params` in the model.
      over: axes of the mesh to gather over.
    """
    mesh = _mesh()
    if mesh is None:
        return params

    def used_by_heads(path: Any) -> bool:
        names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
        return mesh.shape["tensor"] > 1 and not names.isdisjoint(("time_mix", "channel_mix"))

    def gather(path: Any, param: jax.Array) -> jax.Array:
        dimensions = dimensions_of((*_keys(within), *path))
        divided = tuple(
            (axis, param.ndim + dimensions[axis])
            for axis in over
            if axis in dimensions and mesh.shape[axis] > 1 and axis in _varying(param)
        )
        axes = _OF_BATCHES + (("tensor",) if used_by_heads(path) else ())
        if not divided and _varying(param) >= set(axes):
            return param
        return _gather(
            param, jnp.dtype(dtype or param.dtype) if divided else param.dtype, divided, axes
        )

    return jax.tree.map_with_path(gather, params)


def enter_heads[Tree](tree: Tree) -> Tree:
    """Tells JAX that what follows differs between the devices of "tensor": each has other heads.

    The gradients of what enters are summed over these devices.
    """
    mesh = _mesh()
    if mesh is None or mesh.shape["tensor"] == 1:
        return tree
    return jax.tree.map(lambda x: _vary(x, ("tensor",)), tree)


def sum_over_heads(x: jax.Array) -> jax.Array:
    """Returns the sum over the devices of "tensor", where each has added its heads' part."""
    return jax.lax.psum(x, "tensor") if "tensor" in _varying(x) else x


_context_axis = contextvars.ContextVar[tuple[str, ...] | None]("context_axis", default=None)


@contextlib.contextmanager
def tokens_divided_over(axes: tuple[str, ...] | None) -> Iterator[None]:
    """Lets `context_axis` return axes of a mesh that is not one of `on_mesh`."""
    token = _context_axis.set(axes)
    try:
        yield
    finally:
        _context_axis.reset(token)


def context_axis() -> str | tuple[str, ...] | None:
    """Returns the axis of the mesh that divides the tokens of each row, for operators, or None."""
    if _context_axis.get() is not None:
        return _context_axis.get()
    mesh = _mesh()
    return "context" if mesh is not None and mesh.shape["context"] > 1 else None


def sum_over_mesh(x: jax.Array) -> jax.Array:
    """Returns the sum of each device's number."""
    axes = _in_order(_varying(x))
    return jax.lax.psum(x, axes) if axes else x


def own_copies[Tree](params: Tree) -> Tree:
    """Gives each device that reads other tokens a copy of its own of each parameter.

    Gradients of the copies are not summed over these devices. So gradients of several batches can
    be added up first, and `sum_of_copies` sums them once. Parameters that "fsdp" divides have no
    copies over it: their gradients are summed for each batch, of which a device keeps its part.

    Args:
      params: the parameters, with the names that the rules know at the ends of their paths.
    """
    mesh = _mesh()
    if mesh is None:
        return params

    def copy(path: Any, param: jax.Array) -> jax.Array:
        # To `gather_parameters`, a parameter is divided over an axis of its rule if it varies.
        dimensions = dimensions_of(path)
        axes = (axis for axis in _OF_BATCHES if axis not in dimensions or mesh.shape[axis] == 1)
        return _vary(param, tuple(axes))

    return jax.tree.map_with_path(copy, params)


def sum_of_copies[Tree](gradient: Tree, params: Tree) -> Tree:
    """Returns the gradient of parameters, given that of their `own_copies`."""

    def add(part: jax.Array, param: jax.Array) -> jax.Array:
        axes = _in_order(_varying(part) - _varying(param))
        return jax.lax.psum(part, axes) if axes else part

    return jax.tree.map(add, gradient, params)


def zeros_varying_as(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns zeros of the shape that `jax.eval_shape` found, which vary over the same axes."""
    return _vary(jnp.zeros(shape.shape, shape.dtype), _in_order(_varying(shape)))


def tokens_of_device[Tree](tree: Tree) -> Tree:
    """Returns this device's share of tokens that all devices of "tensor" have: `[B, T / n, ...]`.

    The loss uses it: each device then has all logits of some tokens.
    """
    mesh = _mesh()
    if mesh is None or mesh.shape["tensor"] == 1:
        return tree

    def take(x: jax.Array) -> jax.Array:
        count = x.shape[1] // mesh.shape["tensor"]
        first = jax.lax.axis_index("tensor") * count
        return jax.lax.dynamic_slice_in_dim(_vary(x, ("tensor",)), first, count, axis=1)

    return jax.tree.map(take, tree)


def look_up(
    embedding: Float[Array, "vocab C"], tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T C"]:
    """Returns the embedding of each token; NaN for an id out of range.

    On a mesh the columns may be divided over "fsdp". Then each device looks up the tokens of all
    these devices in its columns, and the devices exchange what they found: the embeddings of tokens
    move, the table does not. The rows may be divided over "tensor". Then each device looks up the
    tokens whose rows it has.

    Args:
      embedding: the table, or this device's part of it.
      tokens: ids of the tokens of this device.
      dtype: dtype of the result.
    """
    mesh = _mesh()
    divided = mesh is not None and mesh.shape["fsdp"] > 1 and "fsdp" in _varying(embedding)
    embedding = gather_parameters(embedding, within="embedding", over=())
    if not divided:
        return _rows(embedding, tokens, dtype)
    of_all = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
    found = _rows(embedding, of_all, dtype)
    return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def _rows(
    embedding: Float[Array, "vocab C"], tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T C"]:
    """Returns rows of a table, which may be divided over "tensor"; NaN for an id out of range."""
    if "tensor" not in _varying(embedding):
        # An id out of range gives NaN, not the embedding of another token.
        found = embedding.at[tokens].get(
            mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
        )
        return found.astype(dtype)
    count = embedding.shape[0]
    local = tokens - jax.lax.axis_index("tensor") * count
    found = embedding.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    valid = (tokens >= 0) & (tokens < count * jax.lax.axis_size("tensor"))
    # One of the devices has the row, and the others have zeros: the sum is exact.
    return jnp.where(valid[..., None], jax.lax.psum(found.astype(dtype), "tensor"), jnp.nan)


_OF_BATCHES = ("data", "fsdp", "context")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(
    param: jax.Array, dtype: Any, divided: tuple[tuple[str, int], ...], axes: tuple[str, ...]
) -> jax.Array:
    gathered = param.astype(dtype)
    for axis, dimension in divided:
        gathered = jax.lax.all_gather(gathered, axis, axis=dimension, tiled=True)
    return _vary(gathered, axes)


def _gather_forward(param: jax.Array, *settings: Any) -> tuple[jax.Array, jax.Array]:
    return _gather(param, *settings), param


def _gather_backward(
    dtype: Any,
    divided: tuple[tuple[str, int], ...],
    axes: tuple[str, ...],
    param: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array]:
    del dtype, axes
    part = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    for axis, dimension in divided:
        part = jax.lax.psum_scatter(part, axis, scatter_dimension=dimension, tiled=True)
    missing = _in_order(_varying(part) - _varying(param))
    return ((jax.lax.psum(part, missing) if missing else part).astype(param.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _mesh() -> Any:
    """Returns the mesh of `on_mesh`, inside of it; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    if set(AXES) == set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Manual}:
        return mesh
    return None


def _varying(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    if isinstance(x, jax.ShapeDtypeStruct):  # whose type is None outside of `jax.shard_map`
        return frozenset(x.manual_axis_type.varying if x.manual_axis_type else ())
    return frozenset(jax.typeof(x).mat.varying)


def _in_order(axes: frozenset[str]) -> tuple[str, ...]:
    """Returns axes in an order that is the same in all processes, unlike that of a set."""
    return tuple(axis for axis in AXES if axis in axes)


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in _varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _keys(path: str) -> tuple[jax.tree_util.DictKey, ...]:
    return tuple(jax.tree_util.DictKey(name) for name in path.split(".") if name)


__all__ = [
    "compiler_options",
    "context_axis",
    "enter_heads",
    "gather_parameters",
    "look_up",
    "on_mesh",
    "own_copies",
    "sum_of_copies",
    "sum_over_heads",
    "sum_over_mesh",
    "tokens_divided_over",
    "tokens_of_device",
    "zeros_varying_as",
]
