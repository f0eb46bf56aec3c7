"""Loads and saves recurrent states in the files of the official ecosystem.

There are two kinds of files, both saved by torch. In both, the state of a head is `[V, K]`, the
transpose of ours.

- Initial states that were trained (state tuning) have a tensor `blocks.{i}.att.time_state`,
  `[H, V, K]`, for each layer. Their token shifts are zero. They may lie beside the weights of their
  model in one file. The converter of web-rwkv writes them to safetensors as `[H, K, V]`.
- States of the `rwkv` package are a list with three tensors for each layer: the token shift of the
  time mix `[C]`, the heads `[H, V, K]`, and the token shift of the channel mix `[C]`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from goose_jax.checkpoints.containers import checkpoint_kind, open_tensors
from goose_jax.checkpoints.errors import CheckpointError, list_names, list_problems, shorten_name
from goose_jax.checkpoints.layouts import STATE_NAME
from goose_jax.checkpoints.pretrained import open_foreign
from goose_jax.checkpoints.pth_writer import write_pth, write_pth_list
from goose_jax.checkpoints.recognition import recognise
from goose_jax.checkpoints.stored_tensor import STORED_DTYPES, StoredTensor
from goose_jax.config import RWKV7Config
from goose_jax.state import RWKV7State, check_state, init_state, state_dtypes
from pallas_kernels.validation import check_positive

type StateLayout = Literal["time_state", "rwkv"]

_OF_LAYER = ("time shift", "wkv", "channel shift")


def load_state(path: Path | str, config: RWKV7Config, batch_size: int = 1) -> RWKV7State:
    """Loads a state from a file of either kind, or the initial state of a model that has one.

    Args:
      path: the file, or a checkpoint that `load_pretrained` accepts.
      config: configuration of the model that continues from the state. Token shifts are rounded to
        its compute dtype.
      batch_size: B, number of rows. The state is repeated for each row.

    Raises:
      FileNotFoundError: if there is no file.
      CheckpointError: if the file is damaged, is of neither kind, or does not fit the model. The
        message names the first tensors that are missing, unknown or of wrong shapes.
    """
    check_positive("batch_size", batch_size)
    path = Path(path)
    tensors, container = open_tensors(path)
    if isinstance(tensors, list):
        return _from_list(path, _name_list(tensors), config, batch_size)
    found = recognise(tensors)
    if not found.states:
        raise CheckpointError(f"{path} holds no state: {list_names(tensors)}")
    transposed = found.layout.state_axes == "K V"
    if not found.weights:  # only web-rwkv has states alone in safetensors
        transposed = container == "safetensors"
    return _from_time_states(path, found.states, config, batch_size, transposed=transposed)


def load_merged_state(path: Path | str, config: RWKV7Config) -> RWKV7State | None:
    """Loads the trained initial state that lies beside the weights of a model.

    Args:
      path: a checkpoint that `load_pretrained` accepts.
      config: configuration of its model.

    Returns:
      The state, with B = 1; None if the checkpoint has none.

    Raises:
      CheckpointError: if the state does not fit the model.
    """
    path = Path(path)
    if checkpoint_kind(path) == "native":
        return None
    found = open_foreign(path)
    if not found.states:
        return None
    transposed = found.layout.state_axes == "K V"
    return _from_time_states(path, found.states, config, 1, transposed=transposed)


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
            write_time_states(Path(path), [value[0] for value in wkv])
        case "rwkv":
            layers = zip(time_shift[:, 0], wkv[:, 0], channel_shift[:, 0], strict=True)
            write_pth_list(path, (tensor for layer in layers for tensor in layer))
        case _:
            raise ValueError(f"{layout=} must be 'time_state' or 'rwkv'")


def write_time_states(path: Path, time_states: Sequence[np.ndarray]) -> None:
    """Writes a trained initial state to a file of its own. Errors are those of `write_pth`.

    Args:
      path: the file to create.
      time_states: `[H, V, K]` for each layer.
    """
    write_pth(path, ((STATE_NAME.format(i=i), value) for i, value in enumerate(time_states)))


def _from_time_states(
    path: Path,
    named: Mapping[str, StoredTensor],
    config: RWKV7Config,
    batch_size: int,
    *,
    transposed: bool,
) -> RWKV7State:
    expected = _expected_shapes(config, shifts=False)
    _check(path, named, expected)
    _, dtype = state_dtypes(config)
    wkv = _stack([named[name] for name in expected], dtype, batch_size)
    wkv = wkv if transposed else np.swapaxes(wkv, -1, -2)
    return dataclasses.replace(init_state(config, batch_size), wkv=jnp.asarray(wkv))


def _from_list(
    path: Path, named: Mapping[str, StoredTensor], config: RWKV7Config, batch_size: int
) -> RWKV7State:
    expected = _expected_shapes(config, shifts=True)
    _check(path, named, expected)
    shift_dtype, wkv_dtype = state_dtypes(config)

    def stack(part: str, dtype: np.dtype) -> np.ndarray:
        return _stack([named[name] for name in expected if name.endswith(part)], dtype, batch_size)

    return dataclasses.replace(
        init_state(config, batch_size),
        time_shift=jnp.asarray(stack("time shift", shift_dtype)),
        wkv=jnp.asarray(np.swapaxes(stack("wkv", wkv_dtype), -1, -2)),
        channel_shift=jnp.asarray(stack("channel shift", shift_dtype)),
    )


def _stack(tensors: Sequence[StoredTensor], dtype: np.dtype, batch_size: int) -> np.ndarray:
    values = np.stack([tensor.read().astype(dtype) for tensor in tensors])
    return np.repeat(values[:, None], batch_size, axis=1)


def _name_list(tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    return {f"layer {k // 3}: {_OF_LAYER[k % 3]}": tensor for k, tensor in enumerate(tensors)}


def _expected_shapes(config: RWKV7Config, *, shifts: bool) -> dict[str, tuple[int, ...]]:
    heads = (config.num_heads, config.head_size, config.head_size)
    layers = range(config.num_layers)
    if not shifts:
        return {STATE_NAME.format(i=i): heads for i in layers}
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
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    misfits = []
    for name in sorted(tensors.keys() & expected.keys()):
        tensor = tensors[name]
        if tensor.shape != expected[name] or tensor.dtype not in STORED_DTYPES:
            shape = shorten_name(list(tensor.shape))
            misfits.append(
                f"{name} is {tensor.dtype.name}{shape} rather than floating point "
                f"{list(expected[name])}"
            )
    if problems := list_problems(missing, unknown, misfits):
        raise CheckpointError(f"{path} is no state of this model: " + "; ".join(problems))
