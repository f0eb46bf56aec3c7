"""Writes a file or directory completely or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` at the end.

    If the body raises an error, whatever it wrote is removed and `path` does not change. An
    `OSError` that names no file, as of a full disk, then names `path`.

    Args:
      path: path of the file or directory to create. An existing file is replaced.
    """
    temporary = temporary_path(path)
    _remove(temporary)  # left behind by a process that was killed
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def temporary_path(path: Path) -> Path:
    """Returns the path that `atomic_path` yields."""
    return path.with_name(f".{path.name}.unfinished")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


__all__ = ["atomic_path", "temporary_path"]
