"""Measures how times grow: compilation with depth, WKV7's gradient with the number of tokens.

    python benchmarks/scaling.py

Prints each ratio with the limit that it should keep to, and ends with status 1 if one does not.
Each time is the least of some rounds. On a CPU, times are CPU seconds of this process.
"""

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from wkv7 import IMPLEMENTATIONS, make_inputs

from goose_jax import RWKV7, RWKV7Config
from pallas_kernels import cross_entropy

ROUNDS = 5


def seconds_of(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Returns the least time that a call takes until its results are there."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = []
    for _ in range(rounds):
        start = clock()
        jax.block_until_ready(function())
        seconds.append(clock() - start)
    return min(seconds)


def compile_gradient(num_layers: int) -> None:
    """Traces and compiles the gradient of a model's loss."""
    config = RWKV7Config(vocab_size=50, hidden_size=64, num_layers=num_layers)
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))

    def loss(model, tokens):
        hidden, _ = model.hidden(tokens[:, :-1])
        head = model.head[...].astype(hidden.dtype)
        return cross_entropy(hidden, head, tokens[:, 1:]).mean()

    tokens = jax.ShapeDtypeStruct((1, 33), jnp.int32)
    jax.jit(jax.value_and_grad(loss)).lower(model, tokens).compile()


def gradient_seconds(implementation: str, shape: tuple[int, int, int, int], dtype: str) -> float:
    """Returns the time of a compiled gradient of WKV7 with respect to all inputs."""
    inputs, _ = make_inputs(shape, dtype)
    function = IMPLEMENTATIONS[implementation]
    gradient = jax.jit(jax.grad(lambda x: function(*x)[0].astype(jnp.float32).sum()))
    jax.block_until_ready(gradient(inputs))
    calls = 1 if jax.default_backend() == "cpu" else 20
    return seconds_of(lambda: [gradient(inputs) for _ in range(calls)])


def main() -> None:
    """Prints a table of ratios."""
    shallow, deep = (
        seconds_of(functools.partial(compile_gradient, layers), rounds=3) for layers in (6, 24)
    )
    ratios = [("compile 24 layers / 6 layers", deep / shallow, 1.5)]  # measured: 1.0
    if jax.default_backend() == "cpu":
        scan, unbounded, short, long = (
            gradient_seconds(implementation, (1, T, 4, 64), "float32")
            for implementation, T in (
                ("reference", 2048),
                ("xla", 2048),
                ("xla, bounded", 2048),
                ("xla, bounded", 16384),
            )
        )
        # Measured on two idle cores: 0.37 of the scan's time, and 8 to 11 times as long for 8 times
        # the tokens.
        ratios += [
            ("xla / scan", unbounded / scan, 0.67),
            ("xla, bounded / scan", short / scan, 0.67),
            ("xla, bounded: 16384 / 2048 tokens", long / short, 13),
        ]
    else:
        long, short = (
            gradient_seconds("mosaic_gpu", (1, T, 8, 64), "bfloat16") for T in (16384, 4096)
        )
        ratios.append(("mosaic_gpu: 16384 / 4096 tokens", long / short, 4.4))
    print("| ratio of times | measured | limit |\n|---|---|---|")
    for name, ratio, limit in ratios:
        print(f"| {name} | {ratio:.2f} | {limit} |")
    if any(ratio > limit for _, ratio, limit in ratios):
        sys.exit(1)


if __name__ == "__main__":
    main()
