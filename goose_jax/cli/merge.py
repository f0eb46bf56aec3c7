"""`goose-jax merge`: makes adapters part of the model they were trained on."""

from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from goose_jax.checkpoints import load_pretrained, save_pretrained
from goose_jax.cli.flags import IfGiven
from goose_jax.config import Dtype
from goose_jax.training.lora import merge_lora
from goose_jax.training.tuning_checkpoint import check_base, load_tuning_checkpoint


def merge(
    adapter: Annotated[Path, tyro.conf.Positional],
    *,
    base: Path,
    out: Path,
    layout: Literal["native", "pth", "huggingface", "transformers"] = "native",
    dtype: IfGiven[Dtype] = None,
) -> None:
    """Merges LoRA adapters into the model they were trained beside, and writes the result.

    In use:
      goose-jax merge runs/poems-1 --base rwkv7.pth --out poems.pth --layout pth

    Args:
      adapter: The folder of a run with --tune lora (then its newest intact one), or a checkpoint.
      base: The checkpoint that the adapters were trained on.
      out: What to make; nothing is ever written over.
      layout: native: a checkpoint of goose-jax; pth: the official file; huggingface: the folder
        that flash-linear-attention reads; transformers: the folder that transformers reads.
      dtype: Of the merged parameters; by default that in which the base was frozen. A small change
        may be rounded away in 16 bits; float32 keeps all.

    Raises:
      ValueError: if the base is another model, a file is damaged, or there are no adapters.
      OSError: if something cannot be read or written.
    """
    if out.exists():
        raise FileExistsError(f"--out {out} exists; a checkpoint is not written over anything")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = load_tuning_checkpoint(adapter)
        if found.lora is None:
            raise ValueError(f"{adapter} holds initial states, which cannot be merged; use --state")
        config = found.base_config
        model, _ = load_pretrained(
            base, dtype=config.param_dtype, compute_dtype=config.compute_dtype
        )
        check_base(found, model, base)
        merged = merge_lora(model, found.params, found.lora, dtype=dtype)
        save_pretrained(merged, out, layout, found.metadata)
    print(f"wrote {out}: {base} with adapters of rank {found.lora.rank} merged")


__all__ = ["merge"]
