"""The folder of a training run.

settings.json     the settings that the run was started with
metrics.jsonl     one JSON object per line, each with the number of its "step"
loss.png          the loss curve
state.pth         after state tuning: the initial state as a file of the official ecosystem
checkpoints/      one directory per checkpoint, named by the number of steps
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from goose_jax.checkpoints import CheckpointError
from goose_jax.checkpoints.native import checkpoint_path, list_checkpoints

HELD_OUT_METRIC = "held_out_bits_per_byte"
"""The name of the measurements on held-out text in the metrics."""


class RunDirectory:
    """The folder of a training run.

    Args:
      path: the folder, which must exist. `create` makes a new one, `open` finds an existing one.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @classmethod
    def create(cls, parent: Path | str, name: str, settings: Mapping[str, Any]) -> "RunDirectory":
        """Makes the folder `parent/name-1`, or the one with the next number that is free.

        Args:
          parent: folder of runs, which is made if it does not exist.
          name: name of the run.
          settings: values that JSON can hold, for "settings.json".

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
            (path / "settings.json").write_text(json.dumps(dict(settings), indent=2) + "\n")
            return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> tuple["RunDirectory", dict[str, Any]]:
        """Opens a run to resume it, and removes the metrics of steps after its newest checkpoint.

        Returns:
          The folder, and the settings that `create` wrote.

        Raises:
          FileNotFoundError: if there is no run at `path`.
          ValueError: if it has no checkpoint, or its settings or metrics are damaged.
        """
        path = Path(path)
        file = path / "settings.json"
        if not file.is_file():
            raise FileNotFoundError(f"there is no training run at {path} ({file.name} is missing)")
        try:
            settings = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        run = cls(path)
        run._forget_after(int(run.newest_checkpoint.name))
        return run, settings

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

    @property
    def metrics_file(self) -> Path:
        """The file that `log` writes to."""
        return self.path / "metrics.jsonl"

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line to the metrics; `values` must have a "step"."""
        with self.metrics_file.open("a") as stream:
            stream.write(json.dumps(dict(values)) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yields the lines of the metrics.

        Raises:
          ValueError: if a line is damaged; the message names it.
        """
        if not self.metrics_file.exists():
            return
        for number, line in enumerate(self.metrics_file.read_text().splitlines(), start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self.metrics_file}:{number} is no JSON, remove it: {error}"
                ) from error

    def save(self, step: int, write: Callable[[Path], None], *, keep: int) -> None:
        """Makes a checkpoint, and then removes all but the newest `keep` checkpoints.

        Args:
          step: number of steps made.
          write: writes the checkpoint to the path that it is given.
          keep: number of checkpoints to keep.
        """
        write(checkpoint_path(self.path, step))
        for old in self.checkpoints[:-keep]:
            shutil.rmtree(old)

    def _forget_after(self, step: int) -> None:
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in kept))


__all__ = ["HELD_OUT_METRIC", "RunDirectory"]
