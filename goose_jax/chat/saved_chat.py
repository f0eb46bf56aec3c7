"""Saves conversations to files, and loads them.

A file is a safetensors file. Its arrays are the fields of the state; the token shifts are stored in
float32, which holds 16-bit values exactly. Its metadata hold the text, the configuration of the
model and the fingerprint of its parameters.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from goose_jax.chat.session import Conversation
from goose_jax.checkpoints.atomic_write import atomic_path
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State, check_state, state_dtypes

_PROGRAM = "goose-jax"
_FORMAT = f"{_PROGRAM} chat 2"
_ARRAYS = ("time_shift", "wkv", "channel_shift")
_CHOICES_OF_THE_MACHINE = (
    "remat",
    "unroll_layers",
    "implementation",
    "precision",
)  # they do not change what a state means


def save_chat(path: Path, conversation: Conversation, model: RWKV7) -> None:
    """Saves a conversation. An existing file is replaced only if it is a saved conversation.

    Args:
      path: the file to write.
      conversation: the text and the state of one row.
      model: the model that has read the conversation.

    Raises:
      FileExistsError: if the file exists and is not a saved conversation.
      OSError: if writing fails; the file at `path` is then unchanged.
      ValueError: if the conversation is empty.
    """
    if conversation.state is None or not conversation.text:
        raise ValueError("there is nothing to save yet")
    if path.exists() and not _is_chat(path):
        raise FileExistsError(f"{path} is no saved conversation, and is not written over")
    arrays = {name: _exact(getattr(conversation.state, name)) for name in _ARRAYS}
    metadata = {
        "format": _FORMAT,
        "text": json.dumps(conversation.text),
        "config": _config_of(model),
        "fingerprint": fingerprint(model),
    }
    try:
        with atomic_path(path) as temporary:
            safetensors.numpy.save_file(arrays, temporary, metadata)
    except safetensors.SafetensorError as error:  # the library's class for errors of the system
        raise OSError(f"could not save {path}: {error}") from error


def load_chat(path: Path, model: RWKV7) -> Conversation:
    """Loads a conversation that was saved with the same model.

    Args:
      path: the file.
      model: the model that continues the conversation.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if the file is damaged, is not a saved conversation, or belongs to another model.
    """
    with path.open("rb"):  # this error names the file; the error of safetensors may not
        pass
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no saved conversation: {error}") from error
    if metadata.get("format") != _FORMAT or arrays.keys() != set(_ARRAYS):
        raise ValueError(f"{path} is no saved conversation of {_PROGRAM} (format {_FORMAT!r})")
    if (metadata["config"], metadata["fingerprint"]) != (_config_of(model), fingerprint(model)):
        raise ValueError(f"{path} was saved with another model, or another --dtype of it")
    shift_dtype, wkv_dtype = state_dtypes(model.config)
    state = RWKV7State(
        time_shift=jnp.asarray(arrays["time_shift"], shift_dtype),
        wkv=jnp.asarray(arrays["wkv"], wkv_dtype),
        channel_shift=jnp.asarray(arrays["channel_shift"], shift_dtype),
    )
    check_state(state, model.config, batch_size=1)
    return Conversation(json.loads(metadata["text"]), state)


def _config_of(model: RWKV7) -> str:
    config = model.config.to_dict()
    for name in _CHOICES_OF_THE_MACHINE:
        del config[name]
    return json.dumps(config, sort_keys=True)


def _exact(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))


def _is_chat(path: Path) -> bool:
    """Returns whether a file is a saved conversation of any version."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format", "").startswith(f"{_PROGRAM} chat ")
    except (safetensors.SafetensorError, OSError):
        return False


__all__ = ["load_chat", "save_chat"]
