"""Fine-tunes a small model on the pages of this documentation, with several settings.

    python benchmarks/finetuning.py                        # some minutes on two cores

`goose-jax train` makes a byte-level model of Python's standard library, and tunes it in each of the
ways of `TUNINGS`. The table has the bits per byte of held-out pages before and after. The pages are
those of the commit, the library is that of the Python that runs this.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

import tyro
from results import Row, write_results

from goose_jax.cli.main import main as goose_jax
from goose_jax.training import RunDirectory
from goose_jax.training.metrics_file import HELD_OUT_METRIC

PAGES = pathlib.Path(__file__).resolve().parents[1] / "docs"
TUNINGS = (
    "--tune full",
    "--tune full --learning-rate 2e-4",
    "--tune lora",
    "--tune lora --learning-rate 1e-3",
    "--tune state",
    "--tune state --learning-rate 0.5",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      steps: optimizer steps that make the model.
      tuning_steps: optimizer steps of each tuning, of 8 x 128 bytes.
      json: file to write the rows to, in the format of `results.py`.
    """

    steps: int = 250
    tuning_steps: int = 120
    json: pathlib.Path | None = None


def train(out: pathlib.Path, steps: int, flags: Sequence[str] = ()) -> RunDirectory:
    """Runs `goose-jax train` and returns its run, the only one in the folder `out`."""
    shared = ("--sample-length=0", "--no-plot", "--no-tensorboard")
    goose_jax(["train", f"--out={out}", f"--steps={steps}", *shared, *flags])
    (run,) = out.glob("*-1")
    return RunDirectory.open(run)


def main(settings: Settings) -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        base = train(out / "base", settings.steps)
        shared = (f"--from={base.path}", f"--data={PAGES}", "--pattern=*.md")
        for i, tuning in enumerate(TUNINGS):
            flags = (*shared, "--sequence-length=128", *tuning.split())
            run = train(out / str(i), settings.tuning_steps, flags)
            bits = [x[HELD_OUT_METRIC] for x in run.metrics() if HELD_OUT_METRIC in x]
            rows.append(
                {
                    "tune": f"`{tuning}`",
                    "before_bits_per_byte": round(bits[0], 3),
                    "after_bits_per_byte": round(bits[-1], 3),
                }
            )
    print("| | before | after |\n| --- | --- | --- |")
    for row in rows:
        print("|", " | ".join(map(str, row.values())), "|")
    write_results(settings.json, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
