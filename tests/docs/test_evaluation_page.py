"""The code of docs/evaluation.md runs, and its table lists the adapter's arguments."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_scores(capsys):
    scores, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)  # the second needs lm_eval
    exec(compile(scores, "docs/evaluation.md", "exec"), {"__name__": "evaluation_page"})
    assert re.fullmatch(r"(-\d+\.\d+ (True|False)\n){2}", capsys.readouterr().out)


def test_table_lists_the_arguments_of_the_adapter():
    source = ast.parse((ROOT / "goose_jax" / "evaluation" / "harness.py").read_text())
    (adapter,) = [node for node in source.body if isinstance(node, ast.ClassDef)]
    arguments = next(node for node in adapter.body if isinstance(node, ast.FunctionDef)).args
    names = [argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs)]
    table = re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)
    assert [name for name in names if name not in ("max_batch_size", "device")] == table
    assert "`max_batch_size`" in PAGE
    assert "`--device`" in PAGE
