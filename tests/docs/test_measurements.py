"""Tables and figures of README and docs show what the files in `benchmarks/results` hold."""

import json
import math
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def numbers(value):
    """Yields all numbers of a row, also those inside of texts."""
    if isinstance(value, dict):
        for name, x in value.items():
            yield from numbers(name)
            yield from numbers(x)
    elif isinstance(value, list):
        for x in value:
            yield from numbers(x)
    elif isinstance(value, str):
        for text in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", value):
            yield float(text.replace(",", ""))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_files_say_when_where_and_how(benchmarks):
    results = benchmarks("results")
    assert RESULTS
    for path in RESULTS:
        found = results.read_results(path.stem)
        assert {"jax", "cuda"} <= found.versions.keys() or "python" in found.versions, path
        assert re.fullmatch(r"[0-9a-f]{40}( \+ changes)?|not recorded", found.commit), path
        assert found.date != results.NOT_RECORDED or "peer" in path.read_text(), path
        assert all(found.rows), path


def test_pages_have_the_tables_of_the_files(benchmarks):
    publish = benchmarks("publish")
    shown = []
    for page in publish.pages():
        text = page.read_text(encoding="utf-8")
        assert publish.with_tables(page) == text, f"run benchmarks/publish.py: {page.name}"
        shown += [name for _, name, _ in publish.PLACE.findall(text)]
        assert text.count("<!-- results:") == len(publish.PLACE.findall(text))
    assert set(shown) == set(publish.BLOCKS)


def test_every_file_is_shown(benchmarks):
    blocks, figures = benchmarks("paragraphs").BLOCKS, benchmarks("figures").FIGURES
    used = {name for block in blocks.values() for name in block.files}
    used |= {name for figure in figures.values() for name in figure.files}
    assert {path.stem for path in RESULTS} == used


def test_every_number_of_a_table_is_in_its_files(benchmarks):
    """Compares without the code that makes the tables."""
    publish, tables = benchmarks("publish"), benchmarks("tables").TABLES
    for page in publish.pages():
        for _, name, body in publish.PLACE.findall(page.read_text(encoding="utf-8")):
            if name not in tables:
                continue
            files = [ROOT / f"benchmarks/results/{x}.json" for x in tables[name].files]
            rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
            known = {x for row in rows for x in numbers(row)}
            derived = {a / b for a in known for b in known if b} if "recurrent" in name else set()
            derived |= {100 * x for x in known if x < 1} if "share" in name else set()
            for line in re.findall(r"^ *\|.*", body, re.MULTILINE)[2:]:
                for text in re.findall(r"(?<![\w^])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", line):
                    value = float(text.replace(",", ""))
                    digits = len(text.partition("e")[0].partition(".")[2])
                    power = int(text.partition("e")[2] or 0)
                    limit = 0.5 * 10.0 ** (power - digits) * (1 + 1e-6)
                    assert any(
                        math.isclose(value, x, abs_tol=limit, rel_tol=0) for x in known | derived
                    ) or text in DESCRIPTIONS.get(name, ()), f"{name}: {text} in {line}"


DESCRIPTIONS = {
    # What the tokens are, which files name without numbers.
    "wkv7-hard-tokens": ("5", "0.3", "0.8", "1", "1e-3", "0.99", "1e-4", "1e-5"),
}


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_sentences_have_no_measurements_of_their_own(benchmarks, name):
    text = benchmarks("publish").PLACE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    measured = r"\d[\d,.]*\s*(?:tokens/s|tokens per second|ms\b|GiB|GB/s|TB/s|%|times\b)"
    assert not re.findall(measured, prose)


def test_figures_are_drawn_from_the_files(benchmarks):
    figures = benchmarks("figures")
    for name, figure in figures.FIGURES.items():
        for theme in figures.THEMES:
            path = figures.path_of(name, theme)
            drawn = figures.data_in(path.read_text(encoding="utf-8"))
            assert drawn == json.loads(json.dumps(figure.data())), f"run publish.py: {path}"


def test_figures_on_pages_exist_and_all_are_used(benchmarks):
    figures = benchmarks("figures")
    pages = "".join(page.read_text(encoding="utf-8") for page in benchmarks("publish").pages())
    for name in figures.FIGURES:
        for theme in figures.THEMES:
            assert f"figures/{name}-{theme}.svg" in pages, name
