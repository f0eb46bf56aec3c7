"""The tables of measurements on the pages, made from the files in `benchmarks/results`.

A page has a table between the lines `<!-- results: NAME -->` and `<!-- /results -->`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from results import Row, read_results

type Derive = Callable[[list[Row]], Iterable[Row]]

_PLACE = re.compile(r"\{(\w+)(?::([^}]*))?\}")


def cell(template: str, row: Row) -> str:
    """Returns a template with the values of a row.

    A place is `{name:format}`. A value that is a list is a range. Where a row has none of the
    names, the cell is empty; where it lacks some, they are dashes.
    """
    names = [name for name, _ in _PLACE.findall(template)]
    if names and all(row.get(name) is None for name in names):
        return ""

    def text(match: re.Match[str]) -> str:
        value, form = row.get(match[1]), match[2] or ""
        if value is None:
            return "\N{EN DASH}"
        values = value if isinstance(value, list) else [value]
        texts = [x if isinstance(x, str) else format(x, form) for x in values]
        return re.sub(r"e-0(?=\d)", "e-", " to ".join(texts))

    return _PLACE.sub(text, template)


def markdown(columns: dict[str, str], rows: Iterable[Row]) -> str:
    """Returns a table.

    Args:
      columns: from headings to templates of cells.
      rows: one for each line.
    """
    lines = [columns.keys(), ["---"] * len(columns)]
    lines += [[cell(template, row) for template in columns.values()] for row in rows]
    return "\n".join(re.sub(" {2,}", " ", f"| {' | '.join(line)} |") for line in lines)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of some files.

    Attributes:
      files: their names; rows follow in this order.
      columns: from headings to templates of cells.
      derive: what makes rows of the table from those of the files.
    """

    files: tuple[str, ...]
    columns: dict[str, str]
    derive: Derive = list

    def markdown(self) -> str:
        """Returns the table."""
        rows = [row for name in self.files for row in read_results(name).rows]
        return markdown(self.columns, self.derive(rows))


def has(**wanted: Any) -> Derive:
    """Returns a function that takes the rows with some values; a value `...` stands for any."""

    def matches(row: Row) -> bool:
        return all(
            (row.get(name) is not None) if value is ... else row.get(name) == value
            for name, value in wanted.items()
        )

    return lambda rows: [row for row in rows if matches(row)]


def pivot(index: tuple[str, ...], over: tuple[str, ...], values: tuple[str, ...]) -> Derive:
    """Returns a function that joins rows with equal `index`.

    A value of the joined row is called `<value of over>_<name>`, with `_` for what is no letter.
    """

    def join(rows: list[Row]) -> Iterable[Row]:
        joined: dict[tuple, dict[str, Any]] = {}
        for row in rows:
            key = tuple(row.get(name) for name in index)
            line = joined.setdefault(key, dict(zip(index, key, strict=True)))
            prefix = "_".join(str(row[name]) for name in over)
            for name in values:
                if name in row:
                    line[re.sub(r"\W+", "_", f"{prefix}_{name}")] = row[name]
        return joined.values()

    return join


def then(*steps: Derive) -> Derive:
    """Returns the functions one after the other."""
    return lambda rows: functools.reduce(lambda rows, step: list(step(rows)), steps, rows)


SHAPE = "{B}, {T}, {H}, {K}"
MODEL = "{layers} x {width}"
TIMES = {"forward ms": "{forward_ms:.2f}", "forward + backward ms": "{forward_backward_ms:.2f}"}
ERRORS = {"o": "{error_o:.1e}", "gradients": "{error_gradients:.1e}"}


def beside_floor_and_others(rows: list[Row]) -> Iterable[Row]:
    """Yields the kernel's rows with the floor and the best of others of the same shape."""
    shape = ("B", "T", "H", "K")
    ours = has(implementation="mosaic_gpu", B=...)(rows)
    for row in ours:
        alike = [x for x in rows if all(x.get(name) == row[name] for name in shape)]
        joined = dict(row)
        for kind, prefix in (("floor", "floor"), ("peer", "best")):
            for name in ("forward_ms", "forward_backward_ms"):
                values = [x[name] for x in alike if x.get("kind") == kind and name in x]
                if values:
                    joined[f"{prefix}_{name}"] = min(values)
        yield joined


