"""Steps one after another, with reports, and a way to stop between two of them."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import jax

from goose_jax.data import Batch
from goose_jax.training.step import TrainState, TrainStep


class NonFiniteError(FloatingPointError):
    """The loss or its gradient has become infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one step did, as numbers of Python.

    Attributes:
      step: optimizer steps made so far, this one included.
      loss: mean cross entropy before the update, in nats per token.
      gradient_norm: global norm of the gradient, before clipping.
      learning_rate: of this step.
      tokens: how many targets were counted.
      seconds: wall time of the step; that of the first one includes compiling.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Targets learnt from per second of wall time."""
        return self.tokens / self.seconds


def train_steps(
    train_step: TrainStep,
    state: TrainState,
    batches: Callable[[int], Batch],
    *,
    steps: int,
) -> Iterator[tuple[TrainState, StepReport]]:
    """Makes steps until `steps` have been made in all, and hands over the state after each.

    The state handed over is used up by the step that follows.

    Args:
      train_step: from `make_train_step`; uses up the state it gets.
      state: to start from; its `step` says how many steps were made before.
      batches: the batch of each step, counted from 0.
      steps: the number of steps to arrive at.

    Raises:
      NonFiniteError: naming the step, at the first loss or gradient that is not finite; the state
        of that step is not handed over.

    Example:
      >>> for state, report in train_steps(train_step, state, batches, steps=100):
      ...     print(report.step, report.loss)
    """
    first = int(state.step)
    if first >= steps:
        return
    batch = batches(first)
    for step in range(first, steps):
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        if step + 1 < steps:
            batch = batches(step + 1)  # while the device works
        numbers = jax.device_get(metrics)
        report = StepReport(
            step=step + 1,
            loss=float(numbers.loss),
            gradient_norm=float(numbers.gradient_norm),
            learning_rate=float(numbers.learning_rate),
            tokens=int(numbers.tokens),
            seconds=time.perf_counter() - start,
        )
        if not (math.isfinite(report.loss) and math.isfinite(report.gradient_norm)):
            raise NonFiniteError(
                f"step {report.step}: the loss is {report.loss}, the gradient's norm "
                f"{report.gradient_norm}, at a learning rate of {report.learning_rate:.3g}"
            )
        yield state, report


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop, to be granted between two steps.

    A second one stops at once, as without this object. To be used in the main thread.

    Args:
      on_request: called when the wish comes in, from the signal handler.

    Example:
      >>> with StopRequest() as stop:
      ...     for state, report in train_steps(train_step, state, batches, steps=100):
      ...         if stop.requested:
      ...             break

    Attributes:
      requested: whether a signal has come.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None):
        self.requested = False
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        self._on_request()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


__all__ = ["NonFiniteError", "StepReport", "StopRequest", "train_steps"]
