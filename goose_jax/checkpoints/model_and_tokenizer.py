"""Loads a model together with the tokenizer that its checkpoint names."""

from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from goose_jax.checkpoints.pretrained import load_pretrained
from goose_jax.nn import RWKV7
from goose_jax.text import Tokenizer, open_tokenizer, tokenizer_name
from pallas_kernels.types import Precision


def load_model_and_tokenizer(
    checkpoint: Path | str,
    *,
    tokenizer: str | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    mesh: Mesh | None = None,
) -> tuple[RWKV7, Tokenizer]:
    """Loads a checkpoint of any layout, and its tokenizer.

    Args:
      checkpoint: a path that `load_pretrained` accepts.
      tokenizer: a name or path that `get_tokenizer` accepts. None takes the tokenizer file in the
        checkpoint's folder; if there is none, the tokenizer that the checkpoint names.
      dtype: dtype of the parameters and of the computation, as in `load_pretrained`.
      precision: `RWKV7Config.precision`; None keeps the one that a checkpoint of goose-jax records.
      mesh: the mesh to divide the parameters over; None loads to the default device.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if the checkpoint is damaged, if nothing names its tokenizer, or if the tokenizer
        has ids that the model's vocabulary does not have.
    """
    checkpoint = Path(checkpoint)
    overrides = {} if precision is None else {"precision": precision}
    model, metadata = load_pretrained(checkpoint, dtype=dtype, mesh=mesh, **overrides)
    name = tokenizer_name(checkpoint, given=tokenizer, recorded=metadata.tokenizer)
    return model, open_tokenizer(name, model.config.vocab_size)


__all__ = ["load_model_and_tokenizer"]
