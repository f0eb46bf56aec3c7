"""The folder of a training run.

settings.yaml     the settings of the run, with every default filled in
tokenizer.json    or rwkv_vocab.txt: a copy of the tokenizer's file, if it has one
metrics.jsonl     one JSON object per line, each with the number of its "step"
loss.png          the loss curve
state.pth         after state tuning: the initial state as a file of the official ecosystem
tensorboard/      the same metrics for TensorBoard
set_aside/        checkpoints after the one that the run was resumed from, with the metrics
non_finite/       the batches of steps whose loss or gradient was not finite
checkpoints/      one directory per checkpoint, named by the number of steps
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from goose_jax.checkpoints import CheckpointError
from goose_jax.checkpoints.atomic_write import atomic_path
from goose_jax.checkpoints.native import CHECKPOINTS, list_checkpoints, newest_intact
from goose_jax.checkpoints.tokenizer_copy import embed_tokenizer
from goose_jax.data import Batch
from goose_jax.training.metrics_file import HELD_OUT_METRIC, check_metrics, read_metrics
from goose_jax.training.yaml_file import read_yaml, write_yaml


class RunInUseError(OSError):
    """Another process trains in the folder of a run."""


class RunDirectory:
    """The folder of a training run.

    Args:
      path: the folder, which must exist. `create` makes a new one, `open` finds an existing one.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._is_locked = False

    @classmethod
    def create(cls, parent: Path | str, name: str, settings: Mapping[str, Any]) -> "RunDirectory":
        """Makes the folder `parent/name-1`, or the one with the next number that is free.

        Args:
          parent: folder of runs, which is made if it does not exist.
          name: name of the run.
          settings: values that YAML can hold, for "settings.yaml".

        Raises:
          OSError: if the folder cannot be made.
        """
        number = 1
        while True:
            path = Path(parent) / f"{name}-{number}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                if not path.exists():  # it is `parent` that is in the way
                    raise
                number += 1
                continue
            run = cls(path)
            try:
                write_yaml(run.settings_file, settings)
            except OSError:
                shutil.rmtree(path)  # a folder without settings is no run
                raise
            return run

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Opens the folder of a run, which does not change.

        Args:
          path: the folder, or one of the checkpoints in it.

        Raises:
          FileNotFoundError: if there is no run at `path`.
        """
        run = cls(path)
        if not run.settings_file.is_file():
            if run.path.absolute().parent.name == CHECKPOINTS and run.path.is_dir():
                return cls.open(run.path.absolute().parent.parent)
            raise FileNotFoundError(
                f"there is no training run at {path} ({run.settings_file.name} is missing)"
            )
        return run

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training in this folder while the context lasts.

        The lock ends with the process, also if that is killed. A context within a context of the
        same object changes nothing.

        Raises:
          RunInUseError: if another process trains in this folder, or another object of this one.
          OSError: if the folder cannot be written to.
        """
        if self._is_locked:
            yield
            return
        with (self.path / ".lock").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise RunInUseError(
                    f"{self.path} is in use by process {stream.read().strip() or 'unknown'}: "
                    "only one can train in a folder at a time"
                ) from None
            stream.truncate(0)
            stream.write(f"{os.getpid()} on {platform.node()}\n")
            stream.flush()
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    def intact_checkpoint(self) -> Path:
        """Returns the newest checkpoint whose files are all as they were written.

        Raises:
          CheckpointError: if there is no checkpoint, or all are damaged. The message names each.

        Warns:
          CheckpointWarning: for each newer checkpoint that is damaged.
        """
        if not self.checkpoints:
            raise CheckpointError(f"{self.path} has no checkpoint to resume from")
        return newest_intact(self.path)

    def rewind(self, step: int) -> Path | None:
        """Makes the run what it was after a step, so that it can be trained on from there.

        Checkpoints of later steps, and a copy of the metrics, are moved to a folder of their own in
        "set_aside/". A half-written last line of the metrics is removed.

        Returns:
          That folder; None if there was no later checkpoint.

        Raises:
          OSError: if a file cannot be written or moved. If the disk is full, nothing has moved.
          CheckpointError: if a line of the metrics is damaged; the message names it. Nothing has
            moved then.
        """
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        later = [path for path in self.checkpoints if int(path.name) > step]
        with atomic_path(self.metrics_file) as new:
            new.write_text("".join(kept))
            return self._set_aside(later) if later else None

    def _set_aside(self, checkpoints: Sequence[Path]) -> Path:
        """Moves checkpoints to a new folder, in which a copy of the metrics lies already."""
        folder = self._new_folder("set_aside")
        try:
            if self.metrics_file.exists():
                shutil.copy(self.metrics_file, folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        for path in checkpoints:
            path.rename(folder / path.name)
        return folder

    def _new_folder(self, parent: str) -> Path:
        folders = (self.path / parent / str(number) for number in itertools.count(1))
        folder = next(folder for folder in folders if not folder.exists())
        folder.mkdir(parents=True)
        return folder

    @property
    def settings_file(self) -> Path:
        """The file of the settings: "settings.yaml", or "settings.json" in a run of version 0.1."""
        old = self.path / "settings.json"
        return old if old.is_file() else self.path / "settings.yaml"

    def read_settings(self) -> dict[str, Any]:
        """Returns the settings that `create` or `write_settings` wrote.

        Raises:
          OSError: if the file cannot be read.
          ValueError: if it is damaged.
        """
        return read_yaml(self.settings_file)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Replaces the settings; `settings` holds values that YAML can hold.

        Raises:
          OSError: if the file cannot be written. The settings before are kept then.
        """
        with atomic_path(self.path / "settings.yaml") as new:
            write_yaml(new, settings)
        (self.path / "settings.json").unlink(missing_ok=True)

    @property
    def checkpoints(self) -> list[Path]:
        """The directories of all checkpoints, the oldest first."""
        return list_checkpoints(self.path)

    @property
    def newest_checkpoint(self) -> Path:
        """The directory of the newest checkpoint.

        Raises:
          CheckpointError: if there is none.
        """
        if not self.checkpoints:
            raise CheckpointError(f"{self.path} has no checkpoint to resume from")
        return self.checkpoints[-1]

    def keep_tokenizer(self, name: str) -> str:
        """Copies the files of a tokenizer into the folder, so that the run needs no others.

        Args:
          name: name or path of the tokenizer.

        Returns:
          The path of the copy; `name` if the tokenizer has no file.

        Raises:
          OSError: if a file cannot be read or written.
        """
        copy, files = embed_tokenizer(name)
        for file, content in files.items():
            with atomic_path(self.path / file) as new:
                new.write_bytes(content)
        return str((self.path / str(copy)).absolute()) if files else name

    @property
    def metrics_file(self) -> Path:
        """The file that `log` writes to."""
        return self.path / "metrics.jsonl"

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line to the metrics.

        Args:
          values: a "step", which is an integer of at least 0, and finite numbers by name.

        Raises:
          OSError: if the line cannot be written, for example on a full disk. No part of it is kept.
          ValueError: if a value is something else.
        """
        check_metrics(dict(values))
        with self.metrics_file.open("ab", buffering=0) as stream:
            end = stream.tell()
            line = (json.dumps(dict(values)) + "\n").encode()
            try:
                if stream.write(line) < len(line):  # the disk took a part of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                stream.truncate(end)
                raise OSError(error.errno, error.strerror, str(self.metrics_file)) from None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yields the lines of the metrics. A half-written last line is left out.

        Raises:
          CheckpointError: if another line is damaged; the message names file and line.
        """
        return read_metrics(self.metrics_file)

    def remove_old(
        self, *, keep: int, keep_best: bool = False, keep_every: int | None = None
    ) -> None:
        """Removes the checkpoints that are not to be kept.

        Args:
          keep: number of newest checkpoints to keep.
          keep_best: whether to keep `best_checkpoint`.
          keep_every: checkpoints whose step is a multiple of this are kept; None for no others.
        """
        kept = set(self.checkpoints[-keep:])
        if keep_best and (best := self.best_checkpoint) is not None:
            kept.add(best)
        for path in self.checkpoints:
            if path not in kept and (keep_every is None or int(path.name) % keep_every):
                shutil.rmtree(path)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint at whose step held-out text was measured best; None without measurements.

        Of equals it is the oldest.
        """
        lines = [line for line in self.metrics() if HELD_OUT_METRIC in line]
        measured = {line["step"]: line[HELD_OUT_METRIC] for line in lines}
        known = [path for path in self.checkpoints if int(path.name) in measured]
        return min(known, key=lambda path: measured[int(path.name)], default=None)

    def save_batch(self, step: int, batch: Batch) -> Path:
        """Writes the batch of a step to "non_finite/", as an archive of NumPy.

        In a run of several processes each writes its rows to a file of its own.

        Returns:
          The path of the archive. Its arrays are "inputs", "targets" and, for packed rows,
          "segment_ids".
        """
        arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        process = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.path / "non_finite" / f"{step:08d}{process}.npz"
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as new, new.open("wb") as stream:
            np.savez(stream, **{name: a for name, a in arrays.items() if a is not None})
        return path


__all__ = ["HELD_OUT_METRIC", "RunDirectory", "RunInUseError"]
