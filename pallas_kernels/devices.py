"""The device that a call is traced for, as far as JAX tells it."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

_HOPPER_CAPABILITY = "9.0"
_assumed = contextvars.ContextVar["Device | None"]("assumed", default=None)

compiled_for = contextvars.ContextVar[Any]("compiled_for", default=None)
"""What kernels are compiled for instead of the device in context, hashable; or None."""

_HOPPER_NAMES = re.compile(r"\bG?H(20|100|200|800)\b")


@dataclasses.dataclass(frozen=True)
class Device:
    """What an implementation may ask of a device.

    Attributes:
      kind: its name, as in "NVIDIA H100 80GB HBM3", "cpu" or "TPU v5e".
      platform: "cpu", "gpu" or "tpu".
      is_hopper: whether it is a GPU of compute capability 9.0.
      multiprocessors: the number of multiprocessors of a GPU; None where it is not known.
    """

    kind: str
    platform: str
    is_hopper: bool
    multiprocessors: int | None


def device_in_context() -> Device:
    """Returns the device of the mesh in context, else JAX's default device.

    `jax.set_mesh`, `jax.sharding.use_abstract_mesh` and `jax.shard_map` set the mesh.
    `jax.default_device` sets the default device; otherwise it is the first of `jax.devices()`.
    `assume_device` goes before all of these.
    """
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is not None:
        return _of_mesh(of_mesh)
    default = jax.config.jax_default_device
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return _of_device(jax.devices()[0] if default is None else default)


@contextlib.contextmanager
def assume_device(device: Device) -> Iterator[None]:
    """Makes `device_in_context` return a device, where JAX calls back without its context."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def _of_mesh(abstract: jax.sharding.AbstractDevice) -> Device:
    kind = abstract.device_kind
    for device in jax.devices():
        if device.device_kind == kind:
            return _of_device(device)
    # This process has no such device: it lowers a program for another machine.
    is_hopper = _HOPPER_NAMES.search(kind) is not None
    return Device(kind, abstract.platform, is_hopper, abstract.num_cores)


def _of_device(device: Any) -> Device:
    return Device(
        kind=device.device_kind,
        platform=device.platform,
        is_hopper=getattr(device, "compute_capability", None) == _HOPPER_CAPABILITY,
        multiprocessors=getattr(device, "core_count", None),
    )


__all__ = ["Device", "assume_device", "compiled_for", "device_in_context"]
