"""A model and its tokenizer, for the commands that write text."""

from pathlib import Path
from typing import Literal

from goose_jax.checkpoints import load_pretrained
from goose_jax.nn import RWKV7
from goose_jax.text import Tokenizer, find_tokenizer_file, get_tokenizer

type Dtype = Literal["float32", "bfloat16", "float16"]


def load_model(
    checkpoint: Path | str, *, tokenizer: str | None = None, dtype: Dtype | None = None
) -> tuple[RWKV7, Tokenizer]:
    """Loads any checkpoint, and the tokenizer that goes with it.

    Args:
      checkpoint: as for `load_pretrained`.
      tokenizer: as for `get_tokenizer`; None takes the one that the checkpoint's folder
        holds, or else the one that the checkpoint names.
      dtype: of the parameters and the computation; None keeps what the checkpoint says of each.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if the checkpoint is damaged, its tokenizer is not known, or the tokenizer has ids
        that the model does not have.
    """
    compute = {} if dtype is None else {"compute_dtype": dtype}
    model, metadata = load_pretrained(checkpoint, dtype=dtype, **compute)
    chosen = tokenizer or _file_in(Path(checkpoint)) or metadata.tokenizer
    if chosen is None:
        raise ValueError(
            f"{checkpoint} does not tell its tokenizer; give --tokenizer: byte, world, or the path "
            "of a tokenizer.json or a vocabulary file"
        )
    found = get_tokenizer(chosen)
    if found.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer {str(chosen)!r} has {found.vocab_size} ids, "
            f"but the model's vocabulary is {model.config.vocab_size}"
        )
    return model, found


def _file_in(checkpoint: Path) -> Path | None:
    return find_tokenizer_file(checkpoint) if checkpoint.is_dir() else None


__all__ = ["Dtype", "load_model"]
