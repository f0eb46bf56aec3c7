"""Draws the held-out bits per byte of a run over the time that its training took.

    python examples/plot_held_out.py runs/debian-1 held-out.svg

The plot leaves out the measurement before the first step, which is far above all others. The time
is that of the training steps in all parts of a run that was resumed, without the time for
measurements and checkpoints.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Annotated

import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure


def held_out_curve(lines: Iterable[str]) -> list[tuple[float, int, float]]:
    """Returns minutes, millions of tokens and bits per byte at each measurement of a run.

    Args:
      lines: the lines of the run's `metrics.jsonl`.
    """
    curve = []
    seconds = tokens = 0
    for line in lines:
        metrics = json.loads(line)
        seconds += metrics.get("seconds", 0)
        tokens += metrics.get("tokens", 0)
        if "held_out_bits_per_byte" in metrics:
            curve.append((seconds / 60, tokens / 1e6, metrics["held_out_bits_per_byte"]))
    return curve


def main(
    run: Annotated[pathlib.Path, tyro.conf.Positional],
    plot: Annotated[pathlib.Path, tyro.conf.Positional],
) -> None:
    """Draws the plot, and prints its numbers.

    Args:
      run: the folder of a run of `goose-jax train`.
      plot: the file to write, such as an SVG or a PNG.
    """
    curve = held_out_curve((run / "metrics.jsonl").read_text().splitlines())
    for minutes, tokens, bits in curve:
        print(f"{minutes:8.2f} min {tokens:9.2f} M tokens {bits:.4f} bits per byte")
    trained = [point for point in curve if point[1]]
    if not trained:
        raise ValueError(f"{run / 'metrics.jsonl'} has no held-out text measured after a step")
    minutes, tokens, bits = zip(*trained, strict=True)
    with rc_context({"svg.fonttype": "none"}):  # text stays text: a small file
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(minutes, bits, "o-", markersize=3)
        axes.set(xlabel="minutes of training", ylabel="held-out bits per byte")
        title = f"{tokens[-1]:.0f} million tokens: {bits[-1]:.3f} bits per byte"
        axes.set_title(f"{title}, at best {min(bits):.3f}")
        axes.grid(alpha=0.3)
        figure.savefig(plot)


if __name__ == "__main__":
    tyro.cli(main)
