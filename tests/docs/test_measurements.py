"""Tables and figures of README and docs show what the files in `benchmarks/results` hold."""

import datetime
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
        said = (found.date, found.hardware, found.commit, found.command, *found.versions.values())
        assert not any(results.NOT_RECORDED in x for x in said), path
        assert re.fullmatch(r"[0-9a-f]{40}( \+ changes)?", found.commit), path
        assert all(found.rows), path
        for row in found.rows:  # which may be of other days and commits
            assert re.fullmatch("[0-9a-f]{40}", row.get("commit", "0" * 40)), (path, row)
            datetime.date.fromisoformat(row.get("date", "2026-01-01"))


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
            derived = {100 * x for x in known if x < 1} if "share" in name else set()
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


UNITS = (
    r"(?:(?:ms|us|s|seconds|minutes|hours|percent|tokens/s|tokens per second|[KMGT]i?[Bb](?:/s)?"
    r"|TFLOP/s|MHz|times|bits per byte)(?!\w)|%)"
)
MEASURED = re.compile(
    rf"(?<![\w.])\d[\d,.]*(?: (?:to|and|or) \d[\d,.]*)? ?{UNITS}"
    r"|(?<![\w.])\d(?:\.\d+)?e-\d+"
    r"|(?<![\w.])\d\.\d+(?: (?:to|and|or) \d\.\d+)? of "
)

# What sentences may say without a file, by page. Add to it only what is of one of these kinds.
ALLOWED = {
    "README.md": (
        # Limits: a test fails beyond them.
        "logits agree with the official code to 1e-4",
        "the loss agrees to 1e-4 and every weight to 1e-3",
    ),
    "docs/index.md": (),
    "docs/performance.md": (
        # Limits: a test fails beyond them.
        "the limits are 4e-3 in outputs and 1e-2 in gradients",
        "the final state to 6e-3; with 128 keys per head to 3.5e-2, and that of dv to 4e-2",
        # Settings and constants, of this code or of others.
        "more of the GPU than the 75 % that JAX takes by default",
        # What follows from a format, or from sizes.
        "rounding an exact output costs 1.7e-3",
    ),
    "docs/kernels.md": ("exponents stay within 32 times the bound",),  # follows from sizes
    "docs/parallel.md": (
        # Settings and constants.
        "signs of life for 20 seconds",
        "NVLink 4 (450 GB/s for each GPU and direction)",
        "400 Gb/s InfiniBand",
    ),
    "docs/model.md": ("uniform ±1e-4",),  # a setting
    "docs/operators.md": ("3 % more for the vectors",),  # follows from sizes
    "docs/checkpoints.md": (
        # Settings and constants.
        "a pickle may have 8 MiB at most",
        "sampled every 20 ms",
        "constants (1e-5, and 64e-5 for the heads)",
        # What follows from sizes.
        "the embedding, 512 MiB in the 7.2B model",
    ),
}


def prose(text):
    """Returns the sentences of a page, without what is made from files, and without code."""
    code = r"^ *```.*?^ *```$|(?<=\n\n)(?:    [^\n]*\n)+|`(?:[^`\n]|\n(?!\n))*`"
    return " ".join(re.sub(code, "", text, flags=re.MULTILINE | re.DOTALL).split())


@pytest.mark.parametrize("name", ALLOWED)
def test_sentences_have_no_measurements_of_their_own(benchmarks, name):
    """Sentences with measurements are made by `benchmarks/paragraphs.py`, or are rows of files."""
    page = (ROOT / name).read_text(encoding="utf-8")
    sentences = prose(benchmarks("publish").PLACE.sub("", page))
    for allowed in ALLOWED[name]:
        assert sentences.count(allowed) == 1, allowed
        sentences = sentences.replace(allowed, "")
    found = [sentences[max(0, x.start() - 60) : x.end() + 20] for x in MEASURED.finditer(sentences)]
    assert not found


@pytest.mark.parametrize(
    "sentence",
    [
        *("It took 16 s.", "5 to 10 ms more", "about 0.1 us", "1.86 times as fast", "3% slower"),
        *("8 % of the bytes", "0.5 GiB more", "0.89 of the time", "at 4.1 TB/s", "1,234 tokens/s"),
        *("off by 2.5e-2, and", "0.94 to 0.96 of the time", "1.8 bits per byte", "1 MiB"),
    ],
)
def test_measurements_are_found_in_sentences(sentence):
    assert MEASURED.search(prose(sentence))


@pytest.mark.parametrize(
    "text",
    ["on H200s", "`5 ms`", "```\n5 ms\n```", "a\n\n    took 5 ms\n\nb", "jax 0.11.2, 16 rows"],
)
def test_code_and_names_are_no_measurements(text):
    assert not MEASURED.search(prose(text))


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
