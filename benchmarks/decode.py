"""Measures the speed of decoding and of reading prompts on JAX's default device.

    python benchmarks/decode.py                 # three real sizes on a GPU, a tiny one on a CPU
    python benchmarks/decode.py --model 24 1024 --implementations mosaic_gpu

Weights are random; on a GPU they are bfloat16 with a vocabulary of 65,536. Decoding is greedy. The
benchmark calls `generate` and `prefill` as a user does.

The time of a token is the difference between generating many and few tokens, which leaves out the
time to read the prompt. Each time is the median of some rounds, after one round that compiles. A
row far into a text is measured in turn with a row at its beginning. The time of the first token
includes compilation; for the first model, nothing has been compiled before.

The column "of the rate of a copy" takes the bytes that a token must move: all parameters but the
embedding, read once, and the states, read and written once. It divides them by the bytes that a
copy of an array reads and writes in the time of a token.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from device import copy_rate
from flax import nnx
from results import Row, write_results

from goose_jax import (
    RWKV7,
    RWKV7Config,
    RWKV7State,
    SamplingConfig,
    generate,
    init_state,
    prepare_decoding,
)
from goose_jax.generation import prefill

GREEDY = SamplingConfig(temperature=0)
MODELS_ON_GPU = ((24, 1024), (24, 2048), (32, 4096))
MODELS_ON_CPU = ((4, 128),)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      model: number of layers and hidden size; None takes three sizes on a GPU, a tiny one on a CPU.
      vocab_size: size of the vocabulary; None takes 65,536 on a GPU and 257 on a CPU.
      dtype: dtype of parameters and activations; None takes bfloat16 on a GPU and float32 on a CPU.
      batch_sizes: numbers of rows to decode at the same time.
      implementations: how tokens are read; None takes "xla" and "mosaic_gpu" on a GPU and "xla"
        on a CPU.
      prompt_length: tokens of the prompt whose reading is measured.
      position: number of tokens after which decoding one row is measured again; None takes 100,000
        on a GPU and 1,000 on a CPU.
      new_tokens: the two numbers of tokens to generate, few and many.
      block_size: tokens per block of `generate`.
      rounds: number of rounds whose median is reported.
      json: file to write the rows to, in the format of `results.py`.
    """

    model: tuple[int, int] | None = None
    vocab_size: int | None = None
    dtype: str | None = None
    batch_sizes: tuple[int, ...] = (1, 128)
    implementations: tuple[str, ...] | None = None
    prompt_length: int = 2048
    position: int | None = None
    new_tokens: tuple[int, int] = (64, 256)
    block_size: int = 32
    rounds: int = 3
    json: pathlib.Path | None = None


