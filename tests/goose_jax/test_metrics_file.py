"""Damaged lines in the metrics of a run that is resumed."""

import json
import resource

import pytest

from goose_jax.checkpoints import CheckpointError
from goose_jax.checkpoints.native import checkpoint_path
from goose_jax.training import RunDirectory

GOOD = '{"step": 1, "loss": 2.5, "tokens": 48}'
DAMAGED = {
    b"": "Expecting value",
    b"{": "Expecting property name",
    b"hello": "Expecting value",
    b'{"step": 4, "lo': "Unterminated string",
    b'{"step": 4} {"step": 5}': "Extra data",
    b'{"step": 4,}': "Illegal trailing comma|Expecting property name",
    b"{'step': 4}": "Expecting property name",
    b'{"step": 4}\0': "Extra data",
    b"\0" * 50: "Expecting value",
    b'{"step": 4, "\xff": 1}': "can't decode byte 0xff",
    b"\xff\xfe{\0}\0": "can't decode byte 0xff",
    b"\xef\xbb\xbf{}": "BOM",
    b"[" * 10**5: "recursion",
    b"x" * 10**6: "Expecting value",
    b"null": "must be an object of numbers, got None",
    b"[4]": r"must be an object of numbers, got \[4\]",
    b'"step"': "must be an object of numbers, got 'step'",
    b'["' + b"x" * 10**6 + b'"]': r"must be an object of numbers, got \['xxx",
    b"{}": r"has no step, only \[\]",
    b'{"loss": 2.5}': r"has no step, only \['loss'\]",
    b'{"step": null}': "step must be an integer of at least 0, got None",
    b'{"step": "3"}': "step must be an integer of at least 0, got '3'",
    b'{"step": 1.5}': "step must be an integer of at least 0, got 1.5",
    b'{"step": 1.0}': "step must be an integer of at least 0, got 1.0",
    b'{"step": true}': "step must be an integer of at least 0, got True",
    b'{"step": -1}': "step must be an integer of at least 0, got -1",
    b'{"step": [3]}': r"step must be an integer of at least 0, got \[3\]",
    b'{"step": Infinity}': "step must be an integer of at least 0, got inf",
    b'{"step": 1' + b"0" * 5000 + b"}": "4300 digits",
    b'{"step": 4, "loss": "x"}': "loss must be a finite number, got 'x'",
    b'{"step": 4, "loss": NaN}': "loss must be a finite number, got nan",
    b'{"step": 4, "loss": true}': "loss must be a finite number, got True",
    b'{"step": 4, "loss": 1' + b"0" * 400 + b"}": "loss must be a finite number, got 1000",
    b'{"step": 4, "seconds": -1e999}': "seconds must be a finite number, got -inf",
    b'{"step": 4, "held_out_bits_per_byte": null}': "held_out_bits_per_byte must be a finite",
    b'{"step": 4, "held_out_bits_per_byte": [1]}': "held_out_bits_per_byte must be a finite",
    b'{"step": 4, "\\ud800' + b"y" * 1000 + b'": {}}': "yyy.* must be a finite number, got {}",
}


@pytest.fixture
def run(tmp_path):
    run = RunDirectory.create(tmp_path, "fox", {})
    for step in (2, 4, 6):
        checkpoint_path(run.path, step).mkdir(parents=True)
    return run


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:30]))
def test_a_damaged_line_is_named_before_anything_is_moved(run, line):
    content = GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode() + b"\n"
    run.metrics_file.write_bytes(content)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(CheckpointError, match=DAMAGED[line]) as error:
        run.rewind(2)
    text = str(error.value)
    assert text.startswith(f"{run.metrics_file}:2 is no line of metrics, remove it: ")
    assert len(text) < 500
    assert text.isprintable()
    assert sorted(run.path.rglob("*")) == before
    assert run.metrics_file.read_bytes() == content
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2"):
        _ = run.best_checkpoint


def test_a_run_is_rewound(run):
    for step in range(1, 7):
        run.log({"step": step, "loss": 2.0})
    whole = run.metrics_file.read_bytes()
    folder = run.rewind(4)
    assert [int(path.name) for path in run.checkpoints] == [2, 4]
    assert sorted(path.name for path in folder.iterdir()) == ["00000006", "metrics.jsonl"]
    assert (folder / "metrics.jsonl").read_bytes() == whole
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    assert run.rewind(4) is None
    assert run.rewind(2).name == "2"


def test_a_full_disk_while_a_run_is_rewound(run):
    """The largest size of a file stands for a full disk. Nothing has moved, nothing is left."""
    for step in range(1, 100):
        run.log({"step": step, "loss": 2.0})
    before = sorted(run.path.rglob("*"))
    whole = run.metrics_file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, len(whole) // 4, len(whole) - 1):  # for neither, or for the first file only
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(OSError, match=r"File too large.*metrics.jsonl"):
                run.rewind(5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path for path in sorted(run.path.rglob("*")) if path.name != "set_aside"] == before
        assert run.metrics_file.read_bytes() == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True, [1.0]])
def test_only_numbers_are_logged(run, value):
    run.log({"step": 1})
    with pytest.raises(ValueError, match="loss must be a finite number"):
        run.log({"step": 2, "loss": value})
    with pytest.raises(ValueError, match="step must be an integer"):
        run.log({"step": value})
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == [{"step": 1}]
