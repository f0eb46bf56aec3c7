"""The numbers and settings in docs/proofs.md are those of the files beside its plots."""

import json
import pathlib

import numpy as np
import pytest

from examples.proofs.__main__ import PROOFS

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "proofs.md").read_text()
FIGURES = ROOT / "docs" / "figures"


def record(name):
    return json.loads((FIGURES / f"{name}-short.json").read_text())


def cells(begin):
    """The cells of the row of a table that begins so."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {begin} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def percent(share, digits=0):
    return f"{100 * share:.{digits}f} %"


@pytest.mark.parametrize("name", PROOFS)
def test_the_measured_settings_are_those_of_the_code(name):
    measured, short = record(name), PROOFS[name].SHORT
    assert measured["short"]
    assert "changes" not in measured["commit"]
    assert measured["command"] == f"python -m examples.proofs {name} --short"
    assert measured["settings"]["recipe"] == vars(short.recipe)
    assert measured["settings"]["task"] == json.loads(json.dumps(vars(short.task)))
    plot = f"{name}-short.svg"
    assert f"](figures/{plot})" in PAGE
    assert measured["hardware"] in (FIGURES / plot).read_text()
    assert measured["hardware"] in PAGE


def test_digit_reversal():
    results = record("digit-reversal")["results"]
    full, short = cells("right reversed digits")
    assert full == "not measured"
    whole, longest = short.split(", of 12-digit numbers ")
    assert whole == percent(results["accuracy_of_reversed_digits"], 2)
    assert longest == percent(results["accuracy_by_digits"]["12"], 2)


def test_state_tracking():
    accuracy = record("state-tracking")["results"]["accuracy"]
    for length in (4, 6, 8, 16):
        measured = percent(accuracy[length - 1])
        assert cells(f"right products of {length} swaps") == ["not measured", measured]


def test_associative_recall():
    for width, accuracy in record("associative-recall")["results"]["accuracy"].items():
        assert cells(f"width {width}") == [percent(accuracy[str(n)]) for n in (2, 4, 8)]


def test_passkey():
    results = record("passkey")["results"]
    lengths = cells("shortened: tokens of the row")
    keys = results["accuracy_of_keys"]
    assert cells("whole keys that are right") == [percent(keys[length]) for length in lengths]
    assert str(results["trained_length"]) == lengths[0]


def test_sizes_of_the_full_forms():
    sizes = {
        "digit-reversal": "10,000 steps of 256 x 128",
        "state-tracking": "20,000 steps of 512 x 32",
        "associative-recall": "5,000 steps of 64 rows",
        "passkey": "2,000 steps of 64 rows",
    }
    for name, text in sizes.items():
        full = PROOFS[name].FULL
        assert text in PAGE
        assert text.startswith(f"{full.recipe.total_steps:,} steps of {full.task.batch_size} ")


def test_megabytes_of_the_packages_add_up():
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    total = np.sum([float(row[2]) for row in rows])
    assert f"{total:.0f} MB" in PAGE
    listed = {name for row in rows for name in row[1].split("`")[1::2]}
    begin = PAGE.index("apt-get download ") + len("apt-get download ")
    command = PAGE[begin : PAGE.index("cd ..", begin)].replace("\\\n", " ")
    assert listed == set(command.split())
