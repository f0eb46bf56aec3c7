"""Operators over the mesh in context.

An operator says in a `Layout` which dimensions its arrays have. Mesh axes are of three types:

    Auto       Only the compiler knows how arrays are divided. It partitions XLA's own operations;
               kernels it lets `pallas_kernels.partitioning` partition.
    Explicit   The types of arrays say how they are divided. `over_explicit_axes` makes such axes
               Auto within an operator, and says how results are divided.
    Manual     Arrays are the parts of one device, as in `jax.shard_map`. `vary_alike` makes types
               agree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

type Axes = tuple[str, ...]
"""Names of the mesh axes that divide one dimension, the outermost first."""

type Dimensions = tuple[str, ...]
"""Names of an array's dimensions."""

ROWS = "B"
"""The dimension that distinguishes activations and states from parameters."""

TOKENS = "T"
"""The dimension of tokens. Its parts depend on one another: each needs the part before it."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The dimensions of the arrays that a function takes and returns.

    Attributes:
      inputs: for each argument its dimensions, as in "B T C", or a pytree of those; one string may
        stand for a whole pytree of alike arrays. "..." is any number of dimensions.
      results: the same for the results.
      independent: names of dimensions, as in "B H". For a part of the results along one of them,
        the function needs only the same part of its arguments. A result that lacks the dimension,
        like the gradient of a parameter, is the sum over all parts.
    """

    inputs: tuple[Any, ...]
    results: Any
    independent: str = ""

    def backward(self) -> "Layout":
        """Returns the layout of the function from inputs and cotangents to gradients."""
        inputs = (*self.inputs, self.results)
        return dataclasses.replace(self, inputs=inputs, results=self.inputs)


def dimensions_of_leaves(layout: Any, arrays: Any) -> list[Dimensions]:
    """Returns the dimensions of each array of a pytree, of which `layout` is a prefix."""
    names = jax.tree.leaves(jax.tree.broadcast(layout, arrays))
    return [
        ("...",) * x.ndim if of_array == "..." else tuple(of_array.split())
        for of_array, x in zip(names, jax.tree.leaves(arrays), strict=True)
    ]


def axes_at(spec: PartitionSpec, position: int) -> Axes:
    """Returns the mesh axes that divide the dimension at a position."""
    axes = spec[position] if position < len(spec) else None
    if axes is None or axes is PartitionSpec.UNCONSTRAINED:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def spec_of(dimensions: Dimensions, divided: Mapping[str, Axes]) -> PartitionSpec:
    """Returns how an array is divided, given how its dimensions are."""
    return PartitionSpec(*(divided.get(name) for name in dimensions))


def over_explicit_axes[R](
    function: Callable[..., R],
    layout: Layout,
    *arguments: Any,
    over_context: bool = False,
    context_axis: str | Axes | None = None,
) -> R:
    """Calls a function that knows nothing of explicit mesh axes.

    Within the function these axes are Auto. Results are divided as the arguments are: each of their
    dimensions like this dimension of the first activation or state that has it, or else of the
    first parameter.

    Args:
      function: from the arguments to the results.
      layout: of arguments and results.
      *arguments: arrays, pytrees of arrays, or None.
      over_context: whether the function has a keyword argument `context_axis`. If axes divide the
        tokens, it gets their names as `context_axis`, and this device's pieces of the rows. These
        axes are Manual in the function.
      context_axis: what the caller of the operator gave. If it names Auto axes of the mesh in
        context, the function gets pieces of the rows as for explicit axes.
    """
    leaves = jax.tree.leaves(arguments)
    mesh = _mesh_with_explicit_axes(leaves)
    names = (context_axis,) if isinstance(context_axis, str) else context_axis
    if isinstance(names, tuple) and _are_auto(names):
        function, over_context = _over_context(function, layout, names), False
    if mesh is None:
        return function(*arguments)
    divided = _divided_dimensions(layout, arguments)

    def sharding(names: str) -> NamedSharding:
        return NamedSharding(mesh, spec_of(tuple(names.split()), divided))

    run = function
    tokens_axis = divided.get(TOKENS)
    if over_context and tokens_axis:
        run = _over_context(function, layout, tokens_axis)
    out_sharding = jax.tree.map(sharding, layout.results)
    in_auto = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=out_sharding)
    return in_auto(*arguments)


def _are_auto(names: Axes) -> bool:
    """Returns whether there are such axes, and all are Auto axes of the mesh in context."""
    return bool(names) and set(names) <= set(jax.sharding.get_abstract_mesh().auto_axes)


def has_explicit_axes(*arguments: Any) -> bool:
    """Returns whether the types of some arrays say how these are divided."""
    return _mesh_with_explicit_axes(jax.tree.leaves(arguments)) is not None


def _divided_dimensions(layout: Layout, arguments: tuple[Any, ...]) -> dict[str, Axes]:
    """Returns the mesh axes that divide each dimension, none of them twice."""
    dimensions = dimensions_of_leaves(layout.inputs, arguments)
    arrays = [
        (names, jax.typeof(x).sharding.spec)
        for names, x in zip(dimensions, jax.tree.leaves(arguments), strict=True)
    ]
    divided: dict[str, Axes] = {}
    for names, spec in sorted(arrays, key=lambda array: ROWS not in array[0]):  # parameters last
        used = {axis for axes in divided.values() for axis in axes}
        for position, name in enumerate(names):
            axes = axes_at(spec, position)
            if name not in (*divided, "...") and not used.intersection(axes):
                divided[name] = axes
    return divided


def _over_context[R](
    function: Callable[..., R], layout: Layout, context_axis: Axes
) -> Callable[..., R]:
    """Returns the function of whole rows, given that of pieces."""

    def run(*arguments: Any) -> R:
        leaves, structure = jax.tree.flatten(arguments)

        def of_piece(*leaves: jax.Array) -> R:
            pieces = jax.tree.unflatten(structure, leaves)
            return function(*pieces, context_axis=context_axis)

        def spec(names: Dimensions) -> PartitionSpec:
            return spec_of(names, {TOKENS: context_axis})

        return jax.shard_map(
            of_piece,
            in_specs=tuple(map(spec, dimensions_of_leaves(layout.inputs, arguments))),
            out_specs=jax.tree.map(lambda names: spec(tuple(names.split())), layout.results),
            axis_names=set(context_axis),
        )(*leaves)

    return run


def _mesh_with_explicit_axes(leaves: list[Any]) -> AbstractMesh | None:
    """Returns the mesh of arrays whose types say how they are divided; None if there is none."""
    for x in leaves:
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def vary_alike[*Arrays](*arrays: *Arrays) -> tuple[*Arrays]:
    """Makes all arrays vary over the same mesh axes, in `jax.shard_map`; numpy's become JAX's.

    The backward of a `jax.custom_vjp` must return gradients that vary as the arguments do, but
    the gradient of a replicated parameter varies with the data. After this cast it may, and JAX
    transposes the cast to the sum over devices.

    Args:
      *arrays: pytrees of arrays; None is one without any.
    """
    arrays = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, arrays)
    leaves = jax.tree.leaves(arrays)
    axes = frozenset[str]().union(*(jax.typeof(leaf).mat.varying for leaf in leaves))
    if not axes:
        return arrays

    def vary(leaf: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(leaf).mat.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")

    return jax.tree.map(vary, arrays)


__all__ = [
    "ROWS",
    "TOKENS",
    "Axes",
    "Dimensions",
    "Layout",
    "axes_at",
    "dimensions_of_leaves",
    "has_explicit_axes",
    "over_explicit_axes",
    "spec_of",
    "vary_alike",
]
