"""Loads the state that a text begins with."""

from pathlib import Path

from goose_jax.checkpoints import load_merged_state, load_state
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State
from goose_jax.training.state_tuning import tuned_state
from goose_jax.training.tuning_checkpoint import check_base, load_tuning_checkpoint


def load_initial_state(path: Path | str, model: RWKV7) -> RWKV7State:
    """Loads the state that a text begins with, as a batch of one row.

    Args:
      path: a file that `load_state` reads; or the folder of a run of state tuning, or of one of its
        checkpoints.
      model: the model that continues from the state. For a folder it must be the frozen model.

    Raises:
      OSError: if the file or folder cannot be read.
      ValueError: if it is damaged, holds no state, or belongs to another model.
    """
    path = Path(path)
    if not path.is_dir():
        return load_state(path, model.config)
    checkpoint = load_tuning_checkpoint(path)
    if checkpoint.kind != "state":
        raise ValueError(f"{path} holds adapters and no state; merge them into their model")
    check_base(checkpoint, model, "the model")
    return tuned_state(checkpoint.params, model.config)


def starting_state(
    checkpoint: Path | str, state: Path | str | None, model: RWKV7
) -> RWKV7State | None:
    """Returns the state that texts of a model begin with, as a batch of one row.

    Args:
      checkpoint: the checkpoint of the model. If a trained initial state lies beside its weights,
        texts begin with that.
      state: another state, a path that `load_initial_state` accepts, or None.
      model: the model.

    Returns:
      The state; None if texts begin with zeros.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if `state` is damaged, holds no state, or belongs to another model.
    """
    if state is not None:
        return load_initial_state(state, model)
    return load_merged_state(checkpoint, model.config)


__all__ = ["load_initial_state", "starting_state"]
