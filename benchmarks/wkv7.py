"""Measures time, memory and error of the implementations of WKV7 on JAX's default device.

    python benchmarks/wkv7.py                   # four shapes in bfloat16 on a GPU, one on a CPU
    python benchmarks/wkv7.py --shape 1 16384 4 64 --dtype float32 --implementations xla

Times are medians of rounds, after a warm-up. In each round the implementations take turns; each
makes some asynchronous calls and then waits once. The backward gets random gradients of the
outputs. On a GPU the file also has floors, see `floors`. All programs are compiled first and at the
same time, so that each takes longer than it would alone. Memory is what XLA plans besides inputs
and results. Errors are relative RMS errors against the scan in float64, for the first shape,
reduced to a size that the scan can manage. A second table has the errors on tokens whose results
are small differences of large numbers.

Operators of others are measured on the same inputs if `--implementations` names them: "FLA",
"jax-linear-attention", and "RWKV-LM" and "wind_rwkv", whose checkouts are in the folder `--sources`
and are compiled first. FLA tries variants of its kernels for minutes before its first result.

    python benchmarks/wkv7.py --implementations mosaic_gpu FLA RWKV-LM wind_rwkv --sources peers
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from device import copy_rate
from results import Row, revisions, write_results

from pallas_kernels import MIN_LOG_DECAY, wkv7, wkv7_recurrent


def _jax_linear_attention(r, log_decay, k, v, a, b):
    from jla.ops.mosaic_gpu.rwkv7 import rwkv7

    return rwkv7(r, k, v, log_decay, a, b, lower_bound=MIN_LOG_DECAY)


IMPLEMENTATIONS = {
    "mosaic_gpu": functools.partial(wkv7, implementation="mosaic_gpu", min_log_decay=MIN_LOG_DECAY),
    "reference": functools.partial(wkv7, implementation="reference"),
    "recurrent": functools.partial(wkv7_recurrent, implementation="xla"),
    "recurrent, mosaic_gpu": functools.partial(wkv7_recurrent, implementation="mosaic_gpu"),
    "xla": functools.partial(wkv7, implementation="xla"),
    "xla, bounded": functools.partial(wkv7, implementation="xla", min_log_decay=MIN_LOG_DECAY),
    "high precision": functools.partial(wkv7, precision="high", min_log_decay=MIN_LOG_DECAY),
    "jax-linear-attention": _jax_linear_attention,
}
IN_TORCH = ("FLA", "RWKV-LM", "wind_rwkv")
WITHOUT_ERRORS = ("RWKV-LM", "wind_rwkv")  # their inputs are rounded in another form
ON_CPU = ("reference", "recurrent", "xla", "xla, bounded")
ON_GPU = ("mosaic_gpu", "xla, bounded")
SHAPES_ON_CPU = ((1, 2048, 4, 64),)
SHAPES_ON_GPU = ((8, 4096, 64, 64), (8, 4096, 32, 64), (1, 32768, 32, 64), (16, 512, 12, 64))
HARD_SHAPE = (1, 2500, 4)

type Shape = tuple[int, int, int, int]
type Arguments = tuple[list[jax.Array], jax.Array]
"""Inputs of WKV7, and gradients of the outputs."""
type Programs = dict[str, tuple[Any, Any]]
"""By implementation: forward, and forward with backward."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      shape: B, T, H, K; values have K channels, too. None takes four shapes on a GPU, one on a CPU.
      lengths: values of T to take in place of that of each shape.
      dtype: dtype of the inputs; None takes bfloat16 on a GPU and float32 on a CPU.
      implementations: names from `IMPLEMENTATIONS` and `IN_TORCH`; None takes those of ours that
        suit the device.
      sources: folder with checkouts of RWKV-LM and wind_rwkv, where they are named.
      times: whether to measure times, memory and errors on random tokens, in a first table.
      hard: whether to measure errors on hard tokens, in a second table; None does so for 16 bits.
      rounds: number of rounds whose median is reported.
      calls: calls before a wait; None takes 3 on a CPU, 20 on a GPU, and 200 on a GPU if a call
        takes less than 1 ms.
      json: file to write the rows to, in the format of `results.py`.
    """

    shape: Shape | None = None
    lengths: tuple[int, ...] = ()
    dtype: str | None = None
    implementations: tuple[str, ...] | None = None
    sources: pathlib.Path | None = None
    times: bool = True
    hard: bool | None = None
    rounds: int = 5
    calls: int | None = None
    json: pathlib.Path | None = None


def make_inputs(shape: Shape, dtype: str) -> Arguments:
    """Returns random inputs as RWKV-7 makes them, and a random gradient of the outputs."""
    keys = jax.random.split(jax.random.key(0), 7)
    r, k, v, kk, rate, decay, do = (jax.random.normal(key, shape) for key in keys)
    kk /= jnp.linalg.norm(kk, axis=-1, keepdims=True)
    inputs = [r, MIN_LOG_DECAY * jax.nn.sigmoid(decay), 0.3 * k, v, -kk, kk * jax.nn.sigmoid(rate)]
    return [x.astype(dtype) for x in inputs], do.astype(dtype)


def hard_inputs(kind: str, shape: Shape, dtype: str) -> Arguments:
    """Returns inputs whose state forgets nearly nothing, and a random gradient of the outputs.

    Args:
      kind: "nearly parallel keys" (one direction and 5 % of noise), "three tokens in turn" or "one
        token repeated".
      shape: B, T, H, K.
      dtype: of the inputs.
    """
    (r, log_decay, k, v, *_), do = make_inputs(shape, "float32")
    kk = jax.random.normal(jax.random.key(1), shape)
    if kind == "nearly parallel keys":
        kk = kk[:, :1] + 0.05 * jax.random.normal(jax.random.key(2), shape)
        k, alpha, decay = 0.3 * kk, 0.8, -1e-3
    else:
        period, alpha, decay = (3, 0.99, -1e-4) if "turn" in kind else (1, 1.0, -1e-5)
        r, k, v, kk = (x[:, jnp.arange(shape[1]) % period] for x in (r, k, v, kk))
    kk /= jnp.linalg.norm(kk, axis=-1, keepdims=True)
    inputs = [r, jnp.full_like(log_decay, decay), k, v, -kk, alpha * kk]
    return [x.astype(dtype) for x in inputs], do.astype(dtype)


HARD = ("nearly parallel keys", "three tokens in turn", "one token repeated")


def forward(function, inputs, do):
    """Returns the output. `do` is unused, so that both programs take the same arguments."""
    return function(*inputs)[0]


def forward_and_backward(function, inputs, do):
    o, backward = jax.vjp(lambda inputs: function(*inputs)[0], inputs)
    return o, *backward(do)[0]


class Program:
    """A compiled call on inputs that are in the device's memory."""

    def __init__(self, function, arguments: tuple):
        start = time.perf_counter()
        self._compiled = jax.jit(function).lower(*arguments).compile()
        self._arguments = arguments
        self.compile_seconds = time.perf_counter() - start

    def results(self, *arguments) -> list[np.ndarray]:
        """Returns the results for other arguments of the same shapes."""
        return [np.asarray(x) for x in jax.tree.leaves(self._compiled(*arguments))]

    def seconds(self, calls: int) -> float:
        """Returns the mean time of a call."""
        start = time.perf_counter()
        for _ in range(calls):
            results = self._compiled(*self._arguments)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls

    def memory(self) -> int:
        """Returns the bytes that XLA plans besides inputs and results."""
        return self._compiled.memory_analysis().temp_size_in_bytes


