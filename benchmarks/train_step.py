"""Measures time and memory of a whole training step of RWKV-7 on JAX's default device.

    python benchmarks/train_step.py                                       # a small model, for a CPU
    python benchmarks/train_step.py --num-layers 24 --hidden-size 1024 --vocab-size 65536 \
        --batch-size 8 --sequence-length 4096 --compute-dtype bfloat16 --profile

Tokens are random. A round is some asynchronous steps and then one wait; the time is the median of
the rounds, after a warm-up. Memory is what XLA plans, and the device's peak if the device counts
it. The time of the first step counts from the end of imports, with the creation of the parameters
and compilation.

`--profile` also prints the time of the GPU by operator and direction, and its floor. "again" is
what the backward computes again of the forward. Names are those of `jax.named_scope` in the
program; "other" is what lies outside of them, such as additions to the residual stream.
"""

import dataclasses
import math
import pathlib
import time

import jax
import numpy as np
import tyro
from flax import nnx
from results import Row, write_results
from step_profile import print_profile

from goose_jax import RWKV7, RWKV7Config
from goose_jax.data import next_token_batch
from goose_jax.nn import abstract_model
from goose_jax.training import OptimizerConfig, TrainState, init_train_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      num_layers: number of layers.
      hidden_size: channels of the residual stream.
      vocab_size: size of the vocabulary.
      batch_size: sequences per step.
      sequence_length: tokens per sequence.
      compute_dtype: dtype of activations.
      remat: `RWKV7Config.remat`, what the backward computes again.
      unroll_layers: `RWKV7Config.unroll_layers`, whether each layer is compiled by itself.
      implementation: `RWKV7Config.implementation`, of the operators.
      rounds: number of rounds whose median is reported.
      steps: steps per round.
      profile: whether to print the time by operator, on a GPU.
      json: file to write the rows to, in the format of `results.py`.
    """

    num_layers: int = 4
    hidden_size: int = 128
    vocab_size: int = 257
    batch_size: int = 8
    sequence_length: int = 256
    compute_dtype: str = "float32"
    remat: str = "dots"
    unroll_layers: bool = False
    implementation: str | None = None
    rounds: int = 3
    steps: int = 4
    profile: bool = False
    json: pathlib.Path | None = None


def main(settings: Settings) -> None:
    start_of_main = time.perf_counter()
    config = RWKV7Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        compute_dtype=settings.compute_dtype,
        remat=settings.remat,
        unroll_layers=settings.unroll_layers,
        implementation=settings.implementation,
    )
    recipe = OptimizerConfig(total_steps=1000)

    @jax.jit
    def init() -> TrainState:  # compiled, so that the parameters exist only once
        return init_train_state(RWKV7(config, rngs=nnx.Rngs(0)), recipe)

    state = init()
    count = sum(x.size for x in jax.tree.leaves(state.params))
    shape = (settings.batch_size, settings.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, settings.vocab_size, shape, np.int32)
    batch = next_token_batch(tokens)

    start = time.perf_counter()
    options = {}
    if settings.profile:  # graphs of CUDA hide which operation a kernel belongs to
        options = {"xla_gpu_enable_command_buffer": ""}
    train_step = make_train_step(abstract_model(config), recipe)
    step = train_step.lower(state, batch).compile(compiler_options=options)
    compile_seconds = time.perf_counter() - start
    seconds = []
    state, metrics = jax.block_until_ready(step(state, batch))
    first_step_seconds = time.perf_counter() - start_of_main
    for _ in range(settings.rounds + 1):
        start = time.perf_counter()
        for _ in range(settings.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / settings.steps)
    loss = float(metrics.loss)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    per_step = float(np.median(seconds[1:]))  # the first warms up

    analysis = step.memory_analysis()
    planned = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    measured = {} if peak is None else {"peak_gib": round(peak / 2**30, 2)}
    print(
        f"{settings.num_layers} x {settings.hidden_size} ({count / 1e6:.0f} million parameters), "
        f"batch {settings.batch_size} x {settings.sequence_length}, {settings.compute_dtype}, "
        f"remat {settings.remat}{', unrolled' * settings.unroll_layers}, "
        f"{jax.devices()[0].device_kind}:\n"
        f"{settings.batch_size * settings.sequence_length / per_step:.0f} tokens/s, "
        f"{1e3 * per_step:.1f} ms per step, "
        f"{planned / 2**30:.2f} GiB planned, {measured.get('peak_gib', 'not')} measured, "
        f"compiled in {compile_seconds:.0f} s, first step after {first_step_seconds:.0f} s, "
        f"loss {loss:.3f}"
    )
    row = {
        "layers": settings.num_layers,
        "width": settings.hidden_size,
        "vocab_size": settings.vocab_size,
        "parameters_millions": round(count / 1e6),
        "batch_size": settings.batch_size,
        "sequence_length": settings.sequence_length,
        "compute_dtype": settings.compute_dtype,
        "remat": settings.remat,
        "unroll_layers": settings.unroll_layers,
        "tokens_per_s": round(settings.batch_size * settings.sequence_length / per_step),
        "ms_per_step": round(1e3 * per_step, 2),
        "planned_gib": round(planned / 2**30, 2),
        **measured,
        "compile_s": round(compile_seconds, 1),
        "first_step_s": round(first_step_seconds, 1),
    }
    profile: list[Row] = []
    if settings.profile:
        profile = print_profile(
            step,
            lambda: jax.block_until_ready(step(state, batch)),
            config,
            tokens=settings.batch_size * settings.sequence_length,
            parameters=count,
        )
    write_results(settings.json, profile or [row])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