def random_model(config: RWKV7Config) -> RWKV7:
    """Returns a model of normal random numbers, which takes less time than its initialisers."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(params)

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        scale = like.shape[-2] ** -0.5 if like.ndim > 1 else 1.0
        return (scale * jax.random.normal(key, like.shape, jnp.bfloat16)).astype(like.dtype)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [
        normal(key, jax.ShapeDtypeStruct(x.shape, x.dtype))
        for key, x in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


def seconds_of(run: Callable[[], object]) -> float:
    """Returns the time of one call, until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def bytes_per_token(model: RWKV7, batch_size: int) -> int:
    """Returns the bytes that one token of each row must move."""
    params = nnx.state(model)
    read = sum(x.nbytes for x in jax.tree.leaves(params)) - model.embedding[...].nbytes
    state = jax.eval_shape(lambda: init_state(model.config, batch_size))
    return read + 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def measure(settings: Settings, model: RWKV7, rate_of_copy: float) -> list[Row]:
    """Prints the lines of a model, and returns its rows."""
    on_cpu = jax.default_backend() == "cpu"
    name = f"{model.config.num_layers} x {model.config.hidden_size}"
    tokens = np.random.default_rng(0)
    prompt = tokens.integers(1, model.config.vocab_size, settings.prompt_length)
    first = seconds_of(
        lambda: (
            generate(
                model,
                [prompt],
                max_new_tokens=1,
                sampling=GREEDY,
                block_size=settings.block_size,
            ).state
        )
    )
    print(
        f"| {name} | first token | 1, after {len(prompt):,} tokens | | | | {first:.1f} |",
        flush=True,
    )

    prepared = prepare_decoding(model)

    def read() -> object:
        return prefill(prepared, [prompt])

    jax.block_until_ready(read())
    reading = float(np.median([seconds_of(read) for _ in range(settings.rounds)]))
    rate = len(prompt) / reading
    print(
        f"| {name} | prefill | {len(prompt)} | {1e3 * reading:.2f} | {rate:,.0f} | | |", flush=True
    )
    sizes = {
        "layers": model.config.num_layers,
        "width": model.config.hidden_size,
        "gpu": jax.devices()[0].device_kind,
    }
    rows: list[Row] = [
        {**sizes, "measure": "first token", "tokens": len(prompt), "s": round(first, 2)},
        {
            **sizes,
            "measure": "prefill",
            "tokens": len(prompt),
            "ms": round(1e3 * reading, 3),
            "tokens_per_s": round(rate),
        },
    ]
    position = settings.position or (1_000 if on_cpu else 100_000)
    late = prefill(prepared, [tokens.integers(1, model.config.vocab_size, position)])

    for implementation in settings.implementations or ("xla", "mosaic_gpu")[: 1 if on_cpu else 2]:
        for size in settings.batch_sizes:
            states = {f"{size}": None}
            if size == 1:
                states[f"1, after {position:,} tokens"] = late
            times, first = seconds_per_token(settings, model, size, implementation, states)
            for row, seconds in times.items():
                bandwidth = bytes_per_token(model, size) / seconds
                print(
                    f"| {name} | {implementation} | {row} | {1e3 * seconds:.3f} | "
                    f"{size / seconds:,.0f} | {bandwidth / rate_of_copy:.0%} | {first:.1f} |",
                    flush=True,
                )
                rows.append(
                    {
                        **sizes,
                        "measure": "decode" if row == f"{size}" else "decode, late",
                        "implementation": implementation,
                        "batch": size,
                        "ms": round(1e3 * seconds, 4),
                        "tokens_per_s": round(size / seconds),
                        "share_of_copy": round(bandwidth / rate_of_copy, 3),
                        "copy_tb_per_s": round(rate_of_copy / 1e12, 2),
                        "first_call_s": round(first, 1),
                    }
                )
    return rows


def seconds_per_token(
    settings: Settings,
    model: RWKV7,
    batch_size: int,
    implementation: str,
    states: dict[str, RWKV7State | None],
) -> tuple[dict[str, float], float]:
    """Returns the seconds per token after each of the states, and the seconds of the first call.

    The states are measured in turn, so that other changes of speed affect all of them alike.
    """

    def seconds(state: RWKV7State | None, count: int) -> float:
        return seconds_of(
            lambda: (
                generate(
                    model,
                    [[1, 2, 3]] * batch_size,
                    max_new_tokens=count,
                    sampling=GREEDY,
                    state=state,
                    block_size=settings.block_size,
                    implementation=implementation,
                ).state
            )
        )

    few, many = settings.new_tokens
    first, *_ = [seconds(state, few) for state in states.values()]
    rounds = [
        [[seconds(state, count) for count in (few, many)] for state in states.values()]
        for _ in range(settings.rounds)
    ]
    short, long = np.median(rounds, axis=0).T
    return dict(zip(states, ((long - short) / (many - few)).tolist(), strict=True)), first


def main(settings: Settings) -> None:
    on_cpu = jax.default_backend() == "cpu"
    dtype = settings.dtype or ("float32" if on_cpu else "bfloat16")
    models = MODELS_ON_CPU if on_cpu else MODELS_ON_GPU
    rate = copy_rate(0.1 if on_cpu else 1.0)
    print(f"{jax.devices()[0].device_kind}, {dtype}; a copy moves {rate / 1e9:,.0f} GB/s")
    print("| model | | batch | ms per token | tokens/s | of the rate of a copy | first call, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows: list[Row] = []
    for num_layers, hidden_size in models if settings.model is None else (settings.model,):
        config = RWKV7Config(
            vocab_size=settings.vocab_size or (257 if on_cpu else 65536),
            hidden_size=hidden_size,
            num_layers=num_layers,
            param_dtype=dtype,
            compute_dtype=dtype,
        )
        rows += measure(settings, random_model(config), rate)
    write_results(settings.json, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
