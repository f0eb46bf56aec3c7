"""Loads the state that a text begins with."""

from pathlib import Path

from goose_jax.checkpoints import load_state
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State
from goose_jax.training.adapter import check_base, load_adapter
from goose_jax.training.state_tuning import tuned_state


def load_initial_state(path: Path, model: RWKV7) -> RWKV7State:
    """Loads the state of one row that a text begins with.

    Args:
      path: a file that `load_state` reads, or the folder of a run of state tuning.
      model: the model that continues from the state.

    Raises:
      OSError: if the file or folder cannot be read.
      ValueError: if it is damaged, holds no state, or belongs to another model.
    """
    if not path.is_dir():
        return load_state(path, model.config)
    adapter = load_adapter(path)
    if adapter.kind != "state":
        raise ValueError(f"{path} holds adapters and no state; merge them into their model")
    check_base(adapter, model, "the model")
    return tuned_state(adapter.params, model.config)


__all__ = ["load_initial_state"]
