"""The folder of a training run.

settings.json     how the run was started
metrics.jsonl     one JSON object per line, each with the "step" it belongs to
loss.png          the loss curve
state.pth         after state tuning: the initial states, for the official ecosystem
checkpoints/      one checkpoint per directory, named by its step
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from goose_jax.checkpoints import CheckpointError
from goose_jax.checkpoints.native import checkpoint_path, list_checkpoints


class RunDirectory:
    """A run's folder and what is written into it.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, parent: Path, name: str, settings: Mapping[str, Any]) -> "RunDirectory":
        """Makes `parent/name-1`, or with the first higher number that is free.

        Raises:
          OSError: if the folder cannot be made.
        """
        number = 1
        while True:
            path = parent / f"{name}-{number}"
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
    def open(cls, path: Path) -> tuple["RunDirectory", dict[str, Any]]:
        """A run to be resumed, and its settings; forgets metrics of steps that were not saved.

        Raises:
          FileNotFoundError: if there is no run at `path`.
          ValueError: if it has no checkpoint, or its settings or metrics are damaged.
        """
        file = path / "settings.json"
        if not file.is_file():
            raise FileNotFoundError(f"there is no training run at {path} ({file.name} is missing)")
        try:
            settings = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        if not list_checkpoints(path):
            raise CheckpointError(f"{path} has no checkpoint to resume from")
        run = cls(path)
        run._forget_after(int(run.newest_checkpoint.name))
        return run, settings

    @property
    def newest_checkpoint(self) -> Path:
        """The directory of the newest checkpoint; there must be one."""
        return list_checkpoints(self.path)[-1]

    @property
    def metrics_file(self) -> Path:
        """Where `log` writes."""
        return self.path / "metrics.jsonl"

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line to the metrics."""
        with self.metrics_file.open("a") as stream:
            stream.write(json.dumps(dict(values)) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of the metrics.

        Raises:
          ValueError: naming the line that is damaged.
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
        """Lets `write` make a checkpoint, then removes older ones but for the newest `keep`."""
        write(checkpoint_path(self.path, step))
        for old in list_checkpoints(self.path)[:-keep]:
            shutil.rmtree(old)

    def _forget_after(self, step: int) -> None:
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in kept))


__all__ = ["RunDirectory"]
