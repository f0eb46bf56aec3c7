"""The devices of `goose-jax train`: its processes, and the mesh of their devices."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from goose_jax.cli.model_devices import mesh_named
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.config import RWKV7Config
from goose_jax.parallel import check_mesh, describe_mesh, make_mesh, parse_mesh
from goose_jax.parallel.processes import start_processes


@contextlib.contextmanager
def joined_processes(settings: TrainSettings) -> Iterator[None]:
    """Joins the processes of the run, if it has several; only the first one prints to stdout.

    Raises:
      ValueError: if the processes are not known.
      ConnectionError: if they do not find each other.
    """
    with contextlib.ExitStack() as stack:
        if settings.cluster or settings.coordinator is not None:
            start_processes(
                coordinator=settings.coordinator,
                num_processes=settings.num_processes,
                process_id=settings.process_id,
            )
            if jax.process_index() > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def default_devices() -> list[jax.Device]:
    """Returns the devices that a run uses without `--mesh`: those of all its processes."""
    return jax.devices()


def open_mesh(settings: TrainSettings, config: RWKV7Config) -> Mesh | None:
    """Returns the mesh to train on: that of `--mesh`, or of all devices; None for one device.

    Raises:
      ValueError: if the mesh does not fit the number of devices, the model or its batches; the
        message names the axis and what would fit.
    """
    batches: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "sequence_length": settings.sequence_length,
    }
    if settings.mesh is not None:
        with mesh_named(settings.mesh):
            sizes: dict[str, Any] = dict(parse_mesh(settings.mesh))
            mesh = make_mesh(**sizes)
            check_mesh(mesh, config, **batches)
            return mesh
    if len(devices := default_devices()) == 1:
        return None
    mesh = make_mesh(devices=devices)
    try:
        check_mesh(mesh, config, **batches)
    except ValueError as error:
        raise ValueError(
            f"{error}. All {len(default_devices())} devices are used for data parallelism, unless "
            "--mesh says otherwise"
        ) from error
    return mesh


def describe_devices(mesh: Mesh | None) -> str:
    """Returns a description of the devices for the summary of a run."""
    device = jax.devices()[0]
    kind = f"{device.device_kind} ({jax.default_backend()})"
    if mesh is None:
        return kind
    used, there = mesh.devices.size, jax.device_count()
    count = f"{used} of {there}" if used < there else str(used)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{count} x {kind}{processes}, mesh {describe_mesh(mesh)}"


__all__ = ["default_devices", "describe_devices", "joined_processes", "open_mesh"]
