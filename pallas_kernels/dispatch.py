"""Which implementation of an operator runs, and what errors mean.

An implementation raises `NotServed` for a valid call that it does not serve, and `ValueError` or
`TypeError` for a call that is wrong. Only `NotServed` lets another implementation try.

Whether the device suits an implementation is a second question. `implementation=None` asks it for
the device in context. It is not asked of a named implementation, so that any machine can lower a
program for a device that it does not have.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.devices import device_in_context
from pallas_kernels.validation import is_known

type Choice = str | tuple[str | None, str | None] | None
"""The name of an implementation, a pair of names for forward and backward, or None to choose."""


class NotServed(NotImplementedError):  # noqa: N818
    """An implementation does not serve a valid call; another one may."""


def _check_hopper() -> None:
    device = device_in_context()
    if not device.is_hopper:
        raise NotServed(f"mosaic_gpu needs a Hopper GPU, got {device.kind!r}")


DEVICE_CHECKS: Mapping[str, Callable[[], None]] = {"mosaic_gpu": _check_hopper}
"""For implementations that need a certain device, a function that raises `NotServed` on others."""


def _check_sizes(name: str, args: Any, kwargs: Any) -> None:
    """Raises NotServed if a kernel would get symbolic sizes: it is compiled for numbers."""
    for x in jax.tree.leaves((args, kwargs)) if name in DEVICE_CHECKS else ():
        if not is_known(*getattr(x, "shape", ())):
            raise NotServed(f"{name} needs sizes that are numbers, got shape={x.shape}")


def dispatch[R](
    operator: str,
    implementations: Mapping[str, Callable[..., R]],
    implementation: Choice,
    *args: Any,
    **kwargs: Any,
) -> R:
    """Runs an operator through the named implementation, or through the first that serves the call.

    Args:
      operator: the operator's public name, for messages.
      implementations: name to function, the preferred ones first.
      implementation: a name from `implementations`, which then never falls back to another; or
        None, which tries those that suit the device in context, in order, and moves on only at a
        `NotServed`.
      *args: handed to the implementation.
      **kwargs: handed to the implementation.

    Raises:
      ValueError: if the name is unknown, or a pair was given. Operators whose forward and backward
        can be chosen separately are run by `pallas_kernels.differentiation`.
      NotServed: if the named implementation does not serve this call.
      ExceptionGroup: of `NotServed`, if None was given and no implementation serves this call.
    """
    if implementation is not None:
        if isinstance(implementation, tuple):
            raise ValueError(
                f"{operator}: {implementation=} is a pair, but the backward needs what the forward "
                f"of the same implementation kept; give None or one of {list(implementations)}"
            )
        if not isinstance(implementation, str) or implementation not in implementations:
            raise ValueError(
                f"{operator}: {implementation=} is unknown; give None or one of "
                f"{list(implementations)}"
            )
        _check_sizes(implementation, args, kwargs)
        with jax.named_scope(operator):
            return implementations[implementation](*args, **kwargs)
    refusals = []
    for name, function in implementations.items():
        try:
            if name in DEVICE_CHECKS:
                DEVICE_CHECKS[name]()
            _check_sizes(name, args, kwargs)
            with jax.named_scope(operator):
                return function(*args, **kwargs)
        except NotServed as refusal:
            refusal.add_note(f"while trying {operator} with implementation={name!r}")
            refusals.append(refusal)
    raise ExceptionGroup(f"{operator}: no implementation serves this call", refusals)


__all__ = ["Choice", "NotServed", "dispatch"]
