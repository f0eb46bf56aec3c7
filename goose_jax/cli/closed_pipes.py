"""Output that nobody reads any more, as after `goose-jax train | head`."""

import contextlib
import io
import os
import sys


def discard_output() -> None:
    """Lets stdout and stderr write to nothing, so that the end of Python can flush them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def discard_closed_output() -> None:
    """Does the same with those of both that could not write what they hold."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


__all__ = ["discard_closed_output", "discard_output"]
