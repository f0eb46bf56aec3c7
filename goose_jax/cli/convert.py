"""`goose-jax convert`: writes a checkpoint in another layout."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from goose_jax.checkpoints import load_pretrained, save_pretrained
from goose_jax.checkpoints.containers import checkpoint_kind
from goose_jax.checkpoints.pretrained import open_foreign
from goose_jax.checkpoints.state_files import write_time_states
from goose_jax.cli.flags import IfGiven
from goose_jax.cli.sizes import format_bytes
from goose_jax.config import Dtype
from goose_jax.text import find_tokenizer_file


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    *,
    layout: Literal[
        *("pth", "official", "web-rwkv", "huggingface", "huggingface-x-x", "transformers"),
        *("transformers-raw", "transformers-emb", "rwkv7", "rwkv7-emb", "rwkv-rs", "native"),
    ],
    dtype: IfGiven[Dtype] = None,
    tokenizer: IfGiven[str] = None,
    state: IfGiven[Path] = None,
) -> None:
    """Writes a checkpoint in another layout, or with parameters of another dtype.

    In use:
      goose-jax convert rwkv7.pth rwkv7-hf/ --layout huggingface
      goose-jax convert RWKV7-1.5B/ rwkv7.st --layout web-rwkv --dtype float16
      goose-jax convert runs/stdlib-1 model.pth --layout pth --dtype bfloat16

    Args:
      source: A .pth or safetensors file, a folder of Hugging Face, a checkpoint of goose-jax, or
        the folder of a training run (then its newest intact one).
      target: What to create; nothing is ever overwritten. An end of .pth, .safetensors or .st asks
        for such a file, any other name for a folder with config.json.
      layout: Names of the tensors. pth: the official file; official: the same names in any file;
        web-rwkv: for web-rwkv and ai00; huggingface: of flash-linear-attention; transformers: of
        transformers itself; native: a checkpoint of goose-jax; the others are named in
        docs/checkpoints.md.
      dtype: Dtype that parameters are rounded to; by default they keep their dtype.
      tokenizer: Name or path of the target's tokenizer; by default that of the source. Only a
        folder can record it, and holds a copy of its file.
      state: File to write a trained initial state to that lies beside the weights of the source.
        Without it, the state goes into the target, too, if the layout has a place for it.

    Raises:
      ValueError: if the source is damaged, or the layout cannot hold its configuration.
      OSError: if the source cannot be read or the target cannot be written.
    """
    for path in (target, state):
        if path is not None and path.exists():
            raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    if state is not None and _read_states(source) is None:
        raise ValueError(f"{state=!s} would have nothing to hold: {source} has no initial state")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        overrides: dict[str, Any] = (
            {} if layout != "native" else _recorded_compute_dtype(source, dtype)
        )
        model, metadata = load_pretrained(source, dtype=dtype, **overrides)
        if tokenizer is not None:
            metadata = dataclasses.replace(metadata, tokenizer=tokenizer)
        elif source.is_dir() and (file := find_tokenizer_file(source)) is not None:
            metadata = dataclasses.replace(metadata, tokenizer=str(file))
        time_states = _read_states(source)
        kept = None if state is not None else time_states
        if state is not None and time_states is not None:
            write_time_states(state, time_states)
        try:
            save_pretrained(model, target, layout, metadata, time_states=kept)
        except BaseException:
            if state is not None:
                state.unlink()  # both files or none
            raise
    arrays = jax.tree.leaves(nnx.state(model, nnx.Param))
    count, size = sum(array.size for array in arrays), sum(array.nbytes for array in arrays)
    print(f"wrote {target}: {count:,} parameters in {arrays[0].dtype.name}, {format_bytes(size)}")


def _read_states(source: Path) -> list[np.ndarray] | None:
    return None if checkpoint_kind(source) == "native" else open_foreign(source).read_states()


def _recorded_compute_dtype(source: Path, dtype: Dtype | None) -> dict[str, Dtype]:
    """Returns the compute dtype of a new checkpoint of goose-jax, if nobody chose one.

    It is that of the parameters, but never float16, so it does not depend on this machine.
    """
    if dtype is not None or checkpoint_kind(source) == "native":
        return {}
    exact = jnp.finfo(open_foreign(source).config.param_dtype).bits >= 32
    return {"compute_dtype": "float32" if exact else "bfloat16"}


__all__ = ["convert"]
