"""Measures the numbers in the tables of docs/rwkv7.md."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from tests.docs import document, scenarios
from tests.docs.scenarios import HELPERS, MIN_LOG_DECAY, Arrays, K, L, V, random, scenario

type Rows = list[list[float]]


def run(names: Arrays, *blocks: str) -> Arrays:
    names = {"np": np, **names}
    for block in blocks:
        exec(document.blocks()[block], names)
    return names


def error(value: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(value - exact) / np.linalg.norm(exact))


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(jnp.dtype(dtype)).astype(np.float64)


def growing_pair() -> Rows:
    names = scenario("growing pair").run()
    return [[names["radius_alone"]], [names["radius_in_turn"]]]


def decay_bound() -> Rows:
    names = run({}, "decay_bound")
    return [[names[n]] for n in ("min_log_decay", "min_decay", "tokens_to_one_percent")]


def logarithm_of_largest(dtype: str) -> float:
    return float(np.log(np.float64(jnp.finfo(dtype).max)))


def exponents() -> Rows:
    names = run({"L": 64}, "decay_bound", "largest_exponent")
    assert abs(logarithm_of_largest("bfloat16") - logarithm_of_largest("float32")) < 0.01
    limits = [[logarithm_of_largest(dtype)] for dtype in ("float16", "float32")]
    return [[names["largest_factor"]], [names["largest_product"]], *limits]


def longest_chunk() -> Rows:
    def longest(lowest: float, dtype: str) -> int:
        fitting = 0
        for length in 2 ** np.arange(12):
            names = run({"L": length, "min_log_decay": lowest}, "largest_exponent")
            fits = names["largest_factor"] < logarithm_of_largest(dtype)
            if fits and names["largest_product"] < logarithm_of_largest("float32"):
                fitting = length
        return fitting

    lowest = (MIN_LOG_DECAY, -1, -5, -20)
    return [[x, longest(x, "bfloat16"), longest(x, "float16")] for x in lowest]


def rounded_exponent() -> Rows:
    g = np.cumsum(np.full(64, MIN_LOG_DECAY))
    return [[np.abs(np.expm1(rounded(g, d) - g)).max()] for d in ("bfloat16", "float32")]


def inverse() -> Rows:
    ways = run({}, "pairs_of_blocks", "doubling", "substitution", "blockwise")
    rng, rows = random(40), []
    kk = rng.normal(size=K)
    kk /= np.linalg.norm(kk)
    for length in (8, 16, 32, 64):
        log_decay = rng.uniform(-0.002, 0, size=(length, K))
        a, b = np.tile(-kk, (length, 1)), kk * rng.uniform(0.99, 1, size=(length, K))
        names = {"log_decay": log_decay, "a": a, "b": b, "r": a, "k": b}
        A = run(names, "sums", "cumulated", "factors", "scaled", "weights")["A_ab"]
        A = A.astype(np.float32)
        exact = np.linalg.inv(np.eye(length) - A.astype(np.float64))
        powers = [np.linalg.matrix_power(A.astype(np.float64), p) for p in range(1, length)]
        largest = max(np.abs(power).max() for power in powers)
        errors = [error(ways[way](A), exact) for way in ("doubling", "substitution", "blockwise")]
        rows.append([length, np.abs(exact).max(), largest, *errors])
    return rows


def tree_levels() -> Rows:
    levels = np.full((8, 8), np.nan)
    for even, odd in run({}, "pairs_of_blocks")["pairs_of_blocks"](8):
        assert np.isnan(levels[odd, even]).all()  # each entry once
        levels[odd, even] = odd.stop - odd.start
    return [[row, *levels[row]] for row in range(8)]


def decay_gradient() -> Rows:
    rows = []
    for log_decay in (-0.001, -0.6, -5, -10, -20):
        given = {**scenarios.sequential(41)[0]}
        given["log_decay"] = np.full((L, K), float(log_decay))
        names = run(given, *HELPERS, "forward", "backward", "cumulated", "tree_weights", "borders")
        names = run(names, "entry_and_exit", "solve", "gradient_of_values", "gradient_of_weights")
        exact = names["dlog_decay"]
        single = {
            name: x.astype(np.float32) if isinstance(x, np.ndarray) else x
            for name, x in names.items()
        }
        ways = ("cumulative", "direct", "tree_gradient")
        errors = [error(run(single, way)["dlog_decay"], exact) for way in ways]
        rows.append([log_decay, np.sqrt((exact**2).mean()), *errors])
    return rows


def state_dtype() -> Rows:
    length = 2048
    rng = random(42)
    k, kk = rng.normal(size=(2, length, K))
    kk /= np.linalg.norm(kk, axis=1, keepdims=True)
    a, b = -kk, kk * rng.uniform(0, 0.01, size=(length, K))
    decay = np.exp(rng.uniform(-0.002, 0, size=(length, K)))
    v = rng.normal(size=(length, V))

    def final_state(dtype: str, every: int) -> np.ndarray:
        S = np.zeros((K, V))
        for t in range(length):
            S = decay[t][:, None] * S + np.outer(b[t], a[t] @ S) + np.outer(k[t], v[t])
            if t % every == every - 1:
                S = rounded(S, dtype)
        return S

    exact = final_state("float64", 1)
    dtypes = ("bfloat16", "float32")
    return [[error(final_state(d, every), exact) for every in (1, 64)] for d in dtypes]


def costs() -> Rows:
    sizes = {"L": 64, "K": 64, "V": 64, "size": 2, "state_size": 4}
    names = run(sizes, "operations", "traffic")
    half = run({**sizes, "state_size": 2}, "traffic")
    product = 2 * 64**3
    values = [(names[n] - names["inverse"]) / product for n in ("forward_chunk", "backward_chunk")]
    operations = ("forward_chunk", "backward_chunk", "forward_recurrent")
    values += [names[n] / 64 for n in operations]
    values += [names["forward_bytes"], names["backward_bytes"]]
    return [[x] for x in (*values, names["state_bytes"], half["state_bytes"])]


EXACT: dict[str, Callable[[], Rows]] = {
    "growing_pair": growing_pair,
    "decay_bound": decay_bound,
    "exponents": exponents,
    "longest_chunk": longest_chunk,
    "rounded_exponent": rounded_exponent,
    "tree_levels": tree_levels,
    "costs": costs,
}
"""Functions that measure numbers which are the same on every machine, to the digits printed."""

ROUNDING: dict[str, Callable[[], Rows]] = {
    "inverse": inverse,
    "decay_gradient": decay_gradient,
    "state_dtype": state_dtype,
}
"""Functions that measure rounding errors, which differ a little from machine to machine."""
