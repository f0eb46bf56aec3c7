"""The metrics of a run: what its steps measured, and where that is written beside the run."""

import contextlib
import importlib.util
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from goose_jax.training.training_loop import StepReport

_LN2 = math.log(2)
_FLUSH_SECONDS = 30  # after which TensorBoard sees new values


def summarise(
    reports: Sequence[StepReport],
    *,
    bytes_per_token: float,
    flops_per_token: float,
    peak_flops: float | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a few steps that follow each other.

    Args:
      reports: reports of the steps, at least one.
      bytes_per_token: bytes of text per token, for bits per byte.
      flops_per_token: operations of a training step per token.
      peak_flops: operations that the devices make per second at most; None leaves "mfu" out.

    Returns:
      "step": number of the last step. "loss" (nats per token), "bits_per_byte" and "gradient_norm"
      (before clipping): means of the steps, of which each counted token weighs the same in the
      loss. "learning_rate": of the last step. "tokens" (that were
      read), "targets" (that the loss counts) and "seconds": sums; "tokens_per_second": of tokens.
      "mfu": the share of `peak_flops` that was used. "skipped": number of steps whose loss or
      gradient was not finite, which are in no mean; left out if it is 0.
    """
    finite = [report for report in reports if report.is_finite]
    tokens, seconds = (sum(r.tokens for r in reports), sum(r.seconds for r in reports))
    values: dict[str, Any] = {"step": reports[-1].step}
    if counted := sum(report.targets for report in finite):
        values["loss"] = sum(report.loss * report.targets for report in finite) / counted
        values["bits_per_byte"] = values["loss"] / _LN2 / bytes_per_token
    if finite:
        values["gradient_norm"] = sum(report.gradient_norm for report in finite) / len(finite)
    values["learning_rate"] = reports[-1].learning_rate
    values |= {"tokens": tokens, "targets": sum(report.targets for report in reports)}
    values |= {"seconds": seconds, "tokens_per_second": round(tokens / seconds)}
    if peak_flops is not None:
        values["mfu"] = tokens * flops_per_token / seconds / peak_flops
    if len(finite) < len(reports):
        values["skipped"] = len(reports) - len(finite)
    return values


class MetricsWriter(Protocol):
    """Writes metrics to a place of their own, beside the run's `metrics.jsonl`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values that were measured after a number of steps."""
        ...

    def close(self) -> None:
        """Writes what has not been written yet."""
        ...


class TensorBoardWriter:
    """Writes the event files that TensorBoard shows. A `MetricsWriter`.

    Args:
      folder: the folder of the files, which is made if it does not exist.
      first_step: number of steps made before. TensorBoard hides values of later steps that are
        there already, of a run that is resumed from an earlier step.
    """

    def __init__(self, folder: Path, *, first_step: int = 0):
        from tensorboardX.event_file_writer import EventsWriter  # it takes a while to import
        from tensorboardX.proto import event_pb2, summary_pb2

        self._Event, self._Summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # Without the thread of SummaryWriter: it dies where the disk is full, and nobody is told.
        self._folder = folder
        self._events = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        if first_step:
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=first_step + 1, session_log=log)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one scalar for each value.

        Raises:
          OSError: if the values cannot be written.
        """
        scalars = [
            self._Summary.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        self._add(step=step, summary=self._Summary(value=scalars))

    def close(self) -> None:
        """Writes what has not been written yet.

        Raises:
          OSError: if it cannot be written.
        """
        with self._named_in_errors():
            self._events.close()

    def _add(self, **values: Any) -> None:
        with self._named_in_errors():
            self._events.write_event(self._Event(wall_time=time.time(), **values))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from error


class WandbWriter:
    """Sends metrics to Weights & Biases (the extra "wandb"). A `MetricsWriter`.

    Args:
      project: name of the project.
      folder: the folder of the run. The run at Weights & Biases has its name, and goes on when the
        run is resumed.
      settings: settings of the run, which are shown beside it.

    Raises:
      ValueError: if wandb is not installed, or does not let the run begin.
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("--wandb needs wandb: pip install 'goose-jax[wandb]'")
        import wandb

        file = folder / "wandb-id"
        identity = file.read_text().strip() if file.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project,
                id=identity,
                name=folder.name,
                dir=str(folder),
                config=dict(settings),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ValueError(f"--wandb {project}: {error}") from error
        file.write_text(identity + "\n")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values, with "step" beside them."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Ends the run at Weights & Biases."""
        self._run.finish()


__all__ = ["MetricsWriter", "TensorBoardWriter", "WandbWriter", "summarise"]
