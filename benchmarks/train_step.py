"""Measures time and memory of a whole training step of RWKV-7 on JAX's default device.

    python benchmarks/train_step.py                                       # a small model, for a CPU
    python benchmarks/train_step.py --num-layers 24 --hidden-size 1024 --vocab-size 65536 \
        --batch-size 8 --sequence-length 4096 --compute-dtype bfloat16

Tokens are random. A round is some asynchronous steps and then one wait; the time is the median of
the rounds, after a warm-up. Memory is the device's peak, or what XLA plans if the device does not
count it.
"""

import dataclasses
import math
import time

import jax
import numpy as np
import tyro
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.data import next_token_batch
from goose_jax.training import OptimizerConfig, init_train_state, make_train_step


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
      implementation: `RWKV7Config.implementation`, of the WKV operator.
      rounds: number of rounds whose median is reported.
      steps: steps per round.
    """

    num_layers: int = 4
    hidden_size: int = 128
    vocab_size: int = 257
    batch_size: int = 8
    sequence_length: int = 256
    compute_dtype: str = "float32"
    remat: str = "none"
    implementation: str | None = None
    rounds: int = 3
    steps: int = 4


def main(settings: Settings) -> None:
    config = RWKV7Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        compute_dtype=settings.compute_dtype,
        remat=settings.remat,
        implementation=settings.implementation,
    )
    model = RWKV7(config, rngs=nnx.Rngs(0))
    recipe = OptimizerConfig(total_steps=1000)
    state = init_train_state(model, recipe)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    shape = (settings.batch_size, settings.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, settings.vocab_size, shape, np.int32)
    batch = next_token_batch(tokens)

    start = time.perf_counter()
    step = make_train_step(model, recipe).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
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

    statistics = jax.devices()[0].memory_stats() or {}
    planned = step.memory_analysis()
    peak = statistics.get("peak_bytes_in_use") or (
        planned.argument_size_in_bytes + planned.temp_size_in_bytes
    )
    print(
        f"{settings.num_layers} x {settings.hidden_size} ({count / 1e6:.0f} million parameters), "
        f"batch {settings.batch_size} x {settings.sequence_length}, {settings.compute_dtype}, "
        f"remat {settings.remat}, {jax.devices()[0].device_kind}:\n"
        f"{settings.batch_size * settings.sequence_length / per_step:.0f} tokens/s, "
        f"{1e3 * per_step:.1f} ms per step, {peak / 2**30:.2f} GiB, "
        f"compiled in {compile_seconds:.0f} s, loss {loss:.3f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
