"""`goose-jax convert`: writes a checkpoint in another layout."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from goose_jax.checkpoints import load_pretrained, save_pretrained
from goose_jax.checkpoints.pretrained import checkpoint_kind, open_foreign
from goose_jax.cli.sizes import format_bytes
from goose_jax.config import Dtype


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    *,
    layout: Literal["pth", "huggingface", "native"],
    dtype: Dtype | None = None,
    tokenizer: str | None = None,
) -> None:
    """Writes a checkpoint in another layout, or with parameters of another dtype.

    In use:
      goose-jax convert rwkv7.pth rwkv7-hf/ --layout huggingface
      goose-jax convert runs/stdlib-1 model.pth --layout pth --dtype bfloat16

    Args:
      source: An official .pth, a folder in the Hugging Face layout, a checkpoint of goose-jax, or
        the folder of a training run (then its newest checkpoint).
      target: File or folder to create; nothing is ever overwritten.
      layout: pth: the official file; huggingface: the folder that flash-linear-attention reads;
        native: a checkpoint of goose-jax.
      dtype: Dtype that parameters are rounded to; by default they keep their dtype.
      tokenizer: Name of the tokenizer that the target records (a .pth cannot record it); by default
        the tokenizer of the source.

    Raises:
      ValueError: if the source is damaged, or the layout cannot hold its configuration.
      OSError: if the source cannot be read or the target cannot be written.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; a checkpoint is not written over anything")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        overrides = {} if layout != "native" else _recorded_compute_dtype(source, dtype)
        model, metadata = load_pretrained(source, dtype=dtype, **overrides)
        if tokenizer is not None:
            metadata = dataclasses.replace(metadata, tokenizer=tokenizer)
        save_pretrained(model, target, layout, metadata)
    arrays = jax.tree.leaves(nnx.state(model, nnx.Param))
    count, size = sum(array.size for array in arrays), sum(array.nbytes for array in arrays)
    print(f"wrote {target}: {count:,} parameters in {arrays[0].dtype.name}, {format_bytes(size)}")


def _recorded_compute_dtype(source: Path, dtype: Dtype | None) -> dict[str, Dtype]:
    """Returns the compute dtype of a new checkpoint of goose-jax, if nobody chose one.

    It is that of the parameters, but never float16, so it does not depend on this machine.
    """
    if dtype is not None or checkpoint_kind(source) == "native":
        return {}
    exact = jnp.finfo(open_foreign(source).config.param_dtype).bits >= 32
    return {"compute_dtype": "float32" if exact else "bfloat16"}


__all__ = ["convert"]
