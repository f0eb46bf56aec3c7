"""The figures of README and docs, as SVG for light and for dark pages.

    python benchmarks/publish.py

Figures of measurements are made from the files in `benchmarks/results`. Each SVG also holds the
numbers it shows, as JSON in its description, so that a test can compare them with the files.
"""

import dataclasses
import html
import json
import operator
import pathlib
import re
from collections.abc import Callable
from typing import Any

from derive import has
from drawings import draw_chunk, draw_kernels
from results import FOLDER, read_results
from style import STYLES, Style

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "figures"
THEMES = tuple(STYLES)

type Data = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
      size: width and height in inches.
      draw: draws the data into a figure of matplotlib.
      files: of measurements.
      data: returns the numbers that are shown.
    """

    size: tuple[float, float]
    draw: Callable[[Any, Data, Style], None]
    files: tuple[str, ...] = ()
    data: Callable[[], Data] = list


def path_of(name: str, theme: str) -> pathlib.Path:
    """Returns the SVG of a figure."""
    return DOCS / f"{name}-{theme}.svg"


def data_in(svg: str) -> Data:
    """Returns the numbers that an SVG says it shows."""
    (text,) = re.findall(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    return json.loads(html.unescape(text))


def draw_figures() -> list[pathlib.Path]:
    """Draws all figures, and returns the files that changed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    changed = []
    DOCS.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        data = figure.data()
        for theme, style in STYLES.items():
            path = path_of(name, theme)
            before = path.read_bytes() if path.exists() else b""
            with plt.rc_context(style.rc(salt=name)):
                drawn = plt.figure(figsize=figure.size, layout="constrained")
                figure.draw(drawn, data, style)
                metadata = {"Date": None, "Creator": None, "Description": json.dumps(data)}
                drawn.savefig(path, metadata=metadata, transparent=True)
                plt.close(drawn)
            if path.read_bytes() != before:
                changed.append(path)
    return changed


WKV_SHAPE = {"B": 8, "T": 4096, "H": 32, "K": 64}
STEPS = ((24, 1024), (24, 2048), (12, 768))
IMPLEMENTATIONS = {
    "mosaic_gpu": "goose-jax",
    "wind_rwkv": "wind_rwkv (CUDA)",
    "RWKV-LM": "RWKV-LM (CUDA)",
    "FLA": "FLA (Triton)",
    "jax-linear-attention": "jax-linear-attention (Pallas)",
}
OURS = "goose-jax"


def main_results() -> Data:
    """Returns WKV7 at one shape, and training steps, beside peers."""
    rows = has(**WKV_SHAPE)(read_results("wkv7-h200").rows)
    operators = [x for x in rows if x["implementation"] in IMPLEMENTATIONS]
    data: Data = [
        {
            "panel": "wkv7",
            "who": IMPLEMENTATIONS[x["implementation"]],
            **{k: x[k] for k in ("forward_ms", "forward_backward_ms")},
        }
        for x in sorted(operators, key=lambda x: x["forward_backward_ms"])
    ]
    ours = read_results("train-step-h200").rows
    same_work = operator.itemgetter("layers", "width", "batch_size")
    steps = [(OURS, x) for x in ours]
    steps += [
        (x["peer"], x)
        for x in read_results("peers-train-step-h200").rows
        if same_work(x) in map(same_work, ours)
    ]
    for layers, width in STEPS:
        of_model = [(w, x) for w, x in steps if (x["layers"], x["width"]) == (layers, width)]
        for who, x in sorted(of_model, key=lambda pair: -pair[1].get("tokens_per_s", 0)):
            model = f"{layers} x {width}"
            shown = {k: x[k] for k in ("tokens_per_s", "peak_gib", "result") if k in x}
            data.append({"panel": "step", "model": model, "who": who, **shown})
    return data


def draw_main_results(figure: Any, data: Data, style: Style) -> None:
    """Draws horizontal bars in two panels, ours in colour."""
    top, bottom = figure.subplots(2, 1, height_ratios=(5, 10))
    rows = [x for x in data if x["panel"] == "wkv7"]
    top.set_title("WKV7, forward and backward: shorter is better")
    bars = top.barh(
        [x["who"] for x in rows],
        [x["forward_backward_ms"] for x in rows],
        color=[style.ours if x["who"] == OURS else style.peer for x in rows],
    )
    top.bar_label(bars, [f"{x['forward_backward_ms']:.2f} ms" for x in rows], padding=4)
    rows = [x for x in data if x["panel"] == "step"]
    bottom.set_title("Training, tokens/s and memory: longer is better")
    places, place = [], 0.0
    for i, x in enumerate(rows):
        place += 1.0 if i == 0 or x["model"] == rows[i - 1]["model"] else 1.7
        places.append(place)
    bars = bottom.barh(
        places,
        [x.get("tokens_per_s", 0) for x in rows],
        color=[style.ours if x["who"] == OURS else style.peer for x in rows],
    )
    labels = [
        x.get("result") or f"{x['tokens_per_s']:,} tokens/s, {x['peak_gib']:.1f} GiB" for x in rows
    ]
    bottom.bar_label(bars, labels, padding=4)
    bottom.set_yticks(places, [f"{x['model']}, {x['who']}" for x in rows])
    for axes, most in ((top, "forward_backward_ms"), (bottom, "tokens_per_s")):
        axes.invert_yaxis()
        axes.set_xlim(0, 2.0 * max(x.get(most, 0) for x in data))
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)


