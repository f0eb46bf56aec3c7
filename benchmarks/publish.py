"""Brings the tables of README and docs, and the figures, up to date with the files of measurements.

    python benchmarks/wkv7.py --json benchmarks/results/wkv7-h200.json   # on the GPU
    python benchmarks/publish.py                                         # anywhere

A page has what is made between `<!-- results: NAME -->` and `<!-- /results -->`; names are those of
`tables.py` and `paragraphs.py`. Figures are those of `figures.py`, each as SVG for light and for
dark pages.
"""

import pathlib
import re

from paragraphs import BLOCKS, Paragraph
from results import FOLDER, NOT_RECORDED, read_results

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLACE = re.compile(
    r"^( *)<!-- results: ([\w-]+) -->\n(.*?)^ *<!-- /results -->$", re.MULTILINE | re.DOTALL
)


def pages() -> list[pathlib.Path]:
    """Returns README and all pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def source_of(name: str, page: pathlib.Path) -> str:
    """Returns a line that says which files a table is made from, with links from the page."""
    results = read_results(name)
    folder = FOLDER.relative_to(page.parent, walk_up=True)
    commit = results.commit if results.commit == NOT_RECORDED else results.commit[:7]
    jax = results.versions["jax"]
    facts = [results.hardware, results.date, f"commit {commit}"]
    if jax not in ("none", NOT_RECORDED):
        facts.append(f"jax {jax}")
    return f"[{name}.json]({folder}/{name}.json): {', '.join(facts)}"


def with_tables(page: pathlib.Path) -> str:
    """Returns the text of a page with the tables of today's files."""

    def table(match: re.Match[str]) -> str:
        indent, name, _ = match.groups()
        block = BLOCKS[name]
        lines = [f"<!-- results: {name} -->", "", block.markdown(), ""]
        if not isinstance(block, Paragraph) or block.named:
            sources = "; ".join(source_of(file, page) for file in block.files)
            lines += [f"<small>{sources}</small>", ""]
        lines.append("<!-- /results -->")
        return re.sub(r"^(?=.)", indent, "\n".join(lines), flags=re.MULTILINE)

    return PLACE.sub(table, page.read_text(encoding="utf-8"))


def main() -> None:
    """Writes the pages and the figures that changed."""
    from figures import draw_figures

    for page in pages():
        if (new := with_tables(page)) != page.read_text(encoding="utf-8"):
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))
    for path in draw_figures():
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
