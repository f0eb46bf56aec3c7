"""Rows of files of measurements on their way into a table."""

import dataclasses
import functools
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from results import NOT_RECORDED, Row, read_results

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
        return re.sub(r"e(-?)\+?0*(?=\d)", r"e\1", " to ".join(texts))

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


@dataclasses.dataclass(frozen=True)
class Tried:
    """A list of what was tried, with its result, of some files.

    Attributes:
      files: their names; rows have what was `tried`, its `result`, and the `hardware`.
    """

    files: tuple[str, ...]

    def markdown(self) -> str:
        """Returns the list."""
        rows = [row for name in self.files for row in read_results(name).rows]
        return "\n".join(map(self._item, rows))

    def _item(self, row: Row) -> str:
        recorded = row["hardware"] != NOT_RECORDED
        where = row["hardware"] if recorded else f"hardware {NOT_RECORDED}"
        return wrap(f"**{row['tried']}:** {row['result']} ({where})", "- ", "  ")


def wrap(text: str, first: str = "", later: str = "") -> str:
    """Returns text in lines of at most 110 characters, the first and later ones indented so."""
    return textwrap.fill(
        text,
        110,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def has(**wanted: Any) -> Derive:
    """Returns a function that takes the rows with some values; a value `...` stands for any."""

    def matches(row: Row) -> bool:
        return all(
            (row.get(name) is not None) if value is ... else row.get(name) == value
            for name, value in wanted.items()
        )

    return lambda rows: [row for row in rows if matches(row)]


def every(steps: int) -> Derive:
    """Returns a function that takes the rows whose step is a multiple of a number, but 0."""
    return lambda rows: [row for row in rows if row["step"] and row["step"] % steps == 0]


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


OTHERS = ("wind_rwkv", "RWKV-LM", "FLA", "jax-linear-attention")


def beside_fastest_of_others(rows: list[Row]) -> Iterable[Row]:
    """Yields the kernel's rows with the fastest of others at the same shape, with the backward."""
    shape = ("B", "T", "H", "K")
    for row in has(implementation="mosaic_gpu", B=...)(rows):
        alike = has(**{name: row[name] for name in shape})(rows)
        others = [x for x in alike if x["implementation"] in OTHERS]
        if others:
            other = min(others, key=lambda x: x["forward_backward_ms"])
            times = {f"other_{x}": other[x] for x in ("forward_ms", "forward_backward_ms")}
            row = {**row, **times, "other": other["implementation"]}
        yield row


def speed_and_memory(rows: list[Row]) -> Iterable[Row]:
    """Yields rows of training steps with the text of a cell: speed and memory, or the result."""
    for row in rows:
        yield {**row, "speed": row.get("result") or cell("{tokens_per_s:,}, {peak_gib:.1f}", row)}


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
        worst = max(errors, key=lambda name: (errors[name] == "NaN", float(errors[name])))
        name = f" ({worst})" if worst != "gradients" else ""
        described = row["tokens"] + HARD_TOKENS[row["tokens"]]
        yield {**row, "worst": cell("{x:.1e}", {"x": errors[worst]}) + name, "described": described}
