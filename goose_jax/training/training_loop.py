"""Training steps one after another, each with a report."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax

from goose_jax.data import Batch
from goose_jax.training.step import TrainState, TrainStep


class NonFiniteError(FloatingPointError):
    """The loss or its gradient has become infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The measurements of one training step, as Python numbers.

    Attributes:
      step: number of optimizer steps made so far, including this one.
      loss: mean cross entropy before the update, in nats per token.
      gradient_norm: global norm of the gradient before clipping.
      learning_rate: learning rate of the step.
      tokens: number of targets that the loss counts.
      seconds: wall time of the step. The first step includes the time to compile.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The number of counted targets per second of wall time."""
        return self.tokens / self.seconds


def train_steps(
    train_step: TrainStep,
    state: TrainState,
    batches: Callable[[int], Batch],
    *,
    steps: int,
) -> Iterator[tuple[TrainState, StepReport]]:
    """Makes training steps, and yields the state and a report after each.

    The next step uses up the state that was yielded: its buffers are donated.

    Args:
      train_step: the compiled step, from `make_train_step`.
      state: the state to start from. Its `step` is the number of steps made before.
      batches: returns the batch of a step, counted from 0.
      steps: the number of steps to arrive at, including those made before.

    Raises:
      NonFiniteError: if a loss or gradient is not finite. The error names the step, and the state
        of that step is not yielded.

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


__all__ = ["NonFiniteError", "StepReport", "train_steps"]
