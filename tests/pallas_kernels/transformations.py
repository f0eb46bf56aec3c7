"""Transformations of JAX under which a call of WKV7 gives the same results as a plain one."""

import functools

import jax
from jax.sharding import AxisType, PartitionSpec


def by_rows(function, **arrays):
    """Maps a call over rows with `jax.vmap`."""
    map_rows = jax.vmap(lambda row: function(**jax.tree.map(lambda x: x[None], row)))
    return jax.tree.map(lambda x: x[:, 0], map_rows(arrays))


def row_after_row(function, **arrays):
    """Calls the function for one row after another in a `jax.lax.scan`."""

    def step(_, row):
        return None, function(**jax.tree.map(lambda x: x[None], row))

    return jax.tree.map(lambda x: x[:, 0], jax.lax.scan(step, None, arrays)[1])


def in_shard_map(function, **arrays):
    """Splits rows and heads over a mesh of one device."""
    mesh = jax.make_mesh((1, 1), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    tokens = PartitionSpec("batch", None, "heads")
    state = PartitionSpec("batch", "heads")
    specs = {name: state if name == "initial_state" else tokens for name in arrays}
    return jax.shard_map(
        lambda arrays: function(**arrays), mesh=mesh, in_specs=(specs,), out_specs=(tokens, state)
    )(arrays)


def transformed(transformation, function, **arguments):
    """Transforms a call by its arrays; hands all other arguments to the operator as they are."""
    arrays = {n: x for n, x in arguments.items() if isinstance(x, jax.Array)}
    others = {n: x for n, x in arguments.items() if n not in arrays}
    return transformation(functools.partial(function, **others), **arrays)
