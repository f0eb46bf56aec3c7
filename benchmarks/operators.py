"""Measures the operators around WKV7 on JAX's default device: time, share of the floor, error.

    python benchmarks/operators.py                                  # B 8, T 4096, C 2048 on a GPU
    python benchmarks/operators.py --shape 2 256 128 --operators "key update"

A row is one direction of one operator through one implementation. The floor is the time in which a
copy would move the operator's inputs and results once, plus its matrix products at the rate of a
large one. The backward is a program of its own that starts from the inputs. That of the channel mix
holds a product of the forward then, so it is also timed from what the forward keeps, as it is in a
training step. Times are medians of rounds, in which the implementations take turns; errors are
relative RMS errors of the worst result against the definition in float64, at a small size. All
programs are compiled before the first one is timed.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from device import copy_rate, product_rate
from results import Row, write_results

import pallas_kernels

HEAD = 64
VOCAB = 65536
BASES = (
    *("decay_base", "alpha_base", "value_residual_base"),
    *("removal_scale", "replacement_mix"),
)


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator and its arguments.

    Attributes:
      function: from the arguments and `implementation=` to the results.
      tokens: shapes of the arguments in the dtype of tokens.
      parameters: shapes of the float32 arguments.
      flops: of the matrix products of the forward.
      backward_share: how many times as many the backward has.
      made: number of results that the forward makes; the others are some of these, or arguments.
        None if it makes all.
      keeps: whether the forward keeps values that the backward would have to compute again.
    """

    function: Callable[..., Any]
    tokens: tuple[tuple[int, ...], ...]
    parameters: tuple[tuple[int, ...], ...]
    flops: int = 0
    backward_share: int = 2
    made: int | None = None
    keeps: bool = False


def make_operators(shape: tuple[int, int, int], vocab: int = VOCAB) -> dict[str, Operator]:
    """Returns the operators by name, for B, T and C, and a vocabulary of so many tokens."""
    B, T, C = shape
    x, heads, of_heads = (B, T, C), (B, T, C // HEAD, HEAD), (C // HEAD, HEAD)

    def norm_shift_mix(mixes: int) -> Operator:
        parameters = ((C,), (C,), (mixes, C))
        return Operator(pallas_kernels.norm_shift_mix, (x,), parameters, made=mixes + 1)

    def channel_mix(x, key, value, mix, **kwargs):
        return pallas_kernels.channel_mix(x, mix, key, value, **kwargs)

    targets = np.arange(B * T, dtype=np.int32).reshape(B, T) % vocab

    def cross_entropy(hidden, weight, **kwargs):
        return pallas_kernels.cross_entropy(hidden, weight, targets, **kwargs)

    def cross_entropy_sum(hidden, weight, token_weights, **kwargs):
        return pallas_kernels.cross_entropy_sum(hidden, weight, targets, token_weights, **kwargs)

    return {
        "token shift, 6 mixes": Operator(pallas_kernels.token_shift_mix, (x,), ((6, C),)),
        "token shift, 1 mix": Operator(pallas_kernels.token_shift_mix, (x,), ((1, C),)),
        "layer norm": Operator(pallas_kernels.layer_norm, (x,), ((C,), (C,))),
        "pre-norm": Operator(pallas_kernels.pre_norm, (x,), ((C,), (C,)), made=1),
        "layer norm + token shift, 6 mixes": norm_shift_mix(6),
        "layer norm + token shift, 1 mix": norm_shift_mix(1),
        "key update": Operator(pallas_kernels.key_update, (heads,) * 2, (of_heads,) * 2),
        "output correction": Operator(
            pallas_kernels.output_correction, (heads,) * 5, (of_heads,) * 3
        ),
        "channel mix": Operator(
            channel_mix,
            (x, (C, 4 * C), (4 * C, C)),
            ((C,),),
            flops=16 * B * T * C * C,
            keeps=True,
        ),
        "inputs of wkv7": Operator(
            lambda *x, **kwargs: pallas_kernels.wkv7_inputs(
                *x[:6], **dict(zip(BASES, x[6:], strict=True)), **kwargs
            ),
            (heads,) * 6,
            (of_heads,) * len(BASES),
            made=5,
        ),
        # Their backwards have the product of the forward, too, and the second one has it twice.
        "cross entropy": Operator(
            cross_entropy_sum, (x, (C, vocab)), ((B, T),), 2 * B * T * C * vocab, backward_share=3
        ),
        "cross entropy of tokens": Operator(
            cross_entropy, (x, (C, vocab)), (), 2 * B * T * C * vocab, backward_share=4
        ),
    }


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      shape: B, T, C; None takes 8, 4096, 2048 on a GPU and 2, 256, 128 elsewhere.
      operators: names of operators; None takes all.
      implementations: names of implementations; None takes those that suit the device.
      rounds: number of rounds whose median is reported.
      calls: calls before a wait.
      json: file to write the rows to, in the format of `results.py`.
    """

    shape: tuple[int, int, int] | None = None
    operators: tuple[str, ...] | None = None
    implementations: tuple[str, ...] | None = None
    rounds: int = 5
    calls: int = 20
    json: pathlib.Path | None = None


def make_arguments(operator: Operator, dtype: str) -> list[jax.Array]:
    """Returns random arguments, tokens in `dtype`."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    tokens = [jax.random.normal(next(keys), shape) for shape in operator.tokens]
    if operator.flops:  # matrices, so that results are as large as arguments
        tokens[1:] = [x / np.sqrt(len(x)) for x in tokens[1:]]
    parameters = [jax.random.uniform(next(keys), shape) for shape in operator.parameters]
    return [x.astype(dtype) for x in tokens] + parameters


def programs_of(
    operator: Operator, implementation: str, dtype: str
) -> list[tuple[Callable[..., Any], list[Any]]]:
    """Returns forward and backward, each with its arguments."""
    arguments = make_arguments(operator, dtype)
    function = functools.partial(operator.function, implementation=implementation)
    results = jax.eval_shape(function, *arguments)
    leaves, structure = jax.tree.flatten(results)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    gradients = [
        jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, leaves, strict=True)
    ]

    def backward(gradients, *arguments):
        return jax.vjp(function, *arguments)[1](jax.tree.unflatten(structure, gradients))

    def forward(*arguments):
        return jax.tree.leaves(function(*arguments))[: operator.made]

    return [(jax.jit(forward), arguments), (jax.jit(backward), [gradients, *arguments])]


