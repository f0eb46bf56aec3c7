"""The checkpoints of a run: one is written while training goes on; old ones are removed."""

from collections.abc import Callable
from pathlib import Path

import jax

from goose_jax.checkpoints import Saving
from goose_jax.checkpoints.native import checkpoint_path
from goose_jax.training.run_directory import RunDirectory


class CheckpointSaver:
    """Writes checkpoints of a run in the background, one at a time.

    Args:
      run: folder of the run.
      keep: number of newest checkpoints to keep.
      keep_best: whether to keep the best checkpoint, too.
      keep_every: checkpoints whose step is a multiple of this are kept, too; None keeps no others.
    """

    def __init__(self, run: RunDirectory, *, keep: int, keep_best: bool, keep_every: int | None):
        self._run, self._keep = run, keep
        self._keep_best, self._keep_every = keep_best, keep_every
        self._saving: Saving | None = None

    def begin(self, step: int, begin: Callable[[Path], Saving]) -> None:
        """Begins a checkpoint, after the one before is complete.

        Args:
          step: number of steps made.
          begin: begins to write the checkpoint to the path that it is given.

        Raises:
          OSError: if this checkpoint or the one before cannot be written.
        """
        self.finish()
        self._saving = begin(checkpoint_path(self._run.path, step))

    def finish(self) -> None:
        """Waits until the checkpoint is complete, and removes old ones.

        Raises:
          OSError: if it cannot be written. No checkpoint is removed then.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.wait()
        if jax.process_index() == 0:
            self._run.remove_old(
                keep=self._keep, keep_best=self._keep_best, keep_every=self._keep_every
            )


__all__ = ["CheckpointSaver"]