def named_layers(rows: list[Row]) -> Iterable[Row]:
    """Yields rows of training steps with words for `unroll_layers`."""
    for row in rows:
        yield {**row, "compiled": "unrolled" if row["unroll_layers"] else "in a loop"}


def decode_by_model(rows: list[Row]) -> Iterable[Row]:
    """Yields a row for each model: the kernels at 1 and 128 rows, and reading a prompt."""
    for layers, width in dict.fromkeys((row["layers"], row["width"]) for row in rows):
        line: dict[str, Any] = {"layers": layers, "width": width}
        for row in has(layers=layers, width=width)(rows):
            if row["measure"] == "prefill":
                line["prefill_tokens_per_s"] = row["tokens_per_s"]
            elif row["measure"] == "decode" and row["implementation"] == "mosaic_gpu":
                line |= {f"{name}_{row['batch']}": row.get(name) for name in ("ms", "tokens_per_s")}
        yield line


def with_kinds_of_collectives(rows: list[Row]) -> Iterable[Row]:
    """Yields rows of the plan with words for the gigabytes that each kind of collective sends."""
    for row in rows:
        sent = [f"{kind} {gigabytes:.2f}" for kind, gigabytes in row["sent_gb"].items()]
        yield {**row, "sent": ", ".join(sent) or "none"}


def with_percent(rows: list[Row]) -> Iterable[Row]:
    """Yields rows of decoding, sorted by model, with the share of a copy's rate in percent."""
    for row in sorted(rows, key=lambda row: row["width"]):
        share = row["share_of_copy"]
        values = share if isinstance(share, list) else [share]
        percent = [round(100 * x) for x in values]
        yield {**row, "percent": percent}


HARD_TOKENS = {
    "nearly parallel keys": ": kk one direction and 5 % of noise, k = 0.3 kk, alpha 0.8, log decay "
    "-1e-3",
    "three tokens in turn": ", alpha 0.99, log decay -1e-4",
    "one token repeated": ", alpha 1, log decay -1e-5",
}


def with_worst_gradient(rows: list[Row]) -> Iterable[Row]:
    """Yields rows of errors on hard tokens, with the worst gradient and the tokens described."""
    for row in rows:
        errors = {k.removeprefix("error_"): x for k, x in row.items() if k.startswith("error_")}
        del errors["o"]
        worst = max(errors, key=lambda name: float(errors[name]))
        name = f" ({worst})" if worst != "gradients" else ""
        described = row["tokens"] + HARD_TOKENS[row["tokens"]]
        yield {**row, "worst": cell("{x:.1e}", {"x": errors[worst]}) + name, "described": described}


def ratios_to_scan(rows: list[Row]) -> Iterable[Row]:
    """Yields the ratios of times of the recurrent kernel to those of the scan through XLA."""
    yield from has(forward_ratio=...)(rows)
    scans = has(implementation="recurrent", forward_ms=...)(rows)
    kernels = has(implementation="recurrent, mosaic_gpu", forward_ms=...)(rows)
    for scan, kernel in zip(scans, kernels, strict=True):
        yield {
            **{name: scan[name] for name in ("B", "T")},
            "forward_ratio": kernel["forward_ms"] / scan["forward_ms"],
            "forward_backward_ratio": kernel["forward_backward_ms"] / scan["forward_backward_ms"],
        }


OPERATOR_TIMES = pivot(("operator",), ("direction", "implementation"), ("ms", "floor_ms"))
PEER_STEPS = pivot(("layers", "width"), ("peer",), ("tokens_per_s", "peak_gib"))

