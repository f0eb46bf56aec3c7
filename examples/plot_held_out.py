"""Draws bits per byte of a run, in training and on held-out text, over the time of its training.

    python examples/plot_held_out.py runs/debian-1 held-out.svg

The plot leaves out the measurement before the first step, which is far above all others. The time
is that of the training steps in all parts of a run that was resumed, without the time for
measurements and checkpoints.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Annotated, Any

import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure


def measurements(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Returns what a run measured on held-out text, and in training since the measurement before.

    Args:
      lines: the lines of the run's `metrics.jsonl`.

    Returns:
      For each measurement "step", "minutes" and "million_tokens" of training until then, and
      "held_out_bits_per_byte". Where steps were made since the measurement before, also their
      "training_bits_per_byte" (mean) and "tokens_per_second".
    """
    rows = []
    seconds = tokens = 0
    since: list[dict[str, Any]] = []
    for line in lines:
        metrics = json.loads(line)
        if "seconds" in metrics:
            since.append(metrics)
        if "held_out_bits_per_byte" in metrics:
            took = sum(steps["seconds"] for steps in since)
            read = sum(steps["tokens"] for steps in since)
            seconds, tokens = seconds + took, tokens + read
            rows.append(
                {
                    "step": metrics["step"],
                    "minutes": seconds / 60,
                    "million_tokens": tokens / 1e6,
                    "held_out_bits_per_byte": metrics["held_out_bits_per_byte"],
                }
            )
            if since:
                bits = sum(steps["bits_per_byte"] * steps["tokens"] for steps in since) / read
                rows[-1] |= {
                    "training_bits_per_byte": bits,
                    "tokens_per_second": round(read / took),
                }
            since = []
    return rows


def main(
    run: Annotated[pathlib.Path, tyro.conf.Positional],
    plot: Annotated[pathlib.Path, tyro.conf.Positional],
) -> None:
    """Draws the plot, and prints its numbers, a JSON object for each measurement.

    Args:
      run: the folder of a run of `goose-jax train`.
      plot: the file to write, such as an SVG or a PNG.
    """
    rows = measurements((run / "metrics.jsonl").read_text().splitlines())
    for row in rows:
        print(json.dumps(row))
    trained = [row for row in rows if "training_bits_per_byte" in row]
    if not trained:
        raise ValueError(f"{run / 'metrics.jsonl'} has no held-out text measured after a step")
    minutes = [row["minutes"] for row in trained]
    held_out = [row["held_out_bits_per_byte"] for row in trained]
    with rc_context({"svg.fonttype": "none"}):  # text stays text: a small file
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(minutes, held_out, "o-", markersize=3, label="held-out text")
        training = [row["training_bits_per_byte"] for row in trained]
        axes.plot(minutes, training, label="training, mean since the measurement before")
        axes.set(xlabel="minutes of training", ylabel="bits per byte", ylim=(0, None))
        title = f"{trained[-1]['million_tokens']:.0f} million tokens: {held_out[-1]:.3f}"
        axes.set_title(f"{title} bits per byte on held-out text, at best {min(held_out):.3f}")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(plot)


if __name__ == "__main__":
    tyro.cli(main)
