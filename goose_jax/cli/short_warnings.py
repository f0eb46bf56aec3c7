"""Prints warnings about checkpoints as the commands print other messages."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from goose_jax.checkpoints import CheckpointWarning


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """Prints each `CheckpointWarning` as one line on stderr, while the context lasts."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        show_others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, CheckpointWarning):
                print(f"goose-jax: warning: {message}", file=sys.stderr, flush=True)
            else:
                show_others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


__all__ = ["short_warnings"]
