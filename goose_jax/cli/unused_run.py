"""Removes the folder of a run that failed before its first step."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator

import jax

from goose_jax.training import RunDirectory

_BEFORE_STEPS = {".lock", "settings.yaml", "metrics.jsonl", "tensorboard", "checkpoints"}


@contextlib.contextmanager
def removed_if_unused(run: RunDirectory, files: Iterable[str]) -> Iterator[None]:
    """Removes the folder of a new run if an error ends it before a step is recorded.

    Such a run cannot be resumed. A folder with anything else than the program makes before the
    first step stays, and so does one that an interruption ends.

    Args:
      run: the folder, which this process made.
      files: the names of the tokenizer's files, which are copied into it.
    """
    try:
        yield
    except Exception:
        if jax.process_index() == 0 and _is_unused(run, set(files)):
            shutil.rmtree(run.path)
        raise


def _is_unused(run: RunDirectory, files: set[str]) -> bool:
    if not run.path.is_dir():
        return False
    names = {path.name for path in run.path.iterdir()}
    checkpoints = run.path / "checkpoints"
    return (
        names <= _BEFORE_STEPS | files
        and not (checkpoints.is_dir() and any(checkpoints.iterdir()))
        and all("loss" not in line for line in run.metrics())
    )


__all__ = ["removed_if_unused"]
