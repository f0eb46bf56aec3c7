"""Colours and fonts of the figures, for light and for dark pages."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Style:
    """Colours of a theme.

    Attributes:
      text: of text and axes.
      ours: of what is ours.
      peer: of what is others'.
      lines: of lines in a plot, ours first.
      soft: background of parts in drawings.
    """

    text: str
    ours: str
    peer: str
    lines: tuple[str, ...]
    soft: tuple[str, ...]

    def rc(self, salt: str) -> dict[str, Any]:
        """Returns settings of matplotlib; the salt makes the same file in each run."""
        colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        return {
            **dict.fromkeys(colours, self.text),
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.family": ["DejaVu Sans", "sans-serif"],
            "font.size": 10,
            "legend.frameon": False,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }


STYLES = {
    "light": Style(
        text="#24292f",
        ours="#d9730d",
        peer="#a8b1bd",
        lines=("#d9730d", "#2f6fb3", "#3d8b5a", "#8a5fb0", "#b0413e"),
        soft=("#fbe3cb", "#d7e6f5", "#d9eede", "#e9dff2"),
    ),
    "dark": Style(
        text="#dfe3e8",
        ours="#f39a3d",
        peer="#66707c",
        lines=("#f39a3d", "#6ea8e0", "#74c28f", "#bd9be0", "#e07a76"),
        soft=("#5a3a18", "#24405e", "#28503a", "#45345c"),
    ),
}
