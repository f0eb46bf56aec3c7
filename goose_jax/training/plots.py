"""The loss curve as a picture. It needs matplotlib (the extra "plots")."""

import importlib.util
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from goose_jax.training.run_directory import HELD_OUT_METRIC

_SMOOTHING_SHARE = 50  # the smooth curve averages over 1/50 of the steps


def has_matplotlib() -> bool:
    """Returns whether matplotlib, which `plot_loss` needs, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_loss(metrics: Iterable[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draws the training loss and held-out bits per byte over the steps, as a PNG.

    Args:
      metrics: dicts with "step", and with "loss" (nats per token) or "held_out_bits_per_byte" if
        they are to be drawn.
      path: the file to write; an existing file is overwritten.
      title: text above the curves.
    """
    from matplotlib.figure import Figure  # an extra; a Figure by itself needs no display

    metrics = list(metrics)
    training = [(line["step"], line["loss"] / math.log(2)) for line in metrics if "loss" in line]
    held_out = [
        (line["step"], line[HELD_OUT_METRIC]) for line in metrics if HELD_OUT_METRIC in line
    ]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="0.8", linewidth=1)
        axes.plot(steps, _smoothed(losses), label="training, bits per token")
    if held_out:
        steps, bits = zip(*held_out, strict=True)
        axes.plot(steps, bits, "o-", label="held out, bits per byte")
    axes.set(xlabel="step", ylabel="bits", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _smoothed(values: tuple[float, ...]) -> list[float]:
    width = max(1, len(values) // _SMOOTHING_SHARE)
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


__all__ = ["has_matplotlib", "plot_loss"]
