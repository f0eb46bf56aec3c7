"""The devices of `--mesh`, which commands divide a model over."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from goose_jax.parallel import make_mesh, parse_mesh
from goose_jax.parallel.mesh import check_mesh_of_batches


def mesh_for_one_text(mesh: str | None) -> Mesh | None:
    """Returns the mesh of `--mesh` for commands that work on one text.

    The size of "data" that is left out is 1: a single text leaves nothing for other devices.

    Args:
      mesh: such as "fsdp=2,tensor=4"; None is one device.

    Raises:
      ValueError: if the text is no mesh, there are fewer devices, or an axis divides batches.
    """
    if mesh is None:
        return None
    with mesh_named(mesh):
        sizes: dict[str, Any] = {"data": 1} | parse_mesh(mesh)
        for axis in ("data", "context"):
            if sizes.get(axis, 1) > 1:
                raise ValueError(
                    f"{axis} divides batches, but this command works on one text; the axes fsdp "
                    "and tensor divide the model, as in 'tensor=4'"
                )
        return make_mesh(**sizes)


def mesh_for_batches(mesh: str | None, *, batch_size: int, sequence_length: int) -> Mesh | None:
    """Returns the mesh of `--mesh` for commands that work on batches.

    Args:
      mesh: such as "data=2,fsdp=4"; None is one device.
      batch_size: rows of a batch.
      sequence_length: tokens of a row.

    Raises:
      ValueError: if the text is no mesh, or the mesh does not fit the number of devices or the
        batches; the message names the axis and what would fit.
    """
    if mesh is None:
        return None
    with mesh_named(mesh):
        sizes: dict[str, Any] = dict(parse_mesh(mesh))
        made = make_mesh(**sizes)
        check_mesh_of_batches(made, batch_size=batch_size, sequence_length=sequence_length)
        return made


@contextlib.contextmanager
def mesh_named(mesh: str) -> Iterator[None]:
    """Lets each `ValueError` begin with `--mesh` and its value."""
    try:
        yield
    except ValueError as error:
        prefix = "--" if str(error).startswith(f"mesh {mesh!r}") else f"--mesh {mesh!r}: "
        raise ValueError(f"{prefix}{error}") from error


__all__ = ["mesh_for_batches", "mesh_for_one_text", "mesh_named"]
