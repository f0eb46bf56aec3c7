"""Turns signals into a request to stop at the next good moment."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """A context in which the first Ctrl-C, SIGTERM or SIGHUP only sets `requested`.

    The second signal acts as it does outside of the context: Ctrl-C raises `KeyboardInterrupt`.
    Signals that are ignored outside, such as SIGHUP under `nohup`, are ignored inside, too. Signal
    handlers can only be set in the main thread.

    Args:
      on_request: called once by the signal handler, with the number of the first signal.

    Example:
      >>> with StopRequest() as stop:
      ...     for _, state in train_steps(train_step, state, batches, steps=9, on_report=print):
      ...         if stop.requested:
      ...             break

    Attributes:
      requested: whether a signal has come, or `request` was called.
      exit_status: 128 and the number of the signal, with which a program says what ended it: 130
        for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP; 0 without a signal.
    """

    def __init__(self, on_request: Callable[[int], None] = lambda number: None):
        self.requested = False
        self.exit_status = 0
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def request(self, number: int) -> None:
        """Sets `requested` as if a signal had come, such as SIGPIPE, which Python ignores."""
        self.requested = True
        self.exit_status = 128 + number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(number)
        self._restore()
        self._on_request(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


__all__ = ["StopRequest"]
