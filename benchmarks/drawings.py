"""Drawn figures: the structure of the kernels, and what a chunk computes."""

from typing import Any

from style import Style


def _blank(figure: Any, width: float, height: float) -> Any:
    """Returns axes that are a sheet of paper, y downwards."""
    axes = figure.add_subplot()
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    return axes


def _box(axes: Any, x: float, y: float, w: float, h: float, text: str, **options: Any) -> None:
    """Draws a box with a text in its middle."""
    from matplotlib.patches import FancyBboxPatch

    size = options.pop("size", 9)
    patch = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", linewidth=0.8, **options
    )
    axes.add_patch(patch)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2, "shrinkB": 0}
    )


def draw_kernels(figure: Any, data: Any, style: Style) -> None:
    """Draws the three kernels over the chunks of a row, and the warpgroups of a walk."""
    axes = _blank(figure, 10, 8.1)
    edge = {"edgecolor": style.text}
    chunks, left, pitch = 5, 2.9, 1.42
    kernels = (
        ("wkv7_outputs", "walks forward", "o, U, X", style.soft[0], 1),
        ("wkv7_state_gradients", "walks backward", "dW, dS", style.soft[1], -1),
        ("wkv7_input_gradients", "all chunks at once", "dr dk dv da db", style.soft[2], 0),
    )
    axes.text(0, 0.15, "Three kernels over the chunks of one row and head", fontweight="bold")
    for line, (name, how, writes, colour, direction) in enumerate(kernels):
        y = 0.55 + 1.05 * line
        axes.text(0, y + 0.22, name, fontsize=8.5, va="center", family="monospace")
        axes.text(0, y + 0.5, how, fontsize=8.5, va="center")
        for i in range(chunks):
            x = left + pitch * i
            _box(axes, x, y, 1.14, 0.7, f"chunk {i}\n{writes}", facecolor=colour, size=7.5, **edge)
            if direction and i + direction in range(chunks):
                start = x + (1.14 if direction > 0 else 0)
                _arrow(axes, (start, y + 0.35), (start + 0.28 * direction, y + 0.35), style.text)
    axes.text(
        left, 3.72, "arrows: the state S, or its gradient dS, in float32 registers", fontsize=8.5
    )

    axes.text(0, 4.35, "The four warpgroups of a walk, over time", fontweight="bold")
    lanes = (
        ("prepares even chunks", "decays, inverse", (0, 2, 4), 0, 2.2, style.soft[0]),
        ("prepares odd chunks", "decays, inverse", (1, 3, 5), 1.1, 2.2, style.soft[0]),
        ("carries the state", "U, S", (0, 1, 2, 3, 4), 2.2, 1.1, style.soft[1]),
        ("finishes and loads", "o", (0, 1, 2, 3), 3.3, 1.1, style.soft[2]),
    )
    for line, (who, what, numbers, begin, step, colour) in enumerate(lanes):
        y = 4.7 + 0.66 * line
        axes.text(0, y + 0.24, who, fontsize=8.5, va="center")
        for i, number in enumerate(numbers):
            x = left + begin + step * i
            width = min(step - 0.08, 9.9 - x)
            if width > 0.5:
                text = f"{number}: {what}"
                _box(axes, x, y, width, 0.48, text, facecolor=colour, size=7.5, **edge)
    _arrow(axes, (left, 7.5), (9.9, 7.5), style.text)
    axes.text(9.9, 7.75, "time", ha="right", va="center", fontsize=8.5)
    axes.text(
        left,
        7.75,
        "a chunk stays in its slot of shared memory all the time",
        va="center",
        fontsize=8.5,
    )


def _matrix(
    axes: Any,
    x: float,
    y: float,
    w: float,
    h: float,
    name: str,
    colour: str,
    style: Style,
    **options: Any,
) -> float:
    """Draws a matrix, lower triangular if asked for, and returns the x after it."""
    from matplotlib.patches import Polygon, Rectangle

    axes.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor=style.text, linewidth=0.8))
    if options.get("lower"):
        corners = [(x, y), (x, y + h), (x + w, y + h)]
        axes.add_patch(Polygon(corners, facecolor=colour, edgecolor="none"))
    else:
        axes.add_patch(
            Rectangle((x, y), w, h, facecolor=colour, edgecolor=style.text, linewidth=0.8)
        )
    place = (x + w * 0.36, y + h * 0.68) if options.get("lower") else (x + w / 2, y + h / 2)
    axes.text(*place, name, ha="center", va="center", fontsize=9)
    return x + w


def draw_chunk(figure: Any, data: Any, style: Style) -> None:
    """Draws the products of a chunk as matrices: L tokens, K keys, V values."""
    axes = _blank(figure, 10, 6.4)
    L, K, V = 1.25, 0.85, 0.85
    state, weight, value, solved = style.soft
    lines: tuple[tuple[str, str, tuple], ...] = (
        (
            "1",
            "what the removals would read, if no token removed anything",
            ("W", "a_entry S0", "A_ak v"),
        ),
        ("2", "the removals see each other: a triangular system, solved once", ("U", "M W")),
        (
            "3",
            "outputs: from the state before, from values, from removals",
            ("o", "r_entry S0", "A_rk v", "A_rb U"),
        ),
        ("4", "the state for the next chunk", ("S1", "keep S0", "k_exitᵀ v", "b_exitᵀ U")),
    )
    shapes = {
        "W": (V, L, solved, False), "U": (V, L, solved, False), "o": (V, L, value, False),
        "v": (V, L, value, False), "S0": (V, K, state, False), "S1": (V, K, state, False),
        "a_entry": (K, L, weight, False), "r_entry": (K, L, weight, False),
        "keep": (K, K, weight, False), "M": (L, L, weight, True),
        "A_ak": (L, L, weight, True), "A_rk": (L, L, weight, True), "A_rb": (L, L, weight, True),
        "k_exitᵀ": (L, K, weight, False), "b_exitᵀ": (L, K, weight, False),
    }  # fmt: skip
    y = 0.0
    for number, what, (result, *terms) in lines:
        axes.text(0, y + 0.12, f"{number}  {what}", fontsize=9, fontweight="bold", va="center")
        names = [result, *(name for term in terms for name in term.split())]
        height = max(shapes[name][1] for name in names) * 0.72
        x, y = 0.2, y + 0.34
        for i, term in enumerate([result, *terms]):
            if i:
                axes.text(x + 0.2, y + height / 2, "=" if i == 1 else "+", ha="center", va="center")
                x += 0.4
            for name in term.split():
                w, h, colour, lower = shapes[name]
                h *= 0.72
                top = y + (height - h) / 2
                x = _matrix(axes, x, top, w, h, name, colour, style, lower=lower) + 0.08
        y += height + 0.3
    axes.text(
        0, y + 0.02,
        "M = (I - A_ab)⁻¹. Triangles: tokens see earlier tokens only. keep: a diagonal of decays.",
        fontsize=8.5, va="center",
    )  # fmt: skip
