"""Loads and saves recurrent states in the files of the official ecosystem.

There are two kinds of files, both saved by torch. In both, the state of a head is `[V, K]`, the
transpose of ours.

- Initial states that were trained (state tuning) have a tensor `blocks.{i}.att.time_state`,
  `[H, V, K]`, for each layer. Their token shifts are zero.
- States of the `rwkv` package are a list with three tensors for each layer: the token shift of the
  time mix `[C]`, the heads `[H, V, K]`, and the token shift of the channel mix `[C]`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.pth import read_pth
from goose_jax.checkpoints.pth_writer import write_pth, write_pth_list
from goose_jax.checkpoints.stored_tensor import STORED_DTYPES, StoredTensor
from goose_jax.config import RWKV7Config
from goose_jax.state import RWKV7State, check_state, init_state, state_dtypes
from pallas_kernels.validation import check_positive

type StateLayout = Literal["time_state", "rwkv"]

_NAME = "blocks.{i}.att.time_state"
_OF_LAYER = ("time shift", "wkv", "channel shift")


def load_state(path: Path | str, config: RWKV7Config, batch_size: int = 1) -> RWKV7State:
    """Loads a state from a file of either kind.

    Args:
      path: the file.
      config: configuration of the model that continues from the state. Token shifts are rounded to
        its compute dtype.
      batch_size: B, number of rows. The state is repeated for each row.

    Raises:
      FileNotFoundError: if there is no file.
      CheckpointError: if the file is damaged, is of neither kind, or does not fit the model. The
        message lists all tensors that are missing, unknown or of wrong shapes.
    """
    check_positive("batch_size", batch_size)
    found = read_pth(Path(path))
    named = found if isinstance(found, dict) else _name_list(found)
    expected = _expected_shapes(config, shifts=isinstance(found, list))
    _check(path, named, expected)
    shift_dtype, wkv_dtype = state_dtypes(config)

    def stack(part: str, dtype: np.dtype) -> np.ndarray:
        values = [named[name].read() for name in expected if name.endswith(part)]
        return np.repeat(np.stack(values)[:, None].astype(dtype), batch_size, axis=1)

    wkv = np.swapaxes(stack("time_state" if isinstance(found, dict) else "wkv", wkv_dtype), -1, -2)
    state = dataclasses.replace(init_state(config, batch_size), wkv=jnp.asarray(wkv))
    if isinstance(found, dict):
        return state
    return dataclasses.replace(
        state,
        time_shift=jnp.asarray(stack("time shift", shift_dtype)),
        channel_shift=jnp.asarray(stack("channel shift", shift_dtype)),
    )


def save_state(
    path: Path | str, state: RWKV7State, config: RWKV7Config, layout: StateLayout
) -> None:
    """Saves the state of one row for the official ecosystem, without changing its dtypes.

    Args:
      path: the file to create.
      state: the state, with B = 1.
      config: configuration of the model.
      layout: "time_state" for an initial state, whose token shifts are zero; "rwkv" for the list of
        the `rwkv` package.

    Raises:
      FileExistsError: if `path` exists.
      OSError: if writing fails. Incomplete files are removed.
      TypeError: if the dtypes of `state` are not the dtypes of the model's states.
      ValueError: if its shapes do not fit the model, or if `layout` is "time_state" and a token
        shift is not zero.
    """
    check_state(state, config, 1)
    time_shift, channel_shift = np.asarray(state.time_shift), np.asarray(state.channel_shift)
    wkv = np.swapaxes(np.asarray(state.wkv), -1, -2)
    match layout:
        case "time_state":
            if time_shift.any() or channel_shift.any():
                raise ValueError(
                    f"{layout=} has no place for token shifts, and those of the state are not zero"
                )
            write_pth(path, ((_NAME.format(i=i), value[0]) for i, value in enumerate(wkv)))
        case "rwkv":
            layers = zip(time_shift[:, 0], wkv[:, 0], channel_shift[:, 0], strict=True)
            write_pth_list(path, (tensor for layer in layers for tensor in layer))
        case _:
            raise ValueError(f"{layout=} must be 'time_state' or 'rwkv'")


def _name_list(tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    return {f"layer {k // 3}: {_OF_LAYER[k % 3]}": tensor for k, tensor in enumerate(tensors)}


def _expected_shapes(config: RWKV7Config, *, shifts: bool) -> dict[str, tuple[int, ...]]:
    heads = (config.num_heads, config.head_size, config.head_size)
    layers = range(config.num_layers)
    if not shifts:
        return {_NAME.format(i=i): heads for i in layers}
    shapes = [(config.hidden_size,), heads, (config.hidden_size,)]
    return {
        f"layer {i}: {part}": shape
        for i in layers
        for part, shape in zip(_OF_LAYER, shapes, strict=True)
    }


def _check(
    path: Path | str,
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unknown: {name}" for name in tensors if name not in expected]
    for name in tensors.keys() & expected.keys():
        tensor = tensors[name]
        if tensor.shape != expected[name] or tensor.dtype not in STORED_DTYPES:
            problems.append(
                f"{name} is {tensor.dtype.name}{list(tensor.shape)} rather than floating point "
                f"{list(expected[name])}"
            )
    if problems:
        raise CheckpointError(f"{path} is no state of this model: " + "; ".join(sorted(problems)))