def files_of_lengths() -> tuple[str, ...]:
    """Returns the files of WKV7 at many lengths, one for each device."""
    return tuple(sorted(path.stem for path in FOLDER.glob("wkv7-lengths-*.json")))


def lengths() -> Data:
    """Returns time and memory of WKV7 by the number of tokens."""
    kept = ("T", "implementation", "forward_backward_ms", "temp_mib")
    return [
        {"device": results.hardware, **{name: row[name] for name in kept}}
        for results in map(read_results, files_of_lengths())
        for row in results.rows
        if row.get("T")
    ]


def draw_lengths(figure: Any, data: Data, style: Style) -> None:
    """Draws a row of panels for each device: time, and memory."""
    devices = list(dict.fromkeys(x["device"] for x in data))
    panels = figure.subplots(len(devices), 2, squeeze=False)
    names = list(dict.fromkeys(x["implementation"] for x in data))
    names.sort(key=lambda name: name != "mosaic_gpu")  # ours has the first colour
    for device, pair in zip(devices, panels, strict=True):
        for axes, value, title in zip(
            pair,
            ("forward_backward_ms", "temp_mib"),
            ("ms, forward and backward", "MiB besides inputs and results"),
            strict=True,
        ):
            for name in names:
                rows = [x for x in data if (x["device"], x["implementation"]) == (device, name)]
                if not rows:
                    continue
                axes.plot(
                    [x["T"] for x in rows],
                    [x[value] for x in rows],
                    marker="o",
                    markersize=4,
                    linewidth=4 if name == "mosaic_gpu" else 1.5,  # seen below an equal line
                    color=style.lines[names.index(name)],
                    label=name,
                )
            ticks = sorted({x["T"] for x in data if x["device"] == device})
            axes.set(title=title, xlabel="tokens T", xscale="log", yscale="log")
            axes.set_xticks(ticks, [f"{T // 1024}k" if T >= 1024 else f"{T}" for T in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        pair[0].legend()
        pair[0].set_ylabel(device, fontsize="small")


def decoding() -> Data:
    """Returns the speed of decoding by model and number of rows, ours and that of peers."""
    data: Data = []
    for row in read_results("decode-h200").rows:
        if row["measure"] == "decode" and row["implementation"] == "mosaic_gpu":
            speed = row.get("tokens_per_s") or round(1e3 * row["batch"] / row["ms"])
            data.append(
                {**_model_of(row), "who": OURS, "batch": row["batch"], "tokens_per_s": speed}
            )
    for row in read_results("peers-decode-h200").rows:
        if row["peer"] == "Albatross":  # the row with a CUDA graph has the same speed of many rows
            continue
        speeds = {1: round(1e3 / row["ms"]), 128: row["tokens_per_s_128"]}
        data += [
            {**_model_of(row), "who": row["peer"], "batch": batch, "tokens_per_s": speed}
            for batch, speed in speeds.items()
        ]
    return data


def _model_of(row: Any) -> dict[str, str]:
    return {"model": f"{row['layers']} x {row['width']}"}


def draw_decoding(figure: Any, data: Data, style: Style) -> None:
    """Draws a panel for each model, a line for ours and each peer."""
    models = list(dict.fromkeys(x["model"] for x in data))
    panels = figure.subplots(1, len(models), sharey=True)
    names = list(dict.fromkeys(x["who"] for x in data))
    for axes, model in zip(panels, models, strict=True):
        for name in names:
            rows = [x for x in data if (x["model"], x["who"]) == (model, name)]
            if not rows:
                continue
            axes.plot(
                [x["batch"] for x in rows],
                [x["tokens_per_s"] for x in rows],
                marker="o",
                color=style.lines[names.index(name)],
                label=name,
            )
            for x, place in ((rows[0], "right"), (rows[-1], "left")):
                axes.annotate(
                    f"{x['tokens_per_s']:,}",
                    (x["batch"], x["tokens_per_s"]),
                    xytext=(-6 if place == "right" else 6, 0),
                    textcoords="offset points",
                    ha=place,
                    va="center",
                    fontsize="small",
                )
        axes.set(title=model, xlabel="rows", xscale="log", yscale="log", xlim=(0.1, 2000))
        axes.set_ylim(10, 2e5)
        axes.set_xticks(ticks := (1, 4, 16, 128), ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("tokens/s")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")


FIGURES = {
    "results": Figure(
        (5.6, 5.4),
        draw_main_results,
        ("wkv7-h200", "train-step-h200", "peers-train-step-h200"),
        main_results,
    ),
    "lengths": Figure(
        (7.6, 3.6 * len(files_of_lengths())), draw_lengths, files_of_lengths(), lengths
    ),
    "decoding": Figure((7.6, 3.6), draw_decoding, ("decode-h200", "peers-decode-h200"), decoding),
    "kernels": Figure((7.6, 6.2), draw_kernels),
    "chunk": Figure((7.6, 5.0), draw_chunk),
}
