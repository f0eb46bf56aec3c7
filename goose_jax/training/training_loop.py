"""Training steps one after another, dispatched ahead of their measurements."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from goose_jax.data import Batch
from goose_jax.training.step import Metrics, TrainState, TrainStep

STEPS_AHEAD = 4
"""The number of steps that wait for the device, or are on it, while the host goes on.

The device never waits for the host if the host prepares a batch in less than the time of four
steps.
"""
_LONG_STEP = 2.0
"""Seconds; after a longer step only one waits, so that a request to stop is met soon."""


class NonFiniteError(FloatingPointError):
    """The loss, its gradient or a parameter has become infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The measurements of one training step, as Python numbers.

    Attributes:
      step: number of optimizer steps made so far, including this one.
      loss: mean cross entropy before the update, in nats per token.
      gradient_norm: global norm of the gradient before clipping.
      learning_rate: learning rate of the step.
      tokens: number of tokens that the model read, without padding.
      targets: number of targets that the loss counts.
      seconds: wall time from the end of the step before to the end of this one. The first step
        includes the time to compile.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    targets: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The number of tokens per second of wall time."""
        return self.tokens / self.seconds

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite; if not, the step changed no parameter."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def raise_non_finite(report: StepReport, batch: Batch) -> None:
    """Raises `NonFiniteError` with the measurements of a step."""
    del batch
    raise NonFiniteError(
        f"step {report.step}: the loss is {report.loss}, the gradient's norm "
        f"{report.gradient_norm}, at a learning rate of {report.learning_rate:.3g}"
    )


def train_steps(
    train_step: TrainStep,
    state: TrainState,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    on_report: Callable[[StepReport], None],
    on_non_finite: Callable[[StepReport, Batch], None] = raise_non_finite,
    wait_after: Callable[[int], bool] = lambda step: False,
) -> Iterator[tuple[int, TrainState]]:
    """Makes training steps, and yields the number of steps made and the state after each.

    A step is dispatched while the device still works on up to `STEPS_AHEAD` steps before it, or on
    one if steps take seconds. So the state that is yielded may still be computed, and the report of
    a step comes some steps later. The next step uses up the state that was yielded: its buffers are
    donated.

    Args:
      train_step: the compiled step, from `make_train_step`.
      state: the state to start from. Its `step` is the number of steps made before.
      batches: returns the batch of a step, counted from 0.
      steps: the number of steps to arrive at, including those made before.
      on_report: called with the report of each step, in their order.
      on_non_finite: called before that with the report and the batch of each step whose loss or
        gradient is not finite. Such a step has changed no parameter. By default it raises
        `NonFiniteError`, which ends the training.
      wait_after: asked once after each step, with the number of steps made, whether to wait until
        this step is done and reported. After the last step that is always so.

    Raises:
      NonFiniteError: by default, if a loss or gradient is not finite. The error names the step.

    Example:
      >>> steps = train_steps(train_step, state, batches, steps=100, on_report=print)
      >>> for step, state in steps:
      ...     pass
    """
    first = int(state.step)
    if first >= steps:
        return
    with _Flight() as flight:
        batch, ahead = batches(first), STEPS_AHEAD
        for step in range(first + 1, steps + 1):
            start = time.perf_counter()
            state, metrics = train_step(state, batch)
            flight.add(step, batch, metrics, start)
            if step < steps:
                batch = batches(step)  # while the device works
            wait = wait_after(step) or step == steps
            for report, of_report in flight.land(leave=0 if wait else ahead):
                ahead = STEPS_AHEAD if report.seconds < _LONG_STEP else 1
                if not report.is_finite:
                    on_non_finite(report, of_report)
                on_report(report)
            yield step, state


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step that the device has been given, with the time of that."""

    step: int
    batch: Batch
    start: float
    done: Future[tuple[Metrics, float]]


class _Flight:
    """The steps that have been dispatched and not been reported, the oldest first.

    A thread waits for each step. So the end of a step is known, even if the host has to wait
    meanwhile until the device takes the launches of a later one.
    """

    def __init__(self) -> None:
        self._steps: collections.deque[_Dispatched] = collections.deque()
        self._last_end = 0.0
        self._waiting = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> "_Flight":
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.shutdown(cancel_futures=True)

    def add(self, step: int, batch: Batch, metrics: Metrics, start: float) -> None:
        done = self._waiting.submit(_wait_for, metrics)
        self._steps.append(_Dispatched(step, batch, start, done))

    def land(self, *, leave: int) -> Iterator[tuple[StepReport, Batch]]:
        """Waits for all but the newest steps, and yields their reports and batches."""
        while len(self._steps) > leave:
            step = self._steps.popleft()
            metrics, end = step.done.result()
            report = StepReport(
                step=step.step,
                loss=float(metrics.loss),
                gradient_norm=float(metrics.gradient_norm),
                learning_rate=float(metrics.learning_rate),
                tokens=int(metrics.tokens),
                targets=int(metrics.targets),
                seconds=end - max(step.start, self._last_end),
            )
            self._last_end = end
            yield report, step.batch


def _wait_for(metrics: Metrics) -> tuple[Metrics, float]:
    """Returns metrics of a step as arrays of the host, and the time at which they were there."""
    return jax.device_get(metrics), time.perf_counter()


__all__ = ["STEPS_AHEAD", "NonFiniteError", "StepReport", "raise_non_finite", "train_steps"]
