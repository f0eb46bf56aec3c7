"""The recurrent state of a model: a plain pytree whose size does not grow with the text."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from goose_jax.config import RWKV7Config
from pallas_kernels.validation import check_float, check_positive, check_same_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RWKV7State:
    """The recurrent state of all layers. The first axis is the layer, the second the row.

    Attributes:
      time_shift: `[layers, B, C]` in the compute dtype, the last token's input to each time mix.
      wkv: `[layers, B, H, K, V]` float32, what each head has learnt from the tokens so far; rows
        are key channels. (The official code stores the transpose, `[V, K]`.)
      channel_shift: `[layers, B, C]` in the compute dtype, the last token's input to each channel
        mix.
    """

    time_shift: Float[Array, "layers B C"]
    wkv: Float[Array, "layers B H K V"]
    channel_shift: Float[Array, "layers B C"]


_AXES = {
    "time_shift": "layers B C",
    "wkv": "layers B H K V",
    "channel_shift": "layers B C",
}


def state_dtypes(config: RWKV7Config) -> tuple[np.dtype, np.dtype]:
    """Returns the dtype of the shifts and the dtype of the wkv states (float32 at least)."""
    compute_dtype = jnp.dtype(config.compute_dtype)
    return compute_dtype, jnp.promote_types(compute_dtype, jnp.float32)


def init_state(config: RWKV7Config, batch_size: int) -> RWKV7State:
    """Returns the state before the first token, which is zero.

    Args:
      config: configuration of the model.
      batch_size: B, number of rows.

    Raises:
      ValueError: if `batch_size` is not a positive integer.
    """
    check_positive("batch_size", batch_size)
    shift_dtype, wkv_dtype = state_dtypes(config)
    shift_shape = (config.num_layers, batch_size, config.hidden_size)
    heads_shape = (config.num_heads, config.head_size, config.head_size)
    return RWKV7State(
        time_shift=jnp.zeros(shift_shape, shift_dtype),
        wkv=jnp.zeros((config.num_layers, batch_size, *heads_shape), wkv_dtype),
        channel_shift=jnp.zeros(shift_shape, shift_dtype),
    )


def take_rows(state: RWKV7State, rows: Sequence[int]) -> RWKV7State:
    """Returns the state of some rows of a batch.

    Args:
      state: state of B rows.
      rows: indices in 0..B-1, one for each row of the result. `[2]` picks one row, and `[0] * n`
        repeats the first row n times.

    Raises:
      TypeError: if `state` is not an `RWKV7State`.
      ValueError: if `rows` is empty, or has an index out of range.

    Example:
      >>> state = init_state(RWKV7Config(vocab_size=1, hidden_size=64, num_layers=2), 3)
      >>> take_rows(state, [0, 0, 0, 2]).time_shift.shape
      (2, 4, 64)
    """
    sizes: dict[str, int] = {}
    _check_axes("state", state, sizes)
    if not hasattr(rows, "__len__") or not len(rows):
        raise ValueError(f"rows must be a sequence of at least one row, got {rows!r}")
    for row in rows:
        is_row = isinstance(row, numbers.Integral) and not isinstance(row, bool)
        if not (is_row and 0 <= row < sizes["B"]):
            raise ValueError(f"rows must hold integers in 0..{sizes['B'] - 1}, got {row!r}")
    index = np.array(rows, np.int32)
    return jax.tree.map(lambda x: jnp.take(x, index, axis=1), state)


def join_states(states: Sequence[RWKV7State]) -> RWKV7State:
    """Joins the states of several batches into the state of one batch, and keeps the order of rows.

    Args:
      states: states of the same model; numbers of rows may differ.

    Raises:
      TypeError: if one is not an `RWKV7State`, or has other dtypes than the first.
      ValueError: if there are none, or one has other sizes than the first.

    Example:
      >>> config = RWKV7Config(vocab_size=1, hidden_size=64, num_layers=2)
      >>> join_states([init_state(config, 3), init_state(config, 1)]).time_shift.shape
      (2, 4, 64)
    """
    if not hasattr(states, "__len__") or not len(states):
        raise ValueError(f"states must be a sequence of at least one state, got {states!r}")
    sizes: dict[str, int] = {}
    for i, state in enumerate(states):
        sizes.pop("B", None)  # the only size in which they may differ
        _check_axes(f"states[{i}]", state, sizes)
        for field in _AXES:
            check_same_dtype(**{f"states[{k}].{field}": getattr(states[k], field) for k in (0, i)})
    return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), *states)


def check_state(
    state: Any, config: RWKV7Config, batch_size: int, *, num_heads: int | None = None
) -> None:
    """Checks that a state fits a model and a batch.

    Args:
      state: what the caller gave as a state.
      config: configuration of the model.
      batch_size: B, number of rows.
      num_heads: number of heads, if it is not that of the model: a device of a mesh may have some.

    Raises:
      TypeError: if it is not an `RWKV7State`, or a field has another dtype than `init_state` gives.
      ValueError: if a field has another shape.
    """
    if not isinstance(state, RWKV7State):
        raise TypeError(f"state must be None or an RWKV7State, got {type(state).__name__}")
    sizes = {
        "layers": config.num_layers,
        "B": batch_size,
        "C": config.hidden_size,
        "H": config.num_heads if num_heads is None else num_heads,
        "K": config.head_size,
        "V": config.head_size,
    }
    for name, axes in _AXES.items():
        check = check_wkv_state if name == "wkv" else check_activations
        check(f"state.{name}", getattr(state, name), axes, sizes, config)


def _check_axes(name: str, state: Any, sizes: dict[str, int]) -> None:
    """Checks a state of any model against `sizes`, and adds sizes that `sizes` does not have."""
    if not isinstance(state, RWKV7State):
        raise TypeError(f"{name} must be an RWKV7State, got {type(state).__name__}")
    for field, axes in _AXES.items():
        check_float(f"{name}.{field}", getattr(state, field), axes, sizes)


def check_activations(
    name: str, value: Any, axes: str, sizes: dict[str, int], config: RWKV7Config
) -> None:
    """Checks the axes of an array, as `check_float` does, and that it has the compute dtype.

    Raises:
      TypeError: if `value` is not an array, or has another dtype.
      ValueError: if its shape disagrees with `axes` and `sizes`.
    """
    check_float(name, value, axes, sizes)
    dtype, _ = state_dtypes(config)
    if value.dtype != dtype:
        raise TypeError(
            f"{name} must have dtype {dtype.name}, got {value.dtype.name}: cast it, or make the "
            f"RWKV7Config with compute_dtype={value.dtype.name!r}"
        )


def check_wkv_state(
    name: str, value: Any, axes: str, sizes: dict[str, int], config: RWKV7Config
) -> None:
    """Checks the axes of wkv states, as `check_float` does, and their dtype.

    Raises:
      TypeError: if `value` is not an array, or has another dtype.
      ValueError: if its shape disagrees with `axes` and `sizes`.
    """
    check_float(name, value, axes, sizes)
    _, dtype = state_dtypes(config)
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype.name}, got {value.dtype.name}")
