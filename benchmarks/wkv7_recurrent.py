"""Measures the time of the recurrent implementations of WKV7 on a few tokens, as in decoding.

    python benchmarks/wkv7_recurrent.py

One program makes many calls, each with the final state of the call before it. The time is that of
one call, the median of some rounds. The column "of a copy" takes the bytes of the states, read
and written once, and divides them by the bytes that a copy of an array moves in this time. The
backward of each call gets random gradients.
"""

import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from device import copy_rate
from results import Row, write_results
from wkv7 import IMPLEMENTATIONS, make_inputs


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      batch_sizes: values of B.
      tokens: values of T, the tokens of a call.
      heads: H, heads of 64 channels each; None takes 32 on a GPU and 2 elsewhere.
      dtype: dtype of the inputs; states are float32.
      implementations: names from `wkv7.IMPLEMENTATIONS`; None takes those that suit the device.
      calls: calls in one program.
      rounds: number of rounds whose median is reported.
      json: file to write the rows to, in the format of `results.py`.
    """

    batch_sizes: tuple[int, ...] = (1, 128)
    tokens: tuple[int, ...] = (1, 16)
    heads: int | None = None
    dtype: str = "bfloat16"
    implementations: tuple[str, ...] | None = None
    calls: int = 100
    rounds: int = 5
    json: pathlib.Path | None = None


def forward(function, inputs, _, state, calls):
    def call(state, _):
        o, state = function(*inputs, initial_state=state)
        return state, jnp.sum(o.astype(jnp.float32))

    return jax.lax.scan(call, state, length=calls)


def forward_and_backward(function, inputs, do, state, calls):
    def call(state, _):
        def outputs(inputs, state):
            return function(*inputs, initial_state=state)

        (_, new), backward = jax.vjp(outputs, inputs, state)
        gradients = backward((do, new))
        return new, sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(gradients))

    return jax.lax.scan(call, state, length=calls)


def milliseconds(what, implementation: str, arguments: tuple, settings: Settings) -> float:
    """Returns the time of one call of `what`, `forward` or `forward_and_backward`."""
    program = jax.jit(
        functools.partial(what, IMPLEMENTATIONS[implementation], calls=settings.calls)
    )
    jax.block_until_ready(program(*arguments))
    rounds = []
    for _ in range(settings.rounds):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        rounds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(rounds)) / settings.calls


def main(settings: Settings) -> None:
    on_gpu = jax.default_backend() == "gpu"
    names = settings.implementations or (
        ("recurrent", "recurrent, mosaic_gpu") if on_gpu else ("recurrent",)
    )
    H = settings.heads or (32 if on_gpu else 2)
    rate = copy_rate(1.0 if on_gpu else 0.1)
    print(f"{settings.dtype}, {jax.devices()[0].device_kind}; a copy moves {rate / 1e9:,.0f} GB/s")
    print("| B, T, H, K | implementation | forward ms | of a copy | forward + backward ms |")
    print("| --- | --- | --- | --- | --- |")
    rows: list[Row] = []
    for T in settings.tokens:
        for B in settings.batch_sizes:
            inputs, do = make_inputs((B, T, H, 64), settings.dtype)
            state = jax.random.normal(jax.random.key(1), (B, H, 64, 64), jnp.float32)
            for name in names:
                forward_ms, both_ms = (
                    milliseconds(what, name, (inputs, do, state), settings)
                    for what in (forward, forward_and_backward)
                )
                print(
                    f"| {B}, {T}, {H}, 64 | {name} | {forward_ms:.4f} "
                    f"| {2e3 * state.nbytes / forward_ms / rate:.0%} | {both_ms:.4f} |",
                    flush=True,
                )
                rows.append(
                    {
                        "B": B,
                        "T": T,
                        "H": H,
                        "K": 64,
                        "implementation": name,
                        "forward_ms": round(forward_ms, 5),
                        "forward_backward_ms": round(both_ms, 5),
                    }
                )
    write_results(settings.json, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
