"""The code of docs/data.md runs, and its flags exist."""

import dataclasses
import pathlib
import re

from goose_jax.cli.tokenize import TokenizeFlags
from goose_jax.cli.train_settings import TrainSettings

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/data.md", "exec"), {"__name__": "data_page"})


def test_every_flag_exists():
    classes = (TokenizeFlags, TrainSettings)
    flags = {field.name for kind in classes for field in dataclasses.fields(kind)}
    named = re.findall(r"(?<![-\w])--([a-z][a-z-]*)", PAGE)
    assert len(named) > 10
    assert {name.replace("-", "_") for name in named} <= flags | {"from"}
