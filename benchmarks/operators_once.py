"""Calls the operators around WKV7 once each, with gradients, for tools that check kernels.

The command for a check of races is

    XLA_FLAGS=--xla_gpu_autotune_level=0 compute-sanitizer --target-processes application-only \
        --tool racecheck --kernel-name kernel_substring=mosaic python benchmarks/operators_once.py

It looks at this package's kernels alone: with those of cuBLAS it hardly ends. The channel mix gets
more tokens than the others: its products leave small matrices to XLA. The cross entropy is called a
second time, for the kernel that multiplies 256 tokens at a time.
"""

import dataclasses

import jax
import numpy as np
import tyro
from operators import make_operators, programs_of


@dataclasses.dataclass(frozen=True)
class Settings:
    """The calls.

    Attributes:
      shape: B, T, C.
      shape_of_channel_mix: the same for the channel mix.
      shape_of_cross_entropy: the same for the second call of the cross entropy.
      vocab: number of tokens of the vocabulary.
      operators: names of operators; None takes all.
      implementation: implementation of the operators.
    """

    shape: tuple[int, int, int] = (2, 130, 64)
    shape_of_channel_mix: tuple[int, int, int] = (2, 8448, 64)
    shape_of_cross_entropy: tuple[int, int, int] = (2, 128, 64)
    vocab: int = 1024
    operators: tuple[str, ...] | None = None
    implementation: str = "mosaic_gpu"


def main(settings: Settings) -> None:
    operators = make_operators(settings.shape, settings.vocab)
    operators["channel mix"] = make_operators(settings.shape_of_channel_mix)["channel mix"]
    in_tiles = make_operators(settings.shape_of_cross_entropy, settings.vocab)
    for name in ("cross entropy", "cross entropy of tokens"):
        operators[f"{name}, in tiles"] = in_tiles[name]
    for name in settings.operators or operators:
        runs = programs_of(operators[name], settings.implementation, "bfloat16")
        results = jax.block_until_ready([program(*arguments) for program, arguments in runs])
        if not all(np.isfinite(x.astype("float32")).all() for x in jax.tree.leaves(results)):
            raise FloatingPointError(f"results of {name} are not finite")
        print(f"{name}: results are finite", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
