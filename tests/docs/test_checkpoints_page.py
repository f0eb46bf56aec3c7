"""The code of docs/checkpoints.md runs, and its table is the key map."""

import pathlib
import re

import pytest

from goose_jax.checkpoints.layouts import FLA, LAYOUTS, OFFICIAL
from goose_jax.cli.main import main
from goose_jax.config import OFFICIAL_MODELS

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
MARKS = {"same": "", "transposed": " ᵀ", "flat": " ¹", "row": " ²"}


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/checkpoints.md", "exec"), {"__name__": "checkpoints"})
    main(["inspect", "model.pth"])
    assert "2 layers, width 64" in capsys.readouterr().out


def test_table_is_the_key_map():
    expected = []
    for pth, fla in zip(OFFICIAL.entries, FLA.entries, strict=True):
        row = "" if pth.row is None else f"[{pth.row}]"
        expected.append(
            f"| `{pth.parameter}{row}` | {', '.join(pth.axes)} | `{pth.name}`{MARKS[pth.form]} "
            f"| `{fla.name}`{MARKS[fla.form]} |"
        )
    table = PAGE[PAGE.index("| Parameter | Axes |") : PAGE.index("In `huggingface-x-x`")]
    assert re.findall(r"^\| `.*$", table, re.MULTILINE) == expected


def test_table_of_layouts_names_all_and_their_tensors():
    table = PAGE[PAGE.index("| Layout | Names |") : PAGE.index("Programs for training wrap")]
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \|", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(LAYOUTS)
    for layout, names in rows:
        known = [name for entry in LAYOUTS[layout].entries for name in entry.names(1)]
        for name in re.findall(r"`(.*?)`", names):
            assert name in known or name == "x_x", (layout, name)


def test_table_of_official_models_is_that_of_the_presets():
    table = PAGE[PAGE.index("| Preset | Newest file") : PAGE.index("`RWKV7Config.preset(")]
    assert re.findall(r"^\| \d.*$", table, re.MULTILINE) == [
        f"| {name} | `{model.file}` | {model.num_layers} | {model.hidden_size} "
        f"| {', '.join(map(str, model.ranks))} | {model.context_length} |"
        for name, model in OFFICIAL_MODELS.items()
    ]
    for page in (PAGE, README):
        for file in re.findall(
            r"^[^#\n]*hf download BlinkDL/rwkv7-g1 (\S+)\.pth", page, re.MULTILINE
        ):
            assert file in {model.file for model in OFFICIAL_MODELS.values()}
