"""Runs of several processes, on one host or many: JAX's distributed runtime."""

import collections
import contextlib
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

HEARTBEAT_SECONDS = 20
"""Seconds without a sign of life after which a process counts as lost, and JAX ends the others."""

_LONGEST_TEXT = 4096  # bytes that the first process sends to the others


class LostProcessError(ConnectionError):
    """Another process of the run ended, or cannot be reached."""


def start_processes(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run; each of them calls this, before it uses any device.

    Arguments that are None are found by JAX in the environment of SLURM, Kubernetes or Open MPI.

    Args:
      coordinator: "host:port" of the first process, which all processes can reach.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      ValueError: if an argument is missing and not in the environment, or out of range.
      ConnectionError: if the processes do not find each other.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise ValueError(f"process_id must be in 0..{num_processes - 1}, got {process_id}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"the processes of this run are not known: {error} Give the coordinator, the number of "
            "processes and the number of this process, or start them by SLURM, Kubernetes or Open "
            "MPI"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostProcessError(f"the processes of this run did not meet: {reason}") from error


def from_first_process(make: Callable[[], str]) -> str:
    """Calls a function in the first process, and returns its text in all processes.

    Raises:
      Exception: in the first process, what `make` raises.
      LostProcessError: in the others, if `make` raised an error.
    """
    if jax.process_count() == 1:
        return make()
    text, error = "", None
    if jax.process_index() == 0:
        try:
            text = "+" + make()
        except Exception as raised:  # raised again, after the others know
            text, error = "-", raised
    data = np.zeros(_LONGEST_TEXT, np.uint8)
    encoded = text.encode()
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))).rstrip(b"\0").decode()
    if error is not None:
        raise error
    if received[:1] == "-":
        raise LostProcessError("the first process of this run failed; its message says why")
    return received[1:]


class Agreement:
    """Lets the processes of a run agree on a request to stop, without waiting for the devices.

    Every process calls it after each step. A request of one process is answered with True in all
    processes after the same step, some steps later. In a run of one process it is answered at once.

    Args:
      mesh: the mesh of the run, or None.
      delay: number of calls until a request is answered.
    """

    def __init__(self, mesh: Mesh | None, *, delay: int):
        self._mesh, self._delay = mesh, delay
        self._counts: collections.deque[jax.Array] = collections.deque()
        self._sum = jax.jit(jnp.sum)

    def __call__(self, requested: bool) -> bool:
        """Returns whether some process has requested it, `delay` calls before."""
        if self._mesh is None or jax.process_count() == 1:
            return requested
        sharding = NamedSharding(self._mesh, P(self._mesh.axis_names))
        size = self._mesh.devices.size
        flags = jax.make_array_from_callback(
            (size,), sharding, lambda index: np.full(size, requested, np.int32)[index]
        )
        self._counts.append(self._sum(flags))
        return len(self._counts) > self._delay and int(self._counts.popleft()) > 0


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Raises `LostProcessError` for an error of JAX in a run of several processes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        lines = str(error).splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise LostProcessError(
            f"another process of this run was lost, or cannot be reached ({reason})"
        ) from error


def leave(status: int) -> None:
    """Ends this process after an error, at once if other processes may wait for it.

    They learn of it by the connection that breaks. Without this, Python would first wait for them
    at the end of JAX's runtime.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        os._exit(status)


__all__ = [
    "HEARTBEAT_SECONDS",
    "Agreement",
    "LostProcessError",
    "from_first_process",
    "leave",
    "lost_processes_named",
    "start_processes",
]
