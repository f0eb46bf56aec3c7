"""Kernels that the compiler partitions over the Auto axes of a mesh.

The compiler cannot look into a kernel. By itself it gathers what a kernel reads, and each device
computes everything. `partitioned` tells the compiler along which dimensions a function with kernels
falls into independent parts, and traces the function again for the part of one device.

Private names of JAX are imported where they are used, so that whatever else this package does needs
only the public ones.
"""

import contextvars
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from pallas_kernels.devices import Device, assume_device, compiled_for, device_in_context
from pallas_kernels.sharding import (
    ROWS,
    TOKENS,
    Axes,
    Dimensions,
    Layout,
    axes_at,
    dimensions_of_leaves,
    spec_of,
)


def partitioned[R](
    function: Callable[..., R],
    layout: Layout,
    *,
    units: Mapping[str, int] | None = None,
) -> Callable[..., R]:
    """Lets the compiler divide the calls of a function along its independent dimensions.

    The function works under `jax.vmap`, too, but JAX cannot differentiate it.

    Args:
      function: from arrays, given by position, to arrays; keyword arguments are not traced.
      layout: of its arguments and results.
      units: for an independent dimension the number of elements that stay together, if not 1.
    """

    # Calls that are alike share what JAX traced. So a program lowers each kernel once.
    @functools.partial(jax.jit, static_argnames=("structure", "settings", "context"))
    def shared(*leaves: jax.Array, structure: Any, settings: Any, context: Any) -> R:
        del context
        return function(*jax.tree.unflatten(structure, leaves), **dict(settings))

    def run(*arguments: Any, **settings: Any) -> R:
        leaves, structure = jax.tree.flatten(arguments)

        def of_leaves(*leaves: jax.Array) -> R:
            return shared(
                *leaves,
                structure=structure,
                settings=tuple(settings.items()),
                context=(device_in_context(), compiled_for.get()),
            )

        whole, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
        if _is_interpreted(whole):
            results = jaxpr_as_fun(whole)(*leaves)
        else:
            results = _Call(
                name=function.__name__,
                function=of_leaves,
                whole=whole,
                inputs=dimensions_of_leaves(layout.inputs, arguments),
                outputs=dimensions_of_leaves(layout.results, shapes),
                independent=tuple(layout.independent.split()),
                units=units or {},
                context=_Context.current(),
            ).run(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _is_interpreted(traced: Any) -> bool:
    """Returns whether a traced function calls the interpreter of kernels.

    The interpreter's calls have an order, so the compiler cannot divide them.
    """
    from jax._src.effects import ordered_effects

    return any(map(ordered_effects.contains, traced.effects))


def _without_references(traced: Any) -> Any:
    """Returns a traced function without references: arrays that they held become results."""
    from jax._src.state.discharge import discharge_state

    return discharge_state(traced)


def partitioned_backward(
    function: Callable[..., tuple[Any, ...]],
    layout: Layout,
    *,
    units: Mapping[str, int] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Lets the compiler divide the calls of a backward, as `partitioned` does for a forward.

    Args:
      function: from inputs, and cotangents as a keyword argument, to the gradients of the inputs.
      layout: of the forward.
      units: for an independent dimension the number of elements that stay together, if not 1.
    """

    @functools.wraps(function)
    def gradients(*arguments: Any, **settings: Any) -> tuple[Any, ...]:
        *inputs, cotangents = arguments
        return function(*inputs, cotangents=cotangents, **settings)

    call = partitioned(gradients, layout.backward(), units=units)
    return lambda *inputs, cotangents, **settings: call(*inputs, cotangents, **settings)


@dataclasses.dataclass(frozen=True)
class _Context:
    """What a function that is traced again, while XLA compiles, must find as it was before.

    Attributes:
      device: the device in context.
      mesh: the mesh in context.
      variables: the context variables of Python.
      x64: whether JAX's 64-bit types are enabled.
      precision: JAX's default precision of matrix products.
    """

    device: Device
    mesh: AbstractMesh
    variables: contextvars.Context
    x64: bool
    precision: str | None

    @classmethod
    def current(cls) -> "_Context":
        return cls(
            device_in_context(),
            jax.sharding.get_abstract_mesh(),
            contextvars.copy_context(),
            jax.config.jax_enable_x64,
            jax.config.jax_default_matmul_precision,
        )

    def run[R](self, function: Callable[..., R], *args: Any) -> R:
        def traced() -> R:
            with (
                assume_device(self.device),
                jax.enable_x64(self.x64),
                jax.default_matmul_precision(self.precision),
            ):
                return function(*args)

        return self.variables.copy().run(traced)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function of arrays, and what the compiler must know of it.

    Attributes:
      name: of the function, for profiles.
      function: from arrays, one by one, to a pytree of arrays.
      whole: the function, traced for undivided arrays.
      inputs: dimensions of the arrays.
      outputs: dimensions of the results.
      independent: names of dimensions along which the function falls into parts.
      units: how many elements of a dimension stay together.
      context: of the call.
    """

    name: str
    function: Callable[..., Any]
    whole: Any
    inputs: list[Dimensions]
    outputs: list[Dimensions]
    independent: Dimensions
    units: Mapping[str, int]
    context: _Context

    def run(self, *leaves: jax.Array) -> list[jax.Array]:
        """Returns the leaves of the results."""

        @jax.custom_batching.custom_vmap
        def call(*leaves: jax.Array) -> list[jax.Array]:
            rule = self._sharding_rule()
            bound = custom_partitioning(self._run_whole)
            bound.def_partition(self._partition, sharding_rule=lambda *_: rule)
            return bound(leaves, self.whole.consts)

        @call.def_vmap
        def _(
            axis_size: int, is_mapped: Sequence[bool], *leaves: jax.Array
        ) -> tuple[list[jax.Array], list[bool]]:
            del axis_size  # not kept: one device's part of the mapped axis may be shorter
            results = self._mapped(is_mapped, leaves).run(*leaves)
            return results, [True] * len(results)

        # Without jit, a call outside of any would run operation by operation, on gathered arrays.
        with jax.named_scope(self.name):
            return jax.jit(call, inline=True)(*leaves)

    def _mapped(self, is_mapped: Sequence[bool], leaves: Sequence[jax.Array]) -> "_Call":
        """Returns the call that `jax.vmap` makes of this one."""
        name = "mapped" + "x" * len(self.outputs[0])  # unlike any other name
        axes = tuple(0 if mapped else None for mapped in is_mapped)
        function = jax.vmap(self.function, axes)
        return dataclasses.replace(
            self,
            function=function,
            whole=jax.make_jaxpr(function)(*leaves),
            inputs=[
                (name, *dimensions) if mapped else dimensions
                for dimensions, mapped in zip(self.inputs, is_mapped, strict=True)
            ],
            outputs=[(name, *dimensions) for dimensions in self.outputs],
            independent=(*self.independent, name),
        )

    def _run_whole(
        self, leaves: Sequence[jax.Array], constants: Sequence[jax.Array]
    ) -> list[jax.Array]:
        return jax.core.eval_jaxpr(self.whole.jaxpr, constants, *leaves)

    def _sharding_rule(self) -> tuple[str, dict[str, Any]]:
        """Returns the rule for Shardy, the part of the compiler that propagates shardings."""
        whole: list[str] = []  # a name for each dimension, because one array may have two alike

        def factor(name: str) -> str:
            if name in self.independent:
                return name
            whole.append(f"whole{len(whole)}")
            return whole[-1]

        constants = [("constant",) * x.ndim for x in self.whole.consts]
        sides = (
            ", ".join(" ".join(map(factor, names)) for names in side)
            for side in (self.inputs + constants, self.outputs)
        )
        return " -> ".join(sides), {"need_replication_factors": tuple(whole)}

    def _partition(
        self, mesh: Mesh, arguments: tuple[Sequence[Any], Sequence[Any]], results: list[Any]
    ) -> tuple[Mesh, Callable[..., list[jax.Array]], list[Sharding], tuple[Any, Any]]:
        """Returns the function of one device's parts, and how arrays must be divided for it."""
        del results
        leaves, constants = arguments
        mesh, free = _meshes(mesh, leaves[0].sharding, self.context.mesh)
        specs = [_spec(x.sharding, len(x.shape), free) for x in leaves]
        self._warn_if_tokens_are_gathered(specs)
        divided = _divide(
            self.inputs,
            [x.shape for x in leaves],
            specs,
            free.shape,
            self.independent,
            self.units,
        )

        def shardings(arrays: Sequence[Dimensions]) -> list[Sharding]:
            return [NamedSharding(free, spec_of(names, divided)) for names in arrays]

        def of_part(leaves: Sequence[jax.Array], constants: Any) -> list[jax.Array]:
            del constants  # the function has its own
            traced = self.context.run(jax.make_jaxpr(self.function), *leaves)
            results = jaxpr_as_fun(_without_references(traced))(*leaves)
            return [
                _sum_parts(x, names, divided)
                for x, names in zip(results, self.outputs, strict=True)
            ]

        of_constants = [NamedSharding(free, PartitionSpec()) for _ in constants]
        of_leaves = tuple(shardings(self.inputs))
        return mesh, of_part, shardings(self.outputs), (of_leaves, of_constants)

    def _warn_if_tokens_are_gathered(self, specs: Sequence[PartitionSpec]) -> None:
        if TOKENS in self.independent:
            return
        for names, spec in zip(self.inputs, specs, strict=True):
            if ROWS in names and TOKENS in names and (axes := axes_at(spec, names.index(TOKENS))):
                warnings.warn(
                    f"kernels of {self.name} need all tokens of a row, which the mesh axes {axes} "
                    "divide: they are gathered. To keep them divided, name these axes as "
                    "context_axis, if the operator has it",
                    stacklevel=2,
                )
                return


def _sum_parts(x: jax.Array, dimensions: Dimensions, divided: Mapping[str, Axes]) -> jax.Array:
    """Sums a result over the axes of the divided dimensions that it lacks."""
    axes = tuple(axis for name, axes in divided.items() if name not in dimensions for axis in axes)
    return jax.lax.psum(x, axes) if axes else x


def _divide(
    dimensions: Sequence[Dimensions],
    shapes: Sequence[tuple[int, ...]],
    specs: Sequence[PartitionSpec],
    sizes: Mapping[str, int],
    independent: Dimensions,
    units: Mapping[str, int],
) -> dict[str, Axes]:
    """Returns the mesh axes that divide each independent dimension.

    The first activation or state that is divided along a dimension decides, and parameters follow
    it. Parameters decide where no activation or state has the dimension. Axes that do not divide a
    dimension into equal parts of whole units are left out. No axis divides two dimensions.
    """
    divided: dict[str, Axes] = {}
    used: set[str] = set()
    for name in independent:
        having = [x for x in zip(dimensions, shapes, specs, strict=True) if name in x[0]]
        for array, shape, spec in [x for x in having if ROWS in x[0]] or having:
            position = array.index(name)
            axes = tuple(axis for axis in axes_at(spec, position) if axis not in used)
            count = shape[position] / units.get(name, 1)
            while axes and count % math.prod(sizes[axis] for axis in axes):
                axes = axes[:-1]
            if axes:
                divided[name] = axes
                used.update(axes)
                break
    return divided


def _meshes(mesh: Mesh, sharding: Sharding, context: AbstractMesh) -> tuple[Mesh, Mesh]:
    """Returns the mesh of all devices, and that of the axes over which arrays can be divided.

    In a `jax.shard_map` over some axes only the others can divide arrays. There, the compiler
    tells how arrays are divided over one group of devices, which differ in those axes only.
    """
    if not mesh.empty:
        return mesh, mesh
    if context.empty:
        raise NotImplementedError(
            "kernels on several devices need arrays with a NamedSharding, or a mesh in context "
            f"(jax.set_mesh), got {sharding}"
        )
    devices: np.ndarray = np.array(sharding._device_assignment)
    mesh = Mesh(devices.reshape(context.axis_sizes), context.axis_names)
    names = tuple(name for name in context.axis_names if name not in context.manual_axes)
    sizes = [mesh.shape[name] for name in names]
    return mesh, Mesh(devices[: math.prod(sizes)].reshape(sizes), names)


def _spec(sharding: Sharding, rank: int, mesh: Mesh) -> PartitionSpec:
    """Returns how an array of this rank is divided over the axes of the mesh."""
    from jax._src.sharding_impls import parse_flatten_op_sharding

    if isinstance(sharding, NamedSharding):
        return sharding.spec
    return parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(rank), mesh)[0]


__all__ = ["partitioned", "partitioned_backward"]
