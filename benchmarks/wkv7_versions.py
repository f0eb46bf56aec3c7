"""Compares the speed of WKV7's kernels in several versions of this package, in one run.

    PYTHONPATH=../before python benchmarks/wkv7_versions.py programs --export before
    python benchmarks/wkv7_versions.py programs --export after     # both on any machine
    python benchmarks/wkv7_versions.py programs --baseline before  # on the GPU

`../before` is another checkout. What is exported are programs of JAX, with the kernels in them:
the forward, and the forward with the backward, for each shape. That needs the package flatbuffers.
The JAX that exports must not be newer than the one that times.

All programs are compiled first. A round times each version's program once, for a while. The order
changes from round to round, and before the first round each program runs for as long: a GPU that
has rested is faster. The ratio to the baseline is the median of those of the rounds.
"""

import concurrent.futures
import functools
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import tyro
from results import Row, write_results
from wkv7 import SHAPES_ON_GPU, Program, Shape, forward, forward_and_backward, make_inputs

from pallas_kernels import MIN_LOG_DECAY, wkv7

WHAT = {"forward": forward, "forward and backward": forward_and_backward}


@dataclass(frozen=True)
class Settings:
    """What to do.

    Attributes:
      folder: folder of the exported programs.
      export: name of the version of this package, to export its programs; None times the programs
        that are in the folder.
      baseline: version that the others are compared with; None takes the first by name.
      shape: B, T, H, K; None takes the four shapes of `wkv7.py` on a GPU.
      platform: what programs are exported for.
      implementation: implementation of WKV7.
      rounds: number of rounds.
      seconds: time that a program runs in a round.
      json: file to write the rows to, in the format of `results.py`.
    """

    folder: tyro.conf.Positional[pathlib.Path]
    export: str | None = None
    baseline: str | None = None
    shape: Shape | None = None
    platform: str = "cuda"
    implementation: str = "mosaic_gpu"
    rounds: int = 9
    seconds: float = 0.3
    json: pathlib.Path | None = None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes to export or to time."""
        return SHAPES_ON_GPU if self.shape is None else (self.shape,)


def file_of(settings: Settings, version: str, shape: Shape, what: str) -> pathlib.Path:
    """Returns where a program lies."""
    name = "-".join((what.replace(" ", "_"), *map(str, shape)))
    return settings.folder / version / f"{name}.jax"


def export_programs(settings: Settings, version: str) -> None:
    """Writes the programs of the version that Python imports."""
    operator = functools.partial(
        wkv7, implementation=settings.implementation, min_log_decay=MIN_LOG_DECAY
    )
    kernel = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    for shape in settings.shapes:
        array = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for what, function in WHAT.items():
            program = jax.export.export(
                jax.jit(functools.partial(function, operator)),
                platforms=[settings.platform],
                disabled_checks=[kernel],
            )([array] * 6, array)
            file = file_of(settings, version, shape, what)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(program.serialize())
            print(file, flush=True)


def load_program(file: pathlib.Path, arguments: tuple[Any, ...]) -> Program:
    """Compiles an exported program for these arguments."""
    return Program(jax.export.deserialize(bytearray(file.read_bytes())).call, arguments)


def milliseconds(program: Program, seconds: float) -> float:
    """Calls a program for about so long, and returns the mean time of a call."""
    program.seconds(1)
    return 1e3 * program.seconds(max(10, round(seconds / program.seconds(10))))


def compile_all(settings: Settings, versions: list[str]) -> dict[tuple[Shape, str], list[Program]]:
    """Returns the programs of all versions, for each shape and for what they compute."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pending = {}
        for shape in settings.shapes:
            arguments = make_inputs(shape, "bfloat16")
            for what in WHAT:
                files = [file_of(settings, version, shape, what) for version in versions]
                pending[shape, what] = [
                    pool.submit(load_program, file, arguments) for file in files
                ]
        return {case: [program.result() for program in pending[case]] for case in pending}


def compare(settings: Settings, programs: list[Program]) -> tuple[np.ndarray, np.ndarray]:
    """Times programs in turn.

    Returns:
      `[programs]`, median milliseconds of a call; and `[3, programs]`, the quartiles of the ratio
      to the first program.
    """
    times = np.zeros((settings.rounds, len(programs)))
    for program in programs:
        milliseconds(program, settings.seconds)
    for i in range(settings.rounds):
        for j in np.roll(np.arange(len(programs)), i):
            times[i, j] = milliseconds(programs[j], settings.seconds)
    return np.median(times, axis=0), np.quantile(times / times[:, :1], (0.25, 0.5, 0.75), axis=0)


def main(settings: Settings) -> None:
    if settings.export is not None:
        export_programs(settings, settings.export)
        return
    versions = sorted(path.name for path in settings.folder.iterdir() if path.is_dir())
    first = versions[0] if settings.baseline is None else settings.baseline
    if first not in versions:
        raise ValueError(f"baseline={first!r} is none of the versions {versions}")
    versions.sort(key=lambda version: version != first)
    print(f"{jax.devices()[0].device_kind}, {settings.rounds} rounds")
    print("| B, T, H, K | what | version | ms | ratio | quartiles |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: list[Row] = []
    for (shape, what), programs in compile_all(settings, versions).items():
        times, quartiles = compare(settings, programs)
        for version, ms, (low, ratio, high) in zip(versions, times, quartiles.T, strict=True):
            print(
                f"| {', '.join(map(str, shape))} | {what} | {version} | {ms:.4f} | {ratio:.4f} "
                f"| {low:.4f} to {high:.4f} |",
                flush=True,
            )
            measured = {"ms": ms, "ratio": ratio, "ratio_low": low, "ratio_high": high}
            rows.append(
                dict(zip("BTHK", shape, strict=True))
                | {"what": what, "version": version}
                | {name: round(float(number), 4) for name, number in measured.items()}
            )
    write_results(settings.json, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
