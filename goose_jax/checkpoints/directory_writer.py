"""Writes directories of JSON files and arrays, with a checksum of each file.

A directory is written under a temporary name and renamed at the end. A directory with the final
name is therefore always complete, and a failure while writing leaves nothing behind.

Arrays may be divided over devices of several processes. Then all processes call the functions here,
and each writes its own parts, to a folder that all of them see. The first process writes the other
files and renames.
"""

import concurrent.futures
import contextlib
import errno
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from goose_jax.checkpoints.atomic_write import atomic_path, temporary_path
from goose_jax.checkpoints.directory import CHECKSUMS, checksums_of, orbax_reason, quiet_orbax
from goose_jax.parallel.processes import LostProcessError

_ROOM_FOR_DESCRIPTIONS = 1 << 20
_BARRIER_SECONDS = 600


class Saving:
    """A directory that is being written while the program goes on."""

    def __init__(self, path: Path, work: concurrent.futures.Future[None]):
        self._path, self._work = path, work

    def wait(self) -> None:
        """Waits until the directory is complete.

        Raises:
          OSError: if writing failed, for example on a full disk. Incomplete files are removed.
        """
        self._work.result()


def write_directory(
    path: Path | str, descriptions: Mapping[str, Any], trees: Mapping[str, Any]
) -> None:
    """Writes JSON files, arrays and the checksums of all files to a new directory.

    Args:
      path: the directory to create, with its parents.
      descriptions: for each JSON file its value, by file name; bytes are written as they are.
      trees: for each folder of arrays its pytree, by folder name. A None is left out.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
    """
    begin_directory(path, descriptions, trees).wait()


def begin_directory(
    path: Path | str, descriptions: Mapping[str, Any], trees: Mapping[str, Any]
) -> Saving:
    """Begins to write a directory, as `write_directory` does.

    Returns when the arrays have been copied to the host, so that their buffers may be donated. A
    thread writes the copies.

    Returns:
      What to wait for; errors of writing are raised there.

    Raises:
      FileExistsError: if `path` exists.
      OSError: if the disk has no space for the arrays.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    undo = contextlib.ExitStack()
    try:
        temporary = _begin(path, descriptions, trees, undo)
        savers = [_begin_arrays(temporary / name, tree, undo) for name, tree in trees.items()]
    except BaseException as error:
        undo.__exit__(type(error), error, error.__traceback__)
        if isinstance(error, OSError):
            raise _failed(path, error) from error
        raise

    def finish() -> None:
        try:
            with undo:
                for saver in savers:
                    _finish_arrays(saver)
                if jax.process_index() == 0:
                    _write_json(temporary / CHECKSUMS, checksums_of(temporary))
        except OSError as error:
            raise _failed(path, error) from error

    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    work = thread.submit(finish)
    thread.shutdown(wait=False)
    return Saving(path, work)


def _begin(
    path: Path,
    descriptions: Mapping[str, Any],
    trees: Mapping[str, Any],
    undo: contextlib.ExitStack,
) -> Path:
    """Makes the temporary folder with its descriptions; the end of `undo` renames or removes it."""
    if jax.process_index() == 0:
        temporary = undo.enter_context(atomic_path(path))
        temporary.mkdir(parents=True)
        _reserve(temporary, trees)
        for name, value in descriptions.items():
            if isinstance(value, bytes):
                (temporary / name).write_bytes(value)
            else:
                _write_json(temporary / name, value)
    else:
        temporary = temporary_path(path)
    if jax.process_count() > 1:
        # Nobody writes before the folder is there. The barrier runs beside the devices' programs.
        wait = ocp.multihost.get_barrier_sync_fn()
        with _as_os_error():
            wait(key=f"goose_jax checkpoint {path}", timeout_ms=1000 * _BARRIER_SECONDS)
    return temporary


def _begin_arrays(path: Path, tree: Any, undo: contextlib.ExitStack) -> ocp.AsyncCheckpointer:
    saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    undo.push(functools.partial(_close, saver))
    with _as_os_error(), quiet_orbax():
        saver.save(path, args=ocp.args.StandardSave(tree))
    return saver


def _finish_arrays(saver: ocp.AsyncCheckpointer) -> None:
    with _as_os_error(), quiet_orbax():
        saver.wait_until_finished()


def _close(saver: ocp.AsyncCheckpointer, *failure: Any) -> None:
    with quiet_orbax():
        try:
            saver.close()
        except Exception:
            if failure[0] is None:
                raise
            # The error is known: the saver only raises it once more.


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except (TimeoutError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() == 1:
            raise OSError(orbax_reason(error)) from error
        raise LostProcessError(
            "another process of this run was lost, or cannot be reached"
        ) from error
    except OSError:
        raise
    except Exception as error:  # TensorStore reports errors of the system as ValueError
        raise OSError(orbax_reason(error)) from error


def _failed(path: Path, error: OSError) -> OSError:
    return OSError(f"could not save the checkpoint {path}: {error}")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _reserve(directory: Path, tree: Any) -> None:
    """Raises an OSError if the disk has no space for the arrays of `tree`.

    Without this check Orbax would run out of space in the middle of its writes, and the tracebacks
    of its threads would fill the terminal.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + _ROOM_FOR_DESCRIPTIONS
    file = directory / "space"
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                # Some file systems do not support posix_fallocate.
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
    file.unlink()


__all__ = ["Saving", "begin_directory", "write_directory"]
