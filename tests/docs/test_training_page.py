"""The code of docs/training.md and examples/train.py run."""

import pathlib
import re
import runpy

import pytest

from goose_jax.training.optimizer import DECAYED_WEIGHTS, FASTER_PARAMETERS

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()


@pytest.mark.slow
def test_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names = {"__name__": "training_page"}
    exec(compile("\n".join(blocks), "docs/training.md", "exec"), names)
    out = capsys.readouterr().out
    assert "[[3 4 3 4 0]\n [5 6 7 8 9]]" in out or "[[5 6 7 8 9]\n [3 4 3 4 0]]" in out
    assert names["metadata"].step == 3
    assert names["loaded"].config.compute_dtype == "float32"


def test_every_decayed_parameter_is_named():
    row = next(line for line in PAGE.splitlines() if line.startswith("| weight decay"))
    for name in DECAYED_WEIGHTS:
        module, _, matrix = name.rpartition(".")
        assert module.replace("_", " ") in row
        assert matrix in row
    assert FASTER_PARAMETERS == ("time_mix.decay_base",)


@pytest.mark.slow
def test_the_example_learns():
    before, after = runpy.run_path(str(ROOT / "examples" / "train.py"))["main"](steps=20)
    assert 7.5 < before < 9
    assert after < before - 2  # 4.6 bits per byte after 20 steps