DIRECTIONS = ("forward", "backward", "backward, from what the forward keeps")


def timed_programs(
    operator: Operator, implementation: str, dtype: str
) -> list[tuple[Callable[..., Any], list[Any]]]:
    """Returns a program for each of `DIRECTIONS`, compiled, and its arguments."""
    runs = programs_of(operator, implementation, dtype)
    if operator.keeps:
        _, (gradients, *arguments) = runs[1]
        function = functools.partial(operator.function, implementation=implementation)
        kept = jax.jit(lambda *arguments: jax.vjp(function, *arguments)[1])(*arguments)
        structure = jax.tree.structure(jax.eval_shape(function, *arguments))

        def backward_of_kept(gradients, kept):
            return kept(jax.tree.unflatten(structure, gradients))

        runs.append((jax.jit(backward_of_kept), [gradients, kept]))
    jax.block_until_ready([program(*arguments) for program, arguments in runs])
    return runs


def floor(operator: Operator, program: Callable[..., Any], arguments: list[Any]) -> float:
    """Returns the milliseconds of traffic at a copy's rate, plus those of the products."""
    results = jax.eval_shape(program, *arguments)
    leaves = jax.tree.leaves((arguments, results))
    moved = sum(x.size * x.dtype.itemsize for x in leaves)
    is_backward = isinstance(arguments[0], list)
    flops = operator.flops * (operator.backward_share if is_backward else 1)
    return 1e3 * (moved / copy_rate() + flops / product_rate())


def error(operator: Operator, implementation: str, dtype: str) -> float:
    """Returns the relative RMS error of the worst result and gradient."""
    runs = programs_of(operator, implementation, dtype)
    found = jax.device_get([program(*arguments) for program, arguments in runs])
    with jax.enable_x64():
        exact = jax.device_get(
            [
                program(*jax.tree.map(lambda x: x.astype(jnp.float64), arguments))
                for (program, _), (_, arguments) in zip(
                    programs_of(operator, "reference", dtype), runs, strict=True
                )
            ]
        )
    errors = []
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        difference = np.asarray(x, np.float64) - y
        errors.append(np.linalg.norm(difference) / np.linalg.norm(y))
    return max(errors)


def milliseconds(program: Callable[..., Any], arguments: list[Any], calls: int) -> float:
    """Returns the time of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        results = program(*arguments)
    jax.block_until_ready(results)
    return 1e3 * (time.perf_counter() - start) / calls


def main(settings: Settings) -> None:
    on_gpu = jax.default_backend() == "gpu"
    shape = settings.shape or ((8, 4096, 2048) if on_gpu else (2, 256, 128))
    implementations = settings.implementations or (("mosaic_gpu", "xla") if on_gpu else ("xla",))
    dtype = "bfloat16" if on_gpu else "float32"
    operators = make_operators(shape)
    small = make_operators((2, 300, min(shape[2], 512)))
    in_tiles = make_operators((2, 384, min(shape[2], 512)))  # for kernels that take 256 tokens
    small |= {name: in_tiles[name] for name in ("cross entropy", "cross entropy of tokens")}
    print(f"B, T, C = {shape}, {dtype}, {jax.devices()[0].device_kind}")
    print("| operator | direction | implementation | ms | floor ms | share of the floor | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows: list[Row] = []
    names = settings.operators or tuple(operators)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # results of 8 calls fit into memory
        pending = {
            (name, x): (
                pool.submit(timed_programs, operators[name], x, dtype),
                pool.submit(error, small[name], x, dtype),
            )
            for name in names
            for x in implementations
        }
        compiled = {key: [part.result() for part in parts] for key, parts in pending.items()}
    for name in names:
        runs, errors = ({x: compiled[name, x][i] for x in implementations} for i in range(2))
        times: dict[Any, list[float]] = {}
        for _ in range(settings.rounds + 1):
            for implementation, directions in runs.items():
                for i, (program, arguments) in enumerate(directions):
                    spent = milliseconds(program, arguments, settings.calls)
                    times.setdefault((i, implementation), []).append(spent)
        for (i, implementation), all_times in sorted(times.items()):
            median = float(np.median(all_times[1:]))  # the first round warms up
            least = floor(operators[name], *runs[implementation][i])
            print(
                f"| {name} | {DIRECTIONS[i]} | {implementation} | {median:.3f} "
                f"| {least:.3f} | {least / median:.0%} | {errors[implementation]:.1e} |",
                flush=True,
            )
            rows.append(
                {
                    "operator": name,
                    "direction": DIRECTIONS[i],
                    "implementation": implementation,
                    "ms": round(median, 4),
                    "floor_ms": round(least, 4),
                    "error": float(f"{errors[implementation]:.2e}"),
                }
            )
    write_results(settings.json, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
