"""Calls WKV7 and its gradient once, on few tokens, for tools that check kernels while they run.

The command for a check of races is

    compute-sanitizer --target-processes application-only --tool racecheck \
        python benchmarks/wkv7_once.py --kind packed
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from wkv7 import HARD, hard_inputs, make_inputs

from pallas_kernels import MIN_LOG_DECAY, wkv7


@dataclasses.dataclass(frozen=True)
class Settings:
    """The call.

    Attributes:
      kind: "plain"; "packed", with two sequences in each row, which meet inside a chunk of 64; or
        "per_segment", packed and with a state for each sequence.
      inputs: "random", or "nearly parallel keys", which forget little: the forward takes float16.
      tokens: tokens in each of the two rows; racecheck takes long for more than 128.
      head_size: K and V.
      implementation: implementation of `wkv7`.
    """

    kind: Literal["plain", "packed", "per_segment"] = "plain"
    inputs: Literal["random", "nearly parallel keys"] = "random"
    tokens: int = 128
    head_size: int = 64
    implementation: str = "mosaic_gpu"


def main(settings: Settings) -> None:
    B, T, H, K = 2, settings.tokens, 2, settings.head_size
    make = make_inputs if settings.inputs == "random" else functools.partial(hard_inputs, HARD[0])
    inputs, do = make((B, T, H, K), "bfloat16")
    per_segment = settings.kind == "per_segment"
    states = jnp.ones((B, 2, H, K, K) if per_segment else (B, H, K, K))
    segment_ids = None
    if settings.kind != "plain":
        segment_ids = jnp.broadcast_to(1 + (np.arange(T) >= min(32, T // 2)), (B, T))
    function = functools.partial(
        wkv7,
        segment_ids=segment_ids,
        num_segments=2 if per_segment else None,
        min_log_decay=MIN_LOG_DECAY,
        implementation=settings.implementation,
    )

    @jax.jit
    def forward_and_backward(inputs, states):
        results, backward = jax.vjp(lambda x, s: function(*x, initial_state=s), inputs, states)
        return results, backward((do, jnp.ones_like(results[1])))

    results = jax.block_until_ready(forward_and_backward(inputs, states))
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(results)):
        raise FloatingPointError(f"results are not finite: {settings}")
    print(f"{settings}: results are finite")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
