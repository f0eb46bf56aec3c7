"""A model, its tokenizer and the state it begins with, for the commands that need them."""

from pathlib import Path
from typing import Literal

import jax

from goose_jax.checkpoints import CheckpointMetadata, load_pretrained, load_state
from goose_jax.checkpoints.pretrained import checkpoint_kind
from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State
from goose_jax.text import TOKENIZER_NAMES, Tokenizer, find_tokenizer_file, get_tokenizer
from goose_jax.training.adapter import check_base, load_adapter
from goose_jax.training.state_tuning import tuned_state

type Dtype = Literal["float32", "bfloat16", "float16"]

_HOW_TO_GIVE_ONE = (
    "give --tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file"
)


def default_compute_dtype() -> Dtype:
    """What is fastest on this machine: float32 on a CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(
    checkpoint: Path | str, *, tokenizer: str | None = None, dtype: Dtype | None = None
) -> tuple[RWKV7, Tokenizer]:
    """Loads any checkpoint, and the tokenizer that goes with it.

    Args:
      checkpoint: as for `load_pretrained`.
      tokenizer: as for `get_tokenizer`; None takes the one that the checkpoint's folder
        holds, or else the one that the checkpoint names.
      dtype: of the parameters and the computation; None keeps that of the parameters and computes
        in what our own checkpoint says, or else in `default_compute_dtype()`.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if the checkpoint is damaged, its tokenizer is not known, or the tokenizer has ids
        that the model does not have.
    """
    checkpoint = Path(checkpoint)
    compute = dtype
    if compute is None and checkpoint_kind(checkpoint) != "native":
        compute = default_compute_dtype()
    overrides = {} if compute is None else {"compute_dtype": compute}
    model, metadata = load_pretrained(checkpoint, dtype=dtype, **overrides)
    name = tokenizer_name(checkpoint, metadata, tokenizer)
    return model, open_tokenizer(name, model.config)


def tokenizer_name(checkpoint: Path, metadata: CheckpointMetadata, given: str | None) -> str:
    """What `get_tokenizer` knows the tokenizer of a checkpoint by: a name or an absolute path.

    Args:
      checkpoint: its path; a tokenizer's file in its folder comes before what it names.
      metadata: of the checkpoint.
      given: comes before both, if not None.

    Raises:
      ValueError: if nothing tells it.
    """
    file = find_tokenizer_file(checkpoint) if checkpoint.is_dir() and not given else None
    chosen = given or file or metadata.tokenizer
    if chosen is None:
        raise ValueError(f"{checkpoint} does not tell its tokenizer; {_HOW_TO_GIVE_ONE}")
    if chosen in TOKENIZER_NAMES or not Path(chosen).exists():
        return str(chosen)
    return str(Path(chosen).absolute())


def open_tokenizer(name: str, config: RWKV7Config) -> Tokenizer:
    """The tokenizer of a name or path, for a model that has all of its ids.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if there is no such tokenizer, or it has ids that the model does not have.
    """
    found = get_tokenizer(name)
    if found.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer {name!r} has {found.vocab_size} ids, "
            f"but the model's vocabulary is {config.vocab_size}"
        )
    return found


def load_start(path: Path | None, model: RWKV7) -> RWKV7State | None:
    """The state that a text begins with.

    Args:
      path: a file that `load_state` reads, or the folder of a run of state tuning; None gives None.
      model: that goes on from it.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is damaged, holds no state, or is of another model.
    """
    if path is None:
        return None
    if not path.is_dir():
        return load_state(path, model.config)
    adapter = load_adapter(path)
    if adapter.kind != "state":
        raise ValueError(f"{path} holds adapters and no state; merge them into their model")
    check_base(adapter, model, "the model")
    return tuned_state(adapter.params, model.config)


__all__ = [
    "Dtype",
    "default_compute_dtype",
    "load_model",
    "load_start",
    "open_tokenizer",
    "tokenizer_name",
]
