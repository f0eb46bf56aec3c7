"""Changes pages of the documentation on their way to the site.

Pages are Markdown that is read on GitHub, too. For the site, formulas that are code get mathematics
beside them (MathML, which browsers draw by themselves), and links to files that are not pages lead
to the repository.
"""

import html
import pathlib
import re
from typing import Any

from latex2mathml.converter import convert
from mathematics import NotMathematics, formulas

ROOT = pathlib.Path(__file__).parents[1]
BLOB = "https://github.com/goose-jax/goose-jax/blob/main/"
FORMULA = re.compile(r"^```python (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^ *\|.*$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Returns the text of a page as the site shows it."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if "://" in match[2] or target.is_relative_to(ROOT / "docs"):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(
                f"{page.file.src_uri} links to {match[2]}, which does not exist"
            )
        return f"{match[1]}{BLOB}{target.relative_to(ROOT)}{match[3]}"

    markdown = LINK.sub(link, markdown)
    markdown = ROW.sub(lambda match: with_whole_numbers(match[0]), markdown)
    return FORMULA.sub(lambda match: with_mathematics(match[1], match[2]), markdown)


def with_whole_numbers(row: str) -> str:
    """Returns a row of a table whose numbers, such as 1e-3, do not break at the sign."""
    parts = row.split("`")  # every second one is code
    parts[::2] = [re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", x) for x in parts[::2]]
    return "`".join(parts)


def with_mathematics(name: str, code: str) -> str:
    """Returns a block of code; if it has formulas, they stand above it."""
    block = f"```python\n{code}```"
    try:
        lines = formulas(code)
    except NotMathematics:
        return block
    shown = "".join(
        f'<div class="formula" style="--depth: {depth}">{convert(latex, display="inline")}'
        f"<span>{html.escape(comment)}</span></div>"
        for depth, latex, comment in lines
    )
    indented = "".join(f"    {line}\n" if line else "\n" for line in block.split("\n"))
    return f'<div class="formulas" id="{name}">{shown}</div>\n\n??? example "As code"\n\n{indented}'