def make_programs(
    names: tuple[str, ...], cases: Sequence[Arguments], sources: pathlib.Path | None
) -> list[Programs]:
    """Returns programs for each case. Those of JAX are compiled at the same time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pending = [
            {
                name: [
                    pool.submit(Program, functools.partial(what, IMPLEMENTATIONS[name]), arguments)
                    for what in (forward, forward_and_backward)
                ]
                for name in names
                if name not in IN_TORCH
            }
            for arguments in cases
        ]
    made: list[Programs] = [
        {name: (first.result(), second.result()) for name, (first, second) in programs.items()}
        for programs in pending
    ]
    for name in (name for name in names if name in IN_TORCH):
        from peers_wkv7 import make_torch_programs

        for programs, (inputs, do) in zip(made, cases, strict=True):
            programs[name] = make_torch_programs(name, inputs, do, MIN_LOG_DECAY, sources)
    return made


def median_times(programs: dict, settings: Settings) -> dict[str, tuple[float, float]]:
    """Returns the milliseconds of the two programs of each implementation."""
    calls = {name: [_calls(program, settings) for program in programs[name]] for name in programs}

    def once(name: str) -> list[float]:
        return [p.seconds(n) for p, n in zip(programs[name], calls[name], strict=True)]

    rounds = [[once(name) for name in programs] for _ in range(settings.rounds)]
    return dict(zip(programs, 1e3 * np.median(rounds, axis=0), strict=True))


def _calls(program, settings: Settings) -> int:
    program.seconds(1)  # warms up
    if settings.calls is not None:
        return settings.calls
    if jax.default_backend() == "cpu":
        return 3
    return 200 if program.seconds(5) < 1e-3 else 20


def floors(shape: Shape, itemsize: int, bytes_per_s: float) -> Row:
    """Returns the milliseconds to move what WKV7 must move, at the rate of a copy.

    These are inputs and results, and with the backward also the states between chunks of 64 tokens,
    written and read.
    """
    B, T, H, K = shape
    token = B * T * H * K * itemsize
    states = B * (T // 64) * H * K * K * itemsize
    forward, both = 7 * token, 20 * token + 2 * states
    return {
        "floor_forward_ms": round(1e3 * forward / bytes_per_s, 3),
        "floor_forward_backward_ms": round(1e3 * both / bytes_per_s, 3),
    }


def relative_rms(x, reference) -> float:
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def measure_errors(
    names: tuple[str, ...], cases: Sequence[Arguments]
) -> list[dict[str, list[float]]]:
    """Returns for each case the errors of the output and of the gradients of the inputs.

    Args:
      names: of implementations; those `WITHOUT_ERRORS` are left out.
      cases: arguments, all of one shape, so that one program serves them all.
    """
    names = tuple(name for name in names if name not in WITHOUT_ERRORS)
    exact = jax.jit(functools.partial(forward_and_backward, IMPLEMENTATIONS["recurrent"]))
    with jax.enable_x64():
        in_float64 = [jax.tree.map(lambda x: x.astype(jnp.float64), case) for case in cases]
        references = [jax.device_get(exact(*case)) for case in in_float64]
    errors: list[dict[str, list[float]]] = [{} for _ in cases]
    for name, results in _results_of_cases(names, cases).items():
        for of_case, result, reference in zip(errors, results, references, strict=True):
            pairs = zip(result, reference, strict=True)
            of_case[name] = [relative_rms(*pair) for pair in pairs]
    return errors


def _results_of_cases(
    names: tuple[str, ...], cases: Sequence[Arguments]
) -> dict[str, list[list[np.ndarray]]]:
    """Returns by implementation, for each case, the output and the gradients of the inputs."""
    ours = [name for name in names if name not in IN_TORCH]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        functions = [functools.partial(forward_and_backward, IMPLEMENTATIONS[x]) for x in ours]
        programs = pool.map(lambda function: Program(function, cases[0]), functions)
        results = {
            name: [program.results(*case) for case in cases]
            for name, program in zip(ours, programs, strict=True)
        }
    for name in (name for name in names if name in IN_TORCH):
        from peers_wkv7 import make_torch_programs

        results[name] = [
            make_torch_programs(name, *case, MIN_LOG_DECAY, None)[1].results() for case in cases
        ]
    return results


def main(settings: Settings) -> None:
    on_gpu = jax.default_backend() == "gpu"
    names = settings.implementations
    if names is None:
        names = ON_GPU if on_gpu else ON_CPU
    dtype = settings.dtype or ("bfloat16" if on_gpu else "float32")
    shapes = (
        (SHAPES_ON_GPU if on_gpu else SHAPES_ON_CPU)
        if settings.shape is None
        else (settings.shape,)
    )
    if settings.lengths:
        shapes = tuple((B, T, H, K) for B, _, H, K in shapes for T in settings.lengths)
    rows = print_times(names, shapes, dtype, settings) if settings.times else []
    if settings.hard or (settings.hard is None and dtype in ("bfloat16", "float16")):
        rows += print_hard_errors(names, (*HARD_SHAPE, shapes[0][-1]), dtype)
    write_results(settings.json, rows, revisions(settings.sources, names))


def print_times(
    names: tuple[str, ...], shapes: Sequence[Shape], dtype: str, settings: Settings
) -> list[Row]:
    """Prints a table of times, memory and errors on random tokens, and returns its rows."""
    # First, so that FLA tunes its kernels for the shapes that are timed.
    made = make_programs(names, [make_inputs(shape, dtype) for shape in shapes], settings.sources)
    B, T, H, K = shapes[0]
    small = (min(B, 2), min(T, 2048), min(H, 4), K)
    (errors,) = measure_errors(names, [make_inputs(small, dtype)])

    print(f"{dtype}, {jax.devices()[0].device_kind}; errors at B, T, H, K = {small}")
    print(
        "| B, T, H, K | implementation | forward ms | forward + backward ms | MiB | compile s "
        "| o | gradients |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows: list[Row] = []
    on_gpu = jax.default_backend() == "gpu"
    for shape, programs in zip(shapes, made, strict=True):
        for name, (forward_ms, both_ms) in median_times(programs, settings).items():
            both = programs[name][1]
            found = errors.get(name)
            columns = (f"{found[0]:.1e}", f"{max(found[1:]):.1e}") if found else ("", "")
            print(
                f"| {', '.join(map(str, shape))} | {name} | {forward_ms:.3f} | {both_ms:.3f} "
                f"| {both.memory() / 2**20:.0f} | {both.compile_seconds:.1f} "
                f"| {' | '.join(columns)} |",
                flush=True,
            )
            row = dict(zip("BTHK", shape, strict=True)) | {
                "implementation": name,
                "dtype": dtype,
                "forward_ms": round(float(forward_ms), 4),
                "forward_backward_ms": round(float(both_ms), 4),
                "temp_mib": round(both.memory() / 2**20, 1),
                "compile_s": round(both.compile_seconds, 1),
            }
            if on_gpu:
                row |= floors(shape, jnp.dtype(dtype).itemsize, copy_rate())
            if found:
                row |= {
                    "error_o": float(f"{found[0]:.2e}"),
                    "error_gradients": float(f"{max(found[1:]):.2e}"),
                }
            rows.append(row)
    return rows


def print_hard_errors(names: tuple[str, ...], shape: Shape, dtype: str) -> list[Row]:
    """Prints a table of errors on hard tokens, also of high precision, and returns its rows."""
    rows: list[Row] = []
    print(f"\n{dtype}, errors at B, T, H, K = {shape}")
    print("| tokens | implementation | o | dr | dlog_decay | dk | dv | da | db |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    names = tuple(dict.fromkeys((*names, "high precision")))
    all_errors = measure_errors(names, [hard_inputs(kind, shape, dtype) for kind in HARD])
    for kind, of_kind in zip(HARD, all_errors, strict=True):
        for name, errors in of_kind.items():
            row = " | ".join(f"{x:.1e}" for x in errors)
            print(f"| {kind} | {name} | {row} |", flush=True)
            results = zip(("o", "dr", "dlog_decay", "dk", "dv", "da", "db"), errors, strict=True)
            named = {
                f"error_{result}": "NaN" if np.isnan(x) else float(f"{x:.2e}")
                for result, x in results
            }
            rows.append({"tokens": kind, "implementation": name, "dtype": dtype, **named})
    return rows


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
