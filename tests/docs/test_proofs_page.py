"""The numbers and settings in docs/proofs.md are those of the files beside its plots."""

import json
import pathlib

import numpy as np
import pytest

from examples.proofs.__main__ import PROOFS

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "proofs.md").read_text()
LINE = " ".join(PAGE.split())
FIGURES = ROOT / "docs" / "figures"


MEASURED = [*PROOFS, *(f"{name}-short" for name in PROOFS)]


def record(stem):
    return json.loads((FIGURES / f"{stem}.json").read_text())


def cells(begin):
    """The cells of the row of a table that begins so."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {begin} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def percent(share, digits=0):
    return f"{100 * share:.{digits}f} %"


@pytest.mark.parametrize("stem", MEASURED)
def test_the_measured_settings_are_those_of_the_code(stem):
    measured, name = record(stem), stem.removesuffix("-short")
    settings = PROOFS[name].SHORT if measured["short"] else PROOFS[name].FULL
    assert measured["short"] == (stem != name)
    assert "changes" not in measured["commit"]
    assert measured["command"] == f"python -m examples.proofs {name}" + " --short" * (stem != name)
    assert measured["settings"]["recipe"] == vars(settings.recipe)
    assert measured["settings"]["task"] == json.loads(json.dumps(vars(settings.task)))
    assert f"](figures/{stem}.svg)" in PAGE
    assert measured["hardware"] in (FIGURES / f"{stem}.svg").read_text()
    assert measured["hardware"].split(",")[0] in LINE


def test_digit_reversal():
    for stem, longest, cell in zip(
        ("digit-reversal", "digit-reversal-short"),
        ("60", "12"),
        cells("right reversed digits"),
        strict=True,
    ):
        results = record(stem)["results"]
        whole = percent(results["accuracy_of_reversed_digits"], 2)
        of_longest = percent(results["accuracy_by_digits"][longest], 2)
        assert cell == f"{whole}, of {longest}-digit numbers {of_longest}"


def test_state_tracking():
    full = record("state-tracking")["results"]["accuracy"]
    short = record("state-tracking-short")["results"]["accuracy"]
    for length in (4, 6, 8, 16, 32):
        expected = [percent(full[length - 1]), percent(short[length - 1])]
        assert cells(f"right products of {length} swaps") == expected
    assert cells("right products of 40 swaps") == [percent(full[39]), ""]
    assert f"is 100 % up to 36 swaps, and falls to {percent(full[43])} at 44" in PAGE
    assert {percent(share) for share in full[:36]} == {"100 %"}


@pytest.mark.parametrize(
    ("form", "pairs"), [("full size", (8, 16, 32, 64, 128)), ("shortened", (2, 4, 8))]
)
def test_associative_recall(form, pairs):
    results = record("associative-recall" + "-short" * (form == "shortened"))["results"]
    assert cells(f"{form}: right values of") == [f"{n} pairs" for n in pairs]
    begin = PAGE.index(f"| {form}: right values of")
    table = PAGE[begin : PAGE.index("\n\n", begin)]
    rows = [f"| width {w} |" for w in results["accuracy"]]
    for row, accuracy in zip(rows, results["accuracy"].values(), strict=True):
        shares = " | ".join(percent(accuracy[str(n)]) for n in pairs)
        assert f"{row} {shares} |" in table


@pytest.mark.parametrize(("form", "digits"), [("full size", 5), ("shortened", 3)])
def test_passkey(form, digits):
    results = record("passkey" + "-short" * (form == "shortened"))["results"]
    lengths = cells(f"{form}: tokens of the row")
    keys = results["accuracy_of_keys"]
    measured = [percent(keys[length]) for length in lengths]
    assert cells(f"whole keys of {digits} digits that are right") == measured
    assert str(results["trained_length"]) == lengths[0]


def test_sizes_of_the_full_forms():
    sizes = {
        "digit-reversal": "10,000 steps of 256 x 128",
        "state-tracking": "20,000 steps of 512 x 32",
        "associative-recall": "8,000 steps of 64 rows",
        "passkey": "2,000 steps of 64 rows",
    }
    for name, text in sizes.items():
        full = PROOFS[name].FULL
        assert text in PAGE
        assert text.startswith(f"{full.recipe.total_steps:,} steps of {full.task.batch_size} ")


def test_times_of_training():
    seconds = {name: record(name)["results"]["training_seconds"] for name in PROOFS}
    seconds["associative-recall"] = np.sum(list(seconds["associative-recall"].values()))
    reversal, passkey, tracking, recall = (
        f"{seconds[name] / 60:.0f}"
        for name in ("digit-reversal", "passkey", "state-tracking", "associative-recall")
    )
    assert (
        f"digit reversal took {reversal} minutes, passkey {passkey}, state tracking {tracking}, "
        f"the three models of associative recall {recall} together" in LINE
    )
    assert f"The training took {seconds['passkey']:.0f} seconds." in LINE
    losses = dict(record("state-tracking")["results"]["loss_curve"])
    assert "the loss is below 0.01 nats after 1,000 steps" in LINE
    assert max(loss for step, loss in losses.items() if step >= 1000) < 0.01


def measurements(name):
    """Of a run: what training and held-out text gave, and how it ended."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found["command"], found["rows"]


def test_the_run_on_real_text():
    command, rows = measurements("run-debian-h200")
    minutes, tokens = rows[-1]["minutes"], rows[-1]["million_tokens"]
    best = min(rows, key=lambda row: row["held_out_bits_per_byte"])
    alone = [row["tokens_per_second"] for row in rows if row["step"] > 10500]
    assert f"took {minutes:.1f} minutes of training: {tokens:.0f} million tokens" in LINE
    assert f"no other program used the GPU, and the run read {np.mean(alone):,.0f}"[:-3] in LINE
    assert f"best after {best['million_tokens']:.0f} million tokens, at " in LINE
    assert f"at {best['held_out_bits_per_byte']:.3f} bits per byte; from there on" in LINE
    for part in command.split("; "):
        assert part.replace("'", '"') in LINE.replace("\\ ", "")
    title = (FIGURES / "debian-12x768.svg").read_text()
    last = rows[-1]["held_out_bits_per_byte"]
    assert f"{tokens:.0f} million tokens: {last:.3f} bits per byte on held-out text" in title
    assert f"at best {best['held_out_bits_per_byte']:.3f}" in title


def test_the_run_with_another_weight_decay():
    _, rows = measurements("run-debian-weight-decay-h200")
    bits, tokens = min((row["held_out_bits_per_byte"], row["million_tokens"]) for row in rows)
    assert f"best at {bits:.3f} bits per byte, after {tokens:.0f} million tokens" in LINE


def test_megabytes_of_the_packages_add_up():
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    total = np.sum([float(row[2]) for row in rows])
    assert f"{total:.0f} MB" in PAGE
    listed = {name for row in rows for name in row[1].split("`")[1::2]}
    begin = PAGE.index("apt-get download ") + len("apt-get download ")
    command = PAGE[begin : PAGE.index("cd ..", begin)].replace("\\\n", " ")
    assert listed == set(command.split())
