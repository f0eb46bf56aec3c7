"""Brings the tables of README and docs, and the figures, up to date with the files of measurements.

    python benchmarks/wkv7.py --json benchmarks/results/wkv7-h200.json   # on the GPU
    python benchmarks/publish.py                                         # anywhere

A page has what is made between `<!-- results: NAME -->` and `<!-- /results -->`; names are those of
`tables.py` and `paragraphs.py`. Figures are those of `figures.py`, each as SVG for light and for
dark pages.
"""

import pathlib
import re

from paragraphs import BLOCKS

ROOT = pathlib.Path(__file__).parents[1]
PLACE = re.compile(
    r"^( *)<!-- results: ([\w-]+) -->\n(.*?)^ *<!-- /results -->$", re.MULTILINE | re.DOTALL
)


def pages() -> list[pathlib.Path]:
    """Returns README and all pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """Returns a page with the tables of today's files."""

    def table(match: re.Match[str]) -> str:
        indent, name, _ = match.groups()
        lines = [f"<!-- results: {name} -->", "", BLOCKS[name].markdown(), "", "<!-- /results -->"]
        return re.sub(r"^(?=.)", indent, "\n".join(lines), flags=re.MULTILINE)

    return PLACE.sub(table, text)


def main() -> None:
    """Writes the pages and the figures that changed."""
    from figures import draw_figures

    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))
    for path in draw_figures():
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
