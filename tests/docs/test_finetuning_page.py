"""The code of docs/finetuning.md runs, and its numbers are the command's defaults."""

import pathlib
import re

import jax
import numpy as np
import pytest

from goose_jax.cli.train_defaults import with_defaults
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.training.lora import LORA_WEIGHTS

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()


@pytest.mark.slow
def test_code_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"__name__": "finetuning_page"}
    exec(compile(block, "docs/finetuning.md", "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert losses[2] < losses[0]
    np.testing.assert_array_equal(
        names["merged"].blocks.time_mix.key[...], names["changed"]["blocks"]["time_mix"]["key"]
    )
    assert jax.tree.leaves(names["state"].params)[0].dtype == "float32"


def test_defaults_are_those_of_the_command():
    for tune in ("full", "lora", "state"):
        settings = with_defaults(TrainSettings(from_=pathlib.Path("x"), tune=tune))
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{tune}` |"))
        rate = settings.learning_rate
        assert float(row.split("|")[4]) == rate
        assert settings.final_learning_rate == rate / 10
        assert settings.weight_decay == 0
        assert settings.sequence_length == 512
        if tune == "lora":
            rank, alpha = settings.lora_rank, settings.lora_alpha
            assert f"`--lora-rank` {rank}\nand `--lora-alpha` {alpha:g}." in PAGE


def test_every_adapted_matrix_is_named():
    for module, names in LORA_WEIGHTS.items():
        start = PAGE.index(module.replace("_", " "), PAGE.index("## LoRA"))
        listed = PAGE[PAGE.index("(", start) + 1 : PAGE.index(")", start)]
        assert listed.split() == ", ".join(names).split()
