"""What a benchmark writes with `--json`, and how rows become tables."""

import json
import pathlib
import subprocess
import sys

import pytest

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
    (row,) = tables.TABLES["wkv7-recurrent"].derive([scan, kernel])
    assert (row["forward_ratio"], row["forward_backward_ratio"]) == (0.25, 1.0)
