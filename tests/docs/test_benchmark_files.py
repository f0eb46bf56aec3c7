"""What a benchmark writes with `--json`, and how rows become tables."""

import json
import pathlib
import subprocess
import sys

import pytest

from goose_jax import RWKV7Config

ROOT = pathlib.Path(__file__).parents[2]


def test_a_file_says_what_was_run_and_on_what(benchmarks, tmp_path, monkeypatch):
    results, path = benchmarks("results"), tmp_path / "new.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/wkv7.py", "--calls", "1", "--json", str(path)])
    results.write_results(path, [{"T": 8, "ms": 0.5}])
    found = json.loads(path.read_text())
    assert found["command"] == "python benchmarks/wkv7.py --calls 1"
    assert found["hardware"].startswith("CPU, ")
    assert found["rows"] == [{"T": 8, "ms": 0.5}]
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    assert found["commit"].removesuffix(" + changes") == commit

    monkeypatch.setattr(sys, "argv", ["benchmarks/wkv7.py", "--calls", "2", f"--json={path}"])
    results.write_results(path, [{"T": 9}])
    again = json.loads(path.read_text())
    assert again["rows"] == [{"T": 8, "ms": 0.5}, {"T": 9}]
    assert again["command"].count("python benchmarks/wkv7.py") == 2

    results.write_results(path, [{"T": 10}])  # the same command once more
    assert json.loads(path.read_text())["rows"] == [{"T": 10}]
    monkeypatch.setattr(sys, "argv", ["benchmarks/wkv7.py", "--json", str(path)])
    path.write_text(path.read_text().replace(commit, "0" * 40))
    results.write_results(path, [{"T": 11}])
    assert json.loads(path.read_text())["rows"] == [{"T": 11}]


def test_a_file_names_the_commits_of_checkouts(benchmarks, tmp_path, monkeypatch):
    results, path = benchmarks("results"), tmp_path / "new.json"
    checkout = tmp_path / "peers" / "RWKV-LM"
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(checkout)]
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "c"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = results.revisions(tmp_path / "peers", ("RWKV-LM", "FLA"))  # FLA is installed
    assert found == {"RWKV-LM": head.stdout.strip()}
    assert results.revisions(None, ("RWKV-LM",)) == {}
    monkeypatch.setattr(sys, "argv", ["benchmarks/wkv7.py"])
    results.write_results(path, [{"T": 8}], found)
    assert json.loads(path.read_text())["versions"]["RWKV-LM"] == found["RWKV-LM"]


@pytest.mark.parametrize("change", [{"rows": []}, {"date": "yesterday"}, {"extra": 1}])
def test_a_damaged_file_is_named(benchmarks, tmp_path, change):
    fields = {"date": "2026-01-31", "hardware": "x", "versions": {"jax": "1"}}
    fields |= {"commit": "y", "command": "z", "rows": [{"a": 1}]}
    path = tmp_path / "file.json"
    path.write_text(json.dumps(fields))
    assert benchmarks("results").load_results(path).rows == [{"a": 1}]
    path.write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=r"file\.json: "):
        benchmarks("results").load_results(path)


def test_cells(benchmarks):
    cell = benchmarks("derive").cell
    row = {"a": 1234.5, "few": 0.00123, "range": [2, 3], "none": None}
    assert cell("{a:,.0f} ms", row) == "1,234 ms"
    assert cell("{few:.1e}", row) == "1.2e-3"
    assert cell("{range} %", row) == "2 to 3 %"
    assert cell("{none} %", row) == ""
    assert cell("{a:.1f}, {none:.1f}", row) == "1234.5, \N{EN DASH}"
    assert cell("none of its own", row) == "none of its own"


def test_rows_of_the_benchmarks_fit_the_tables(benchmarks):
    """Rows as the programs write them, where the committed files are older or joined by hand."""
    tables = benchmarks("tables")
    errors = {f"error_{name}": 1e-3 for name in ("o", "dr", "dk", "dv", "da")} | {"error_db": 0.5}
    hard = {"tokens": "one token repeated", "implementation": "mosaic_gpu", **errors}
    shape = {"B": 8, "T": 1, "H": 2, "K": 64, "implementation": "mosaic_gpu", "forward_ms": 2.0}
    (row,) = tables.TABLES["wkv7-hard-tokens"].derive([shape, hard])
    assert row["mosaic_gpu_worst"] == "5.0e-1 (db)"
    (row,) = tables.TABLES["wkv7-h200"].derive([hard, shape])
    assert row["forward_ms"] == 2.0
    times = {"forward_ms": 2.0, "forward_backward_ms": 3.0}
    scan = {"B": 1, "T": 1, "implementation": "recurrent", **times}
    kernel = {**scan, "implementation": "recurrent, mosaic_gpu", "forward_ms": 0.5}
    (row,) = tables.TABLES["wkv7-recurrent-h200"].derive([scan, kernel])
    assert (row["recurrent_forward_ms"], row["recurrent_mosaic_gpu_forward_ms"]) == (2.0, 0.5)


def test_a_profile_sorts_times_into_parts(benchmarks):
    profile = benchmarks("step_profile")
    forward, again = (
        "jit(f)/jvp(g)/wkv7/dot",
        "jit(f)/transpose(jvp(g))/rematted_computation/wkv7/dot",
    )
    assert profile.part_of(forward) == ("wkv7", "forward")
    assert profile.part_of(again) == ("wkv7", "again")
    assert profile.part_of(again.replace("rematted_computation/", "")) == ("wkv7", "backward")
    assert profile.part_of("jit(f)/optimizer/mul") == ("optimizer", "neither")
    assert profile.part_of("jit(f)/jvp(g)/add") == ("other", "forward")
    times = {("wkv7", "forward"): 2.0, ("wkv7", "again"): 1.0, ("other", "forward"): 5.0}
    first, second, total = profile.profile_rows(times, {("wkv7", "forward"): 1.5})
    assert first == {"operator": "other", "forward_ms": 5.0, "all_ms": 5.0, "floor_ms": 0.0}
    assert (second["again_ms"], second["all_ms"], second["floor_ms"]) == (1.0, 3.0, 1.5)
    assert total == {
        "operator": "all",
        "forward_ms": 7.0,
        "again_ms": 1.0,
        "all_ms": 8.0,
        "floor_ms": 1.5,
    }


def test_floors_are_passes_and_products(benchmarks):
    config = RWKV7Config(vocab_size=100, hidden_size=64, num_layers=3)
    floors = benchmarks("step_profile").floors(config, 10, 1000, bytes_per_s=1e3, flops_per_s=1e6)
    one_pass = 2 * 10 * 64  # bytes, and ms at 1000 bytes per second
    assert floors["wkv7", "backward"] == pytest.approx(3 * 13 * one_pass)
    product = 1e3 * 2 * 10 * 64 * 256 / 1e6
    assert floors["feed_forward", "forward"] == pytest.approx(3 * 2 * product)
    assert floors["feed_forward", "backward"] == pytest.approx(3 * 4 * product)
    assert floors["cross_entropy_sum", "forward"] == pytest.approx(
        3 * 1e3 * 2 * 10 * 64 * 100 / 1e6
    )
    assert floors["optimizer", "neither"] == pytest.approx(26 * 1000)
