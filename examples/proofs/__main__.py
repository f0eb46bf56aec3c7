"""Runs proofs, and writes for each a JSON file with its numbers and a plot."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from typing import Annotated, Any, Literal

import jax
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure

from examples.proofs import associative_recall, digit_reversal, passkey, state_tracking

PROOFS = {
    "digit-reversal": digit_reversal,
    "state-tracking": state_tracking,
    "associative-recall": associative_recall,
    "passkey": passkey,
}
type Name = Literal["digit-reversal", "state-tracking", "associative-recall", "passkey"]


def main(
    names: Annotated[tuple[Name, ...], tyro.conf.Positional] = tuple(PROOFS),
    *,
    short: bool = False,
    out: pathlib.Path = pathlib.Path("runs/proofs"),
) -> None:
    """Runs proofs: trains small models on tasks, measures them, and draws plots.

    Args:
      names: which proofs to run; all by default.
      short: run the shortened forms, which take minutes on a CPU.
      out: folder for `NAME.json` and `NAME.svg`, or `NAME-short.json` and `NAME-short.svg`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        proof = PROOFS[name]
        settings = proof.SHORT if short else proof.FULL
        print(f"{name}:", flush=True)
        start = time.perf_counter()
        results = proof.run(settings)
        record = {
            "proof": name,
            "short": short,
            "seconds": time.perf_counter() - start,
            **environment(),
            "command": f"python -m examples.proofs {name}" + " --short" * short,
            "settings": dataclasses.asdict(settings),
            "results": results,
        }
        stem = f"{name}-short" if short else name
        (out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(proof, record, out / f"{stem}.svg")
        numbers = {
            key: value
            for key, value in results.items()
            if key != "loss_curve" and not isinstance(value, list)
        }
        print(json.dumps(numbers, indent=1), flush=True)


def draw(proof: Any, record: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the plot of a proof, with the name of the hardware below."""
    with rc_context({"svg.fonttype": "none"}):  # text stays text: a small file
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        proof.draw(figure, record["results"])
        figure.supxlabel(record["hardware"], fontsize="small", color="0.4")
        figure.savefig(path)


def environment() -> dict[str, Any]:
    """Returns what the numbers depend on: date, hardware, versions, commit."""
    device = jax.devices()[0]
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    packages = ("goose-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": cores if device.platform == "cpu" else f"{device.device_kind}, {cores}",
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "commit": _commit(),
    }


def _commit() -> str:
    """Returns the commit of this file; outside of a clone the variable MEASURED_COMMIT names it."""
    command = ["git", "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"]
    folder = pathlib.Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        return os.environ.get("MEASURED_COMMIT", "not recorded")
    return result.stdout.strip()


if __name__ == "__main__":
    tyro.cli(main)
