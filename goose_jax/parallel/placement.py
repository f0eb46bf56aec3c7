"""Puts parameters and batches on the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from goose_jax.parallel.rules import batch_spec, tree_shardings


def create_sharded[Tree](make: Callable[[], Tree], mesh: Mesh) -> Tree:
    """Makes parameters so that each device computes and stores its part only.

    The whole is never in one place, so it may be larger than the memory of a device.

    Args:
      make: makes a model, or a pytree of parameters. It is traced, and gets no arguments: it must
        make its own `nnx.Rngs`.
      mesh: the mesh; `PARTITION_RULES` say how it divides each parameter.

    Returns:
      What `make` returns. The values do not depend on the mesh.

    Example:
      >>> mesh = make_mesh(fsdp=jax.device_count())
      >>> config = RWKV7Config(vocab_size=257, hidden_size=64, num_layers=2)
      >>> model = create_sharded(lambda: RWKV7(config, rngs=nnx.Rngs(0)), mesh)
      >>> model.head[...].sharding.spec[-2:]
      ('fsdp', None)
    """
    return creation(make, mesh)()


def creation[Tree](make: Callable[[], Tree], mesh: Mesh) -> Any:
    """Returns the program of `create_sharded`, a function of `jax.jit`."""
    return jax.jit(make, out_shardings=tree_shardings(jax.eval_shape(make), mesh))


def place_tree[Tree](tree: Tree, mesh: Mesh) -> Tree:
    """Divides existing parameters over a mesh, by the same rules as `create_sharded`.

    Args:
      tree: a model or a pytree of arrays. In a run of several processes all must have the same.
      mesh: the mesh.
    """
    return jax.tree.map(_place, tree, tree_shardings(tree, mesh))


def place_batch[Tree](batch: Tree, mesh: Mesh) -> Tree:
    """Puts a batch on the devices of a mesh; each process only copies the rows of its devices.

    Args:
      batch: a pytree of arrays `[(A,) B, T]`, with the rows of all processes.
      mesh: the mesh.
    """
    return jax.tree.map(
        lambda array: _place(array, NamedSharding(mesh, batch_spec(array.ndim))), batch
    )


def process_share(mesh: Mesh | None) -> tuple[int, int]:
    """Returns which part of the rows of each batch this process needs, for `for_process`.

    Processes need the same rows if they divide tokens or heads among them.

    Args:
      mesh: the mesh; None for one device.

    Returns:
      index: number of the part, from 0.
      count: number of parts.

    Raises:
      ValueError: if the rows that this process needs are no such part.
    """
    if mesh is None:
        return 0, 1
    blocks = mesh.shape["data"] * mesh.shape["fsdp"]
    divided = NamedSharding(mesh, batch_spec(2))
    parts = divided.addressable_devices_indices_map((blocks, mesh.shape["context"]))
    needed = sorted({part[0].indices(blocks)[0] for part in parts.values() if part})
    size = len(needed)
    if needed != list(range(needed[0], needed[0] + size)) or blocks % size or needed[0] % size:
        raise ValueError(
            f"the devices of process {jax.process_index()} read the parts {needed} of {blocks} "
            "parts of a batch, which do not follow each other; give make_mesh the devices in the "
            "order of jax.devices()"
        )
    return needed[0] // size, blocks // size


def place_rows[Tree](batch: Tree, mesh: Mesh | None) -> Tree:
    """Puts a batch on the devices of a mesh, given the rows of `process_share` only.

    Args:
      batch: a pytree of arrays `[(A,) rows, T]`.
      mesh: the mesh; None returns the batch as it is.
    """
    if mesh is None:
        return batch
    index, count = process_share(mesh)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        *before, rows, length = array.shape
        first = index * rows

        def part(of: Any) -> np.ndarray:
            start, stop, _ = of[-2].indices(rows * count)
            return array[(*of[:-2], slice(start - first, stop - first), of[-1])]

        sharding = NamedSharding(mesh, batch_spec(array.ndim))
        return jax.make_array_from_callback((*before, rows * count, length), sharding, part)

    return jax.tree.map(place, batch)


def to_host(array: jax.Array) -> np.ndarray:
    """Returns the whole of an array, as NumPy's.

    If parts of it are on devices of other processes, all processes must call this.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def constrain_tree[Tree](tree: Tree, mesh: Mesh | None) -> Tree:
    """Tells the compiler that parameters are divided by the rules; None changes nothing."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, tree_shardings(tree, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device stores."""
    return NamedSharding(mesh, P())


def _place(array: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(array)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


__all__ = [
    "constrain_tree",
    "create_sharded",
    "creation",
    "place_batch",
    "place_rows",
    "place_tree",
    "process_share",
    "replicated",
    "to_host",
]