TABLES = {
    "wkv7-cpu": Table(
        ("wkv7-cpu",),
        {
            "B, T, H, K": SHAPE,
            "implementation": "{implementation}",
            **TIMES,
            "MiB": "{temp_mib:.0f}",
            **ERRORS,
        },
    ),
    "wkv7-xla-h200": Table(
        ("wkv7-xla-h200",),
        {
            "B, T, H, K": SHAPE,
            "implementation": "{implementation}",
            **TIMES,
            "MiB": "{temp_mib:.0f}",
            "compile s": "{compile_s:.1f}",
            **ERRORS,
        },
    ),
    "wkv7-h200": Table(
        ("wkv7-h200", "wkv7-floor-h200", "peers-wkv7-h200"),
        {
            "B, T, H, K": SHAPE,
            "forward, ms": "{forward_ms:.3f}",
            "forward + backward, ms": "{forward_backward_ms:.3f}",
            "MiB": "{temp_mib:.0f}",
            "floor, ms": "{floor_forward_ms:.2f} / {floor_forward_backward_ms:.2f}",
            "best of others, ms": "{best_forward_ms:g} / {best_forward_backward_ms:g}",
        },
        beside_floor_and_others,
    ),
    "peers-wkv7-h200": Table(
        ("peers-wkv7-h200",),
        {
            "B, T, H, K": SHAPE,
            "peer": "{peer}",
            "forward, ms": "{forward_ms}",
            "forward + backward, ms": "{forward_backward_ms}",
            "extra memory, GiB": "{extra_gib}",
        },
    ),
    "wkv7-beside-jax-linear-attention-h200": Table(
        ("wkv7-beside-jax-linear-attention-h200",),
        {
            "B, T, H, K": SHAPE,
            "implementation": "{implementation}",
            "forward, ms": "{forward_ms:.3f}",
            "forward + backward, ms": "{forward_backward_ms:.3f}",
        },
    ),
    "wkv7-beside-fla-h200": Table(
        ("wkv7-beside-fla-h200",),
        {
            "implementation": "{implementation}",
            "forward, ms": "{forward_ms:.3f}",
            "forward + backward, ms": "{forward_backward_ms:.3f}",
            "MiB": "{temp_mib:.0f}",
            **ERRORS,
        },
    ),
    "wkv7-clock-h200": Table(
        ("wkv7-clock-h200",),
        {
            "Inputs": "{inputs}",
            "clock, MHz": "{clock_mhz}, {clock_backward_mhz}",
            "forward, ms": "{forward_ms:.2f}",
            "forward + backward, ms": "{forward_backward_ms:.2f}",
        },
    ),
    "wkv7-nsight-h100": Table(
        ("wkv7-nsight-h100",),
        {
            "Kernel": "{kernel}",
            "shared memory": "{shared_memory_percent} %",
            "tensor cores": "{tensor_cores_percent} %",
            "issue of instructions": "{issue_percent} %",
            "barriers": "{barriers_percent} %",
            "instructions": "{instructions_percent} %",
        },
    ),
    "wkv7-changes-h100": Table(
        ("wkv7-changes-h100",),
        {
            "B, T, H": "{B}, {T}, {H}",
            "change": "{change}",
            "time, of the time before": "{ratio:.2f}",
        },
    ),
    "wkv7-errors": Table(
        ("wkv7-errors",),
        {"Tokens": "{tokens}", "where": "{where}", "largest error": "{error:.1e}"},
    ),
    "wkv7-hard-tokens": Table(
        ("wkv7-hard-tokens",),
        {
            "Tokens, T = 2500": "{described}",
            "kernels: o, largest gradient": "{mosaic_gpu_error_o:.1e}, {mosaic_gpu_worst}",
            '`precision="high"`': "{high_precision_error_o:.1e}, {high_precision_worst}",
            "FLA 0.6.0": "{FLA_error_o:.1e}, {FLA_worst}",
        },
        then(
            has(tokens=...),
            with_worst_gradient,
            pivot(("tokens", "described"), ("implementation",), ("error_o", "worst")),
        ),
    ),
    "wkv7-twice-the-digits-h200": Table(
        ("wkv7-twice-the-digits-h200",),
        {
            "in two halves": "{change}",
            "forward": "{forward_ratios}",
            "forward + backward": "{forward_backward_ratios}",
            "errors": "{errors}",
        },
    ),
    "operators-h200": Table(
        ("operators-h200",),
        {
            "operator": "{operator}",
            "forward: kernel, XLA, floor, ms": "{forward_mosaic_gpu_ms:.3f}, {forward_xla_ms:.3f}, "
            "{forward_mosaic_gpu_floor_ms:.3f}",
            "backward: kernel, XLA, floor, ms": "{backward_mosaic_gpu_ms:.3f}, "
            "{backward_xla_ms:.3f}, {backward_mosaic_gpu_floor_ms:.3f}",
        },
        OPERATOR_TIMES,
    ),
    "train-step-h200": Table(
        ("train-step-h200",),
        {
            "model": f"{MODEL}, {{parameters_millions:,}} million parameters",
            "batch": "{batch_size} x {sequence_length}",
            "layers": "{compiled}",
            "tokens/s": "{tokens_per_s:,}",
            "ms": "{ms_per_step:.1f}",
            "GiB": "{peak_gib:.1f}",
            "compile s": "{compile_s:.0f}",
        },
        named_layers,
    ),
    "peers-train-step-h200": Table(
        ("peers-train-step-h200",),
        {
            "model": MODEL,
            "RWKV-LM: tokens/s, GiB": "{RWKV_LM_tokens_per_s:,}, {RWKV_LM_peak_gib:.1f}",
            "FLA 0.6.0: tokens/s, GiB": "{FLA_0_6_0_tokens_per_s:,}, {FLA_0_6_0_peak_gib:.1f}",
        },
        PEER_STEPS,
    ),
    "train-step-changes-h200": Table(
        ("train-step-changes-h200",),
        {"change": "{change}", "ms per step": "{ms_per_step:.1f}"},
    ),
    "train-step-profile-h200": Table(
        ("train-step-profile-h200",),
        {
            "operator": "{operator}",
            "forward": "{forward_ms:.1f}",
            "again": "{again_ms:.1f}",
            "backward": "{backward_ms:.1f}",
            "all": "{all_ms:.1f}",
        },
    ),
    "decode-h200": Table(
        ("decode-h200",),
        {
            "Model": MODEL,
            "one row, ms per token": "{ms_1:.2f}",
            "128 rows, tokens/s": "{tokens_per_s_128:,}",
            "reading 2,048 tokens, tokens/s": "{prefill_tokens_per_s:,}",
        },
        decode_by_model,
    ),
    "peers-decode-h200": Table(
        ("peers-decode-h200",),
        {
            "Model": MODEL,
            "peer": "{peer}",
            "one row, ms per token": "{ms}",
            "128 rows, tokens/s": "{tokens_per_s_128:,}",
            "reading 2,048 tokens, tokens/s": "{prefill_tokens_per_s:,}",
        },
    ),
    "decode-copy-share": Table(
        ("decode-h100", "decode-h200"),
        {
            "Model": MODEL,
            "GPU": "{gpu}",
            "one row": "{1_percent} %",
            "128 rows": "{128_percent} %",
        },
        then(
            has(measure="decode", implementation="mosaic_gpu"),
            with_percent,
            pivot(("layers", "width", "gpu"), ("batch",), ("percent",)),
        ),
    ),
    "decode-ratios": Table(
        ("decode-ratios",),
        {"": "{what}", "GPU": "{gpu}", "ratio": "{ratio}"},
    ),
    "wkv7-recurrent": Table(
        ("wkv7-recurrent",),
        {
            "B, T": "{B}, {T}",
            "forward": "{forward_ratio:.2f}",
            "forward and backward": "{forward_backward_ratio:.2f}",
        },
        ratios_to_scan,
    ),
    "chat": Table(
        ("chat",),
        {
            "Device": "{device}",
            "model": MODEL,
            "before, tokens/s": "{before_tokens_per_s:,}",
            "now, tokens/s": "{tokens_per_s:,}",
        },
    ),
    "prefill-prepared-h200": Table(
        ("prefill-prepared-h200",),
        {
            "Model": MODEL,
            "before, ms": "{before_ms:.2f}",
            "model not prepared, ms": "{not_prepared_ms:.2f}",
            "prepared, ms": "{prepared_ms:.2f}",
        },
    ),
    "finetuning-cpu": Table(
        ("finetuning-cpu",),
        {
            "": "{tune}",
            "before": "{before_bits_per_byte:.2f}",
            "after": "{after_bits_per_byte:.2f}",
        },
    ),
    "parallel-plan-h100": Table(
        ("parallel-plan-h100",),
        {
            "model, rows of each GPU, `remat`": "{model}",
            "GPUs": "{gpus}",
            "mesh": "{mesh}",
            "GiB": "{planned_gib:.1f}",
            "GB that each GPU sends in a step": "{sent}",
            "forecast, ms": "{forecast_ms:.1f}",
        },
        with_kinds_of_collectives,
    ),
    "parallel-h200x2": Table(
        ("parallel-h200x2",),
        {
            "case": "{case}",
            "devices": "{devices}",
            "tokens/s": "{tokens_per_s:,}",
            "for each device": "{tokens_per_s_per_device:,}",
            "ms per step": "{ms_per_step:.1f}",
            "in collectives, ms": "{collectives_ms:.1f}",
            "exposed": "{exposed_percent:.1f} %",
        },
    ),
}
