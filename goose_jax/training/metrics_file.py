"""Reads and checks the file of a run's metrics: one JSON object per line."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from goose_jax.checkpoints import CheckpointError
from goose_jax.checkpoints.errors import cause, shorten_name

HELD_OUT_METRIC = "held_out_bits_per_byte"
"""The name of the measurements on held-out text in the metrics."""


def check_metrics(values: Any) -> None:
    """Checks the values of a line of metrics.

    Args:
      values: a dict with a "step", which is an integer of at least 0, and finite numbers by name.

    Raises:
      ValueError: if it is something else; the message names the value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"must be an object of numbers, got {shorten_name(repr(values))}")
    if "step" not in values:
        raise ValueError(f"has no step, only {shorten_name(list(values))}")
    if type(values["step"]) is not int or values["step"] < 0:
        raise ValueError(
            f"step must be an integer of at least 0, got {shorten_name(repr(values['step']))}"
        )
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # math.isfinite fails for integers that no float holds.
        if not is_number or not abs(value) <= sys.float_info.max:
            raise ValueError(
                f"{shorten_name(name)} must be a finite number, got {shorten_name(repr(value))}"
            )


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file of metrics, none if there is no file.

    What follows the end of the last line is left out: it was half-written.

    Raises:
      CheckpointError: if a line is damaged; the message names file and line.
      OSError: if the file cannot be read.
    """
    if not file.exists():
        return
    lines = file.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line.decode())
            check_metrics(values)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file}:{number} is no line of metrics, remove it: {cause(error)}"
            ) from error
        yield values


__all__ = ["HELD_OUT_METRIC", "check_metrics", "read_metrics"]
