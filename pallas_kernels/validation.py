"""Checks of arguments, made once, by public functions, in one wording."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _shape_and_dtype(name: str, value: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}: {value!r}")
    return tuple(value.shape), value.dtype


def _check_shape(
    name: str, shape: tuple[int, ...], axes: str, sizes: dict[str, int], nonempty: bool
) -> None:
    names = axes.split()
    if len(shape) != len(names):
        raise ValueError(f"{name} must have {len(names)} axes [{', '.join(names)}], got {shape=}")
    for axis, size in zip(names, shape, strict=True):
        expected = sizes.setdefault(axis, size)
        if size != expected:
            raise ValueError(
                f"{name} must have shape [{', '.join(names)}] with {axis}={expected}, got {shape=}"
            )
        if nonempty and size < 1:
            raise ValueError(f"{name} must not be empty along {axis}, got {shape=}")


def check_float(name: str, value: Any, axes: str, sizes: dict[str, int]) -> None:
    """Checks a floating-point array against named axes and binds the axes that are new.

    Args:
      name: the argument's name, for messages.
      value: what the caller gave.
      axes: the expected axes, as in "B T H K".
      sizes: axis name to size; axes met for the first time are added to it.

    Raises:
      TypeError: if `value` is not an array of bfloat16, float16, float32 or float64.
      ValueError: if its shape disagrees with `axes` and `sizes`, or is empty.
    """
    shape, dtype = _shape_and_dtype(name, value)
    if dtype.name not in FLOAT_DTYPES:
        raise TypeError(f"{name} must have a dtype of {FLOAT_DTYPES}, got {dtype.name}")
    _check_shape(name, shape, axes, sizes, nonempty=True)


def check_int(name: str, value: Any, axes: str, sizes: dict[str, int]) -> None:
    """Checks an array of integers against named axes and binds the axes that are new.

    Args:
      name: the argument's name, for messages.
      value: what the caller gave.
      axes: the expected axes, as in "B T".
      sizes: axis name to size; axes met for the first time are added to it.

    Raises:
      TypeError: if `value` is not an array of integers.
      ValueError: if its shape disagrees with `axes` and `sizes`, or is empty.
    """
    shape, dtype = _shape_and_dtype(name, value)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {dtype.name}")
    _check_shape(name, shape, axes, sizes, nonempty=True)


def check_bool(name: str, value: Any, axes: str, sizes: dict[str, int]) -> None:
    """Checks an array of booleans against named axes and binds the axes that are new.

    Args:
      name: the argument's name, for messages.
      value: what the caller gave.
      axes: the expected axes, as in "B".
      sizes: axis name to size; axes met for the first time are added to it.

    Raises:
      TypeError: if `value` is not an array of booleans.
      ValueError: if its shape disagrees with `axes` and `sizes`, or is empty.
    """
    shape, dtype = _shape_and_dtype(name, value)
    if dtype != np.bool_:
        raise TypeError(f"{name} must have dtype bool, got {dtype.name}")
    _check_shape(name, shape, axes, sizes, nonempty=True)


def check_same_dtype(**arrays: Any) -> None:
    """Checks that all arrays have the dtype of the first.

    Raises:
      TypeError: naming the first that differs.
    """
    (first, reference), *others = arrays.items()
    for name, array in others:
        if array.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {reference.dtype.name}, "
                f"got {array.dtype.name}"
            )


def check_segment_ids(
    segment_ids: Any, sizes: dict[str, int], num_segments: int | None = None
) -> None:
    """Checks segment ids `[B, T]`, and with `num_segments` that each segment can have a state.

    While tracing, for example under jit, values are unknown; then only shape and dtype are checked.

    Args:
      segment_ids: what the caller gave.
      sizes: axis name to size; B and T are added to it, or must agree.
      num_segments: N, if each segment has a state: ids are at most N, and each is in one run.

    Raises:
      TypeError: if `segment_ids` is not an array of integers.
      ValueError: if its shape or values are wrong, or `num_segments` is not an integer >= 1.
    """
    check_int("segment_ids", segment_ids, "B T", sizes)
    if num_segments is not None:
        check_positive("num_segments", num_segments)
    if isinstance(segment_ids, jax.core.Tracer):
        return
    values = np.asarray(segment_ids)
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise ValueError(f"segment_ids must be >= 0 (0 is padding), got {low}")
    if num_segments is None:
        return
    if high > num_segments:
        raise ValueError(f"segment_ids must be at most {num_segments=}, got {high}")
    for row, ids in enumerate(values):
        tokens = ids[ids != 0]
        starts = tokens[np.diff(tokens, prepend=0) != 0]
        seen, runs = np.unique(starts, return_counts=True)
        if (runs > 1).any():
            raise ValueError(
                f"segment_ids must have each id in one run of a row with {num_segments=}, "
                f"got several of id {seen[runs > 1][0]} in row {row}"
            )


def check_positive(name: str, value: Any) -> None:
    """Checks that a size known at trace time is an integer >= 1.

    Raises:
      ValueError: naming the argument and its value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def is_known(*sizes: Any) -> bool:
    """Returns whether all sizes are integers, none a symbol of `jax.export.symbolic_shape`."""
    return all(isinstance(size, (int, np.integer)) for size in sizes)


def check_eps(eps: Any) -> None:
    """Checks the epsilon of a norm: a number above 0 that is known at trace time.

    Raises:
      ValueError: if it is anything else; the message has the value.
    """
    if not isinstance(eps, (int, float)) or not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a number > 0 known at trace time, got {eps!r}")


def check_precision(name: str, value: Any) -> None:
    """Checks a precision: None or "high".

    Raises:
      ValueError: naming the argument and its value.
    """
    if not (value is None or (isinstance(value, str) and value == "high")):
        raise ValueError(f"{name} must be None or 'high', got {value!r}")


__all__ = [
    "FLOAT_DTYPES",
    "check_bool",
    "check_eps",
    "check_float",
    "check_int",
    "check_positive",
    "check_precision",
    "check_same_dtype",
    "check_segment_ids",
    "is_known",
]
