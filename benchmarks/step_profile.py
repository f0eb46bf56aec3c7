"""Where the time of a training step goes, by operator and direction, beside the floors."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from device import copy_rate, product_rate
from results import Row

from goose_jax import RWKV7Config

_SCOPES = (
    *("norm_shift_mix", "layer_norm", "wkv7_inputs", "wkv7", "output_correction"),
    *("feed_forward", "cross_entropy_sum", "decay_logits", "alpha_logits"),
    *("value_residual_logits", "gate", "projection", "optimizer"),
)
"""Names of operators and of parts of modules; an operation belongs to the first one in its path."""

_DIRECTIONS = ("forward", "again", "backward", "neither")

type Part = tuple[str, str]
"""Operator and direction."""


def part_of(path: str) -> Part:
    """Returns operator and direction of an operation, by the path of scopes it was traced in."""
    direction = "forward" if "jvp(" in path else "neither"
    if "transpose(" in path:
        direction = "again" if "rematted_computation" in path else "backward"
    names = re.split(r"[/()]", path)
    scope = next((name for name in names if name in _SCOPES), None)
    if scope is None and "dynamic_update_slice" in path:
        scope = "stacks of what is kept"
    if scope is None and "dynamic_slice" in path:
        scope = "reading from stacks"
    return scope or "other", direction


def time_by_part(step: Any, run: Callable[[], Any]) -> dict[Part, float]:
    """Returns the milliseconds of the GPU by operator and direction.

    Args:
      step: the compiled program.
      run: runs it once and waits for it.
    """
    pattern = r'^ *(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"'
    paths = {
        name.replace(".", "_"): path
        for name, path in re.findall(pattern, step.as_text(), flags=re.MULTILINE)
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    times: dict[Part, float] = collections.defaultdict(float)
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", event.name)).replace(".", "_")
                times[part_of(paths.get(operation, ""))] += event.duration_ns / 1e6
    return times


def floors(
    config: RWKV7Config, tokens: int, parameters: int, bytes_per_s: float, flops_per_s: float
) -> dict[Part, float]:
    """Returns the least milliseconds of a step's parts.

    That is one pass over arguments and results at the rate of a copy, or the matrix products at the
    rate of a large one, or the sum of both where an operator has both. Nothing is computed again.

    Args:
      config: of the model.
      tokens: of all rows.
      parameters: number of parameters.
      bytes_per_s: rate of a copy, read and written.
      flops_per_s: rate of a large product.
    """
    C, L, F = config.hidden_size, config.num_layers, config.intermediate_size
    one_pass = 1e3 * 2 * tokens * C / bytes_per_s

    def product(inputs: int, outputs: int) -> float:
        return 1e3 * 2 * tokens * inputs * outputs / flops_per_s

    passes = {
        "norm_shift_mix": (7 + 2, 9 + 4),
        "wkv7_inputs": (11, 20),
        "wkv7": (7, 13),
        "output_correction": (6, 11),
        **dict.fromkeys(("decay_logits", "alpha_logits", "value_residual_logits", "gate"), (2, 3)),
    }
    products = {
        "projection": 4 * product(C, C),
        "feed_forward": 2 * product(C, F),
        "decay_logits": 2 * product(C, config.decay_rank),
        "alpha_logits": 2 * product(C, config.alpha_rank),
        "value_residual_logits": 2 * product(C, config.value_rank),
        "gate": 2 * product(C, config.gate_rank),
    }
    least: dict[Part, float] = {}
    for name in {**passes, **products}:
        layers = L - 1 if name == "value_residual_logits" else L  # the first layer has none
        forward, backward = passes.get(name, (0, 0))
        of_products = products.get(name, 0.0)
        least[name, "forward"] = layers * (forward * one_pass + of_products)
        least[name, "backward"] = layers * (backward * one_pass + 2 * of_products)
    # Of the loss, the forward also computes the gradients.
    least["cross_entropy_sum", "forward"] = 3 * product(C, config.vocab_size)
    # Parameters and two moments in float32, read and written, and gradients in bfloat16.
    least["optimizer", "neither"] = 1e3 * (6 * 4 + 2) * parameters / bytes_per_s
    return least


def print_profile(
    step: Any, run: Callable[[], Any], config: RWKV7Config, tokens: int, parameters: int
) -> list[Row]:
    """Prints a table of the time of a step by operator and direction, and returns its rows.

    Args:
      step: the compiled program.
      run: runs it once and waits for it.
      config: of the model.
      tokens: of all rows.
      parameters: number of parameters.
    """
    times = time_by_part(step, run)
    least = floors(config, tokens, parameters, copy_rate(), product_rate())
    rows = profile_rows(times, least)
    print("ms of the GPU by operator and direction, and the least that they could be:")
    print("| operator | forward | again | backward | neither | all | floor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        columns = (row.get(f"{name}_ms", 0.0) for name in (*_DIRECTIONS, "all", "floor"))
        print(f"| {row['operator']} | {' | '.join(f'{x:.2f}' for x in columns)} |")
    return rows


def profile_rows(times: dict[Part, float], least: dict[Part, float]) -> list[Row]:
    """Returns the rows of the table, the longest first, and their sum."""
    names = {name for name, _ in (*times, *least)}
    rows: list[dict[str, Any]] = []
    for name in names:
        row = {x: times[name, x] for x in _DIRECTIONS if (name, x) in times}
        row |= {
            "all": sum(row.values()),
            "floor": sum(least.get((name, x), 0.0) for x in _DIRECTIONS),
        }
        rows.append({"operator": name, **{f"{x}_ms": round(ms, 2) for x, ms in row.items()}})
    rows.sort(key=lambda row: -row["all_ms"])
    keys = {key for row in rows for key in row if key != "operator"}
    total = {key: round(sum(row.get(key, 0.0) for row in rows), 2) for key in keys}
    return [*rows, {"operator": "all", **total}]
