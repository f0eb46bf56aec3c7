"""Time, memory and error of the implementations of WKV7, on whatever device JAX finds.

    python benchmarks/wkv7.py                              # B, T, H, K = 1, 2048, 4, 64 in float32
    python benchmarks/wkv7.py --shape 8 4096 32 64 --dtype bfloat16

Times are medians over rounds of asynchronous calls between two waits, after a warm-up, the
implementations in turn within each round. Memory is what XLA plans besides inputs and results.
Errors are relative RMS against the scan in float64.
"""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pallas_kernels import wkv7, wkv7_recurrent

BOUND = -math.exp(-0.5)
IMPLEMENTATIONS = {
    "reference": functools.partial(wkv7, implementation="reference"),
    "recurrent": functools.partial(wkv7_recurrent, implementation="xla"),
    "xla": functools.partial(wkv7, implementation="xla"),
    "xla, bounded": functools.partial(wkv7, implementation="xla", min_log_decay=BOUND),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      shape: B, T, H, K; the values have K channels too.
      dtype: of the inputs.
      implementations: which to measure.
      rounds: of which the median is reported.
      calls: between two waits.
    """

    shape: tuple[int, int, int, int] = (1, 2048, 4, 64)
    dtype: str = "float32"
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    rounds: int = 7
    calls: int = 3


def make_inputs(settings: Settings) -> tuple[list[np.ndarray], np.ndarray]:
    """Random inputs as RWKV-7 makes them, and a random gradient of the outputs."""
    shape, rng = settings.shape, np.random.default_rng(0)
    r, k, v, kk, rate, decay, do = rng.normal(size=(7, *shape)).astype(np.float32)
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    alpha = 1 / (1 + np.exp(-rate))
    inputs = [r, BOUND / (1 + np.exp(-decay)), 0.3 * k, v, -kk, kk * alpha]
    return [np.asarray(jnp.asarray(x, settings.dtype)) for x in inputs], do.astype(settings.dtype)


def forward(function, inputs, do):
    return function(*inputs)[0]


def forward_and_backward(function, inputs, do):
    o, backward = jax.vjp(lambda inputs: function(*inputs)[0], inputs)
    return o, backward(do)


def seconds(compiled, arguments, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        results = compiled(*arguments)
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls


def relative_rms(x, reference) -> float:
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def main(settings: Settings) -> None:
    inputs, do = make_inputs(settings)
    with jax.enable_x64():
        exact = jax.jit(functools.partial(forward_and_backward, IMPLEMENTATIONS["recurrent"]))(
            *jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, do))
        )
        exact = jax.device_get(jax.tree.leaves(exact))
    arguments = jax.device_put((inputs, do))
    programs = {}
    for name in settings.implementations:
        for what in (forward, forward_and_backward):
            start = time.perf_counter()
            function = jax.jit(functools.partial(what, IMPLEMENTATIONS[name]))
            programs[name, what] = function.lower(*arguments).compile()
            programs[name, what].compile_seconds = time.perf_counter() - start
    times: dict = {key: [] for key in programs}
    for round_number in range(settings.rounds + 1):
        for key, program in programs.items():
            elapsed = seconds(program, arguments, settings.calls)
            if round_number:  # the first warms up
                times[key].append(elapsed)

    B, T, H, K = settings.shape
    print(f"B, T, H, K = {B}, {T}, {H}, {K}, {settings.dtype}, {jax.devices()[0].device_kind}")
    print(
        "| implementation | forward ms | forward + backward ms | MiB | compile s | o | gradients |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in settings.implementations:
        both = programs[name, forward_and_backward]
        results = jax.device_get(jax.tree.leaves(both(*arguments)))
        errors = [relative_rms(*pair) for pair in zip(results, exact, strict=True)]
        milliseconds = [1e3 * np.median(times[name, f]) for f in (forward, forward_and_backward)]
        print(
            f"| {name} | {milliseconds[0]:.2f} | {milliseconds[1]:.2f} "
            f"| {both.memory_analysis().temp_size_in_bytes / 2**20:.0f} "
            f"| {both.compile_seconds:.1f} | {errors[0]:.1e} | {max(errors[1:]):.1e} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
