"""Turns Ctrl-C into a request to stop at the next good moment."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """A context in which the first Ctrl-C or SIGTERM only sets `requested`.

    The second signal acts as it does outside of the context: Ctrl-C raises `KeyboardInterrupt`.
    Signal handlers can only be set in the main thread.

    Args:
      on_request: called once by the signal handler, when the first signal comes.

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


__all__ = ["StopRequest"]
