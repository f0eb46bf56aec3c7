"""Conversations in files.

A file is a safetensors file: the arrays of the state by name (shifts in float32 at least, which
holds 16-bit values exactly), and as metadata the text and the fingerprint of the model.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from goose_jax.cli.chat_session import Conversation
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State, check_state, state_dtypes

_FORMAT = "goose-jax chat 1"
_ARRAYS = ("time_shift", "wkv", "channel_shift")
_PER_PARAMETER = 64  # values of each parameter that the fingerprint looks at
_CHOICES_OF_THE_MACHINE = ("remat", "implementation")


def save_chat(path: Path, conversation: Conversation, model: RWKV7) -> None:
    """Saves a conversation; a file of that name is only replaced if it is a saved one, too.

    Raises:
      FileExistsError: if it is something else.
      OSError: if writing fails; then nothing at `path` has changed.
      ValueError: if nothing has been said.
    """
    if conversation.state is None or not conversation.text:
        raise ValueError("there is nothing to save yet")
    if path.exists() and not _is_chat(path):
        raise FileExistsError(f"{path} is no saved conversation, and is not written over")
    arrays = {name: _exact(getattr(conversation.state, name)) for name in _ARRAYS}
    metadata = {
        "format": _FORMAT,
        "text": json.dumps(conversation.text),
        "fingerprint": fingerprint(model),
    }
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        safetensors.numpy.save_file(arrays, temporary, metadata)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:  # what the library makes of an OSError
        raise OSError(f"could not save {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_chat(path: Path, model: RWKV7) -> Conversation:
    """Loads a conversation that was saved with the same model.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is no saved conversation, is damaged, or is of another model.
    """
    with path.open("rb"):  # whose errors name the file
        pass
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no saved conversation: {error}") from error
    if metadata.get("format") != _FORMAT or arrays.keys() != set(_ARRAYS):
        raise ValueError(f"{path} is no saved conversation of {_FORMAT.split()[0]}")
    if metadata["fingerprint"] != fingerprint(model):
        raise ValueError(f"{path} was saved with another model, or another --dtype of it")
    shift_dtype, wkv_dtype = state_dtypes(model.config)
    state = RWKV7State(
        time_shift=jnp.asarray(arrays["time_shift"], shift_dtype),
        wkv=jnp.asarray(arrays["wkv"], wkv_dtype),
        channel_shift=jnp.asarray(arrays["channel_shift"], shift_dtype),
    )
    check_state(state, model.config, batch_size=1)
    return Conversation(json.loads(metadata["text"]), state)


def fingerprint(model: RWKV7) -> str:
    """A checksum of the model's configuration and of some values of each parameter, in hex."""
    config = model.config.to_dict()
    for name in _CHOICES_OF_THE_MACHINE:
        del config[name]
    checksum = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for path, values in jax.tree.leaves_with_path(_some_values(params)):
        checksum.update(jax.tree_util.keystr(path).encode())
        checksum.update(np.asarray(values).tobytes())
    return checksum.hexdigest()


@jax.jit
def _some_values(params: dict) -> dict:
    def evenly(array: jax.Array) -> jax.Array:
        return array.reshape(-1)[:: -(-array.size // _PER_PARAMETER)]

    return jax.tree.map(evenly, params)


def _exact(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))


def _is_chat(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (safetensors.SafetensorError, OSError):
        return False


__all__ = ["fingerprint", "load_chat", "save_chat"]
