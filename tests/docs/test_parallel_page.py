"""The code of docs/parallel.md runs."""

import pathlib
import re

import jax
import pytest

from goose_jax.parallel import AXES

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parallel.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_code_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    exec(compile("\n".join(blocks), "docs/parallel.md", "exec"), names)
    assert capsys.readouterr().out.startswith("P('fsdp', 'tensor') ")
    saved, loaded = names["model"], names["loaded"]
    assert jax.tree.structure(saved) == jax.tree.structure(loaded)
    assert loaded.head[...].sharding.mesh.shape["tensor"] == 4
    assert int(names["state"].step) == 2


def test_every_axis_is_in_the_table():
    for axis in AXES:
        assert f"\n| `{axis}` |" in PAGE
