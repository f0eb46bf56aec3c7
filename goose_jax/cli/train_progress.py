"""What `goose-jax train` shows while it trains."""

import collections
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Self

import jax
import tqdm

from goose_jax.cli.closed_pipes import discard_closed_output
from goose_jax.training import StepReport

_PROGRESS = (
    "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} passed, ETA {remaining}"
    "{postfix}"
)
_RECENT = 20  # steps whose speed is shown


class Progress:
    """A progress bar, which begins at the first report, so that no time to compile is in its ETA.

    Args:
      total: number of steps of the run.
      on_closed_pipe: called once where nobody reads what is shown any more, as after
        `goose-jax train | head`. Nothing is shown from then on.
    """

    def __init__(self, total: int, on_closed_pipe: Callable[[], None]):
        self._total, self._on_closed_pipe = total, on_closed_pipe
        self._is_closed = False
        self._bar: tqdm.tqdm | None = None
        self._recent: collections.deque[StepReport] = collections.deque(maxlen=_RECENT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show(self._bar.close)

    def add(self, report: StepReport) -> None:
        """Shows the report of the next step, in the first process of a run."""
        self._show(functools.partial(self._add, report))

    def tell_evaluation(self, step: int, bits_per_byte: float) -> None:
        """Prints a measurement on held-out text above the bar."""
        if step > 0:
            text = f"step {step}: {bits_per_byte:.3f} bits per byte on held-out text"
            self._show(functools.partial(tqdm.tqdm.write, text))

    def _show(self, show: Callable[[], None]) -> None:
        if jax.process_index() > 0 or self._is_closed:
            return
        try:
            show()
        except BrokenPipeError:
            self._is_closed = True
            if self._bar is not None:
                self._bar.disable = True  # it would be drawn again when it is deleted
            discard_closed_output()
            self._on_closed_pipe()

    def _add(self, report: StepReport) -> None:
        if self._bar is None:
            self._bar = tqdm.tqdm(
                total=self._total,
                initial=report.step,
                desc="training",
                bar_format=_PROGRESS,
                smoothing=0.05,
            )
        else:
            self._bar.update()
            self._recent.append(report)  # but not the first, with the time to compile
        recent = self._recent or [report]
        speed = sum(step.tokens for step in recent) / sum(step.seconds for step in recent)
        self._bar.set_postfix_str(f"loss {report.loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        if not report.is_finite:
            self._bar.write(
                f"step {report.step}: the loss is {report.loss}, the gradient's norm "
                f"{report.gradient_norm}; the step is left out"
            )


def terminals() -> list[int]:
    """Returns the file descriptors of stdout and stderr that are terminals."""
    return [number for number in (1, 2) if os.isatty(number)]


def tell_request(number: int, terminals: list[int]) -> None:
    """Says that a signal has come, and that the run is saved.

    Args:
      number: number of the signal. At SIGHUP the terminals are gone, and the program writes to
        nothing instead.
      terminals: what `terminals` returned when the run began.
    """
    if number == signal.SIGHUP:
        for terminal in terminals:
            os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
    tqdm.tqdm.write(
        "finishing the steps under way, then saving; press Ctrl-C again to stop at once",
        file=sys.stderr,
    )


__all__ = ["Progress", "tell_request", "terminals"]
