"""How each parameter is divided over a mesh: one table by the end of the parameter's path."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from goose_jax.parallel.mesh import axis_sizes

_INTO_HEADS = P("fsdp", "tensor")  # [C, heads]: the columns belong to heads
_OUT_OF_HEADS = P(("tensor", "fsdp"), None)  # [heads, C] or [F, C]: the rows belong to heads
_DOWN = P("fsdp", None)  # [C, rank]
_UP = P("fsdp", "tensor")  # [rank, heads]
_OF_CHANNELS = P("tensor")  # [C], one number for each channel of a head
_OF_HEADS = P("tensor", None)  # [H, K]

PARTITION_RULES: Mapping[str, P] = {
    "embedding": P("tensor", "fsdp"),  # [vocab, C]
    "head": P("fsdp", "tensor"),  # [C, vocab]
    "time_mix.receptance": _INTO_HEADS,
    "time_mix.key": _INTO_HEADS,
    "time_mix.value": _INTO_HEADS,
    "time_mix.output": _OUT_OF_HEADS,
    "time_mix.decay_base": _OF_CHANNELS,
    "time_mix.decay_down": _DOWN,
    "time_mix.decay_up": _UP,
    "time_mix.alpha_base": _OF_CHANNELS,
    "time_mix.alpha_down": _DOWN,
    "time_mix.alpha_up": _UP,
    "time_mix.value_residual_base": _OF_CHANNELS,
    "time_mix.value_residual_down": _DOWN,
    "time_mix.value_residual_up": _UP,
    "time_mix.gate_down": _DOWN,
    "time_mix.gate_up": _UP,
    "time_mix.removal_scale": _OF_HEADS,
    "time_mix.replacement_mix": _OF_HEADS,
    "time_mix.bonus": _OF_HEADS,
    "time_mix.head_norm_scale": _OF_HEADS,
    "time_mix.head_norm_bias": _OF_HEADS,
    "channel_mix.key": P("fsdp", "tensor"),  # [C, F]
    "channel_mix.value": _OUT_OF_HEADS,  # [F, C]
    # Adapters of the matrices above: down is [inputs, rank], up is [rank, outputs]. Their product
    # is divided as the matrix is.
    "time_mix.receptance.down": P("fsdp", None),
    "time_mix.receptance.up": P(None, "tensor"),
    "time_mix.key.down": P("fsdp", None),
    "time_mix.key.up": P(None, "tensor"),
    "time_mix.value.down": P("fsdp", None),
    "time_mix.value.up": P(None, "tensor"),
    "time_mix.output.down": _OUT_OF_HEADS,
    "channel_mix.key.down": P("fsdp", None),
    "channel_mix.key.up": P(None, "tensor"),
    "channel_mix.value.down": _OUT_OF_HEADS,
    # The state that texts begin with, in state tuning: [H, K, V].
    "wkv": P("tensor", None, None),
}
"""The partition of the last axes of each parameter, by the end of its path.

Axes before those, such as the axis of the layers, stay whole. Parameters that are not in the table
are stored on every device: norms and token-shift mixes, which are small.

"fsdp" divides the rows of matrices. The parts of all devices then follow each other in memory, so
that gathering them transposes nothing. Of the embedding it divides the columns, because the number
of rows, the vocabulary, may be odd. `in_model.look_up` does without gathering the embedding.
"""


def partition_spec(path: Any, shape: tuple[int, ...], mesh: Any) -> P:
    """Returns how a parameter, or a moment of the optimizer for it, is divided over a mesh.

    An axis of the mesh that does not divide the size of a dimension leaves it whole: a vocabulary
    of 257 stays whole with tensor=2. `check_mesh` refuses this for sizes that must be divided.

    Args:
      path: path of keys in a pytree, or names joined by dots, such as "blocks.time_mix.key".
      shape: shape of the parameter.
      mesh: the mesh, or an abstract mesh.
    """
    rule = rule_of(path)
    sizes = axis_sizes(mesh)
    dimensions = shape[len(shape) - len(rule) :]
    if len(rule) > len(shape):
        raise ValueError(f"{_name(path)} must have at least {len(rule)} axes, got {shape=}")
    kept = []
    for entry, size in zip(rule, dimensions, strict=True):
        axes, parts = [], 1
        for axis in _axes_of(entry):
            if sizes[axis] > 1 and size % (parts * sizes[axis]) == 0:
                axes.append(axis)
                parts *= sizes[axis]
        kept.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return P(*[None] * (len(shape) - len(rule)), *kept)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree like `tree`, of arrays or their shapes, with the sharding of each leaf.

    Args:
      tree: parameters, a state of the optimizer, a `TrainState`, or any other tree in which the
        names of parameters end the paths.
      mesh: the mesh.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree_specs(tree, mesh))


def tree_specs(tree: Any, mesh: Any) -> Any:
    """Returns a tree like `tree` with the partition of each leaf."""
    return jax.tree.map_with_path(lambda path, leaf: partition_spec(path, leaf.shape, mesh), tree)


def batch_spec(ndim: int) -> P:
    """Returns how a batch is divided: rows over "data" and "fsdp", tokens over "context".

    Args:
      ndim: 2 for `[B, T]`, 3 for microbatches `[A, B, T]`.
    """
    return P(*[None] * (ndim - 2), ("data", "fsdp"), "context")


def rule_of(path: Any) -> P:
    """Returns the entry of the table for a parameter; `P()` if it is not in the table."""
    names = _name(path).split(".")
    # A path of three names belongs to an adapter; the longest end that is in the table counts.
    for length in (3, 2, 1):
        rule = PARTITION_RULES.get(".".join(names[-length:]))
        if rule is not None:
            return rule
    return P()


def dimensions_of(path: Any) -> dict[str, int]:
    """Returns which of the last dimensions of a parameter each axis divides, by the table.

    The dimensions are counted from the end: -1 is the last one.
    """
    rule = rule_of(path)
    return {
        axis: dimension - len(rule)
        for dimension, entry in enumerate(rule)
        for axis in _axes_of(entry)
    }


def _axes_of(entry: Any) -> tuple[str, ...]:
    """Returns the axes in an entry of a partition, from the outer to the inner one."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _name(path: Any) -> str:
    if isinstance(path, str):
        return path
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]  # the path goes into an nnx.Param
    return jax.tree_util.keystr(path, simple=True, separator=".")


__all__ = [
    "PARTITION_RULES",
    "batch_spec",
    "dimensions_of",
    "partition_spec",
    "tree_shardings",
    "tree_specs",
]
