"""The code of docs/model.md runs, and its table lists all parameters."""

import pathlib
import re

import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "model.md").read_text()
ROW = re.compile(
    r"^\| `([a-z_.]+)` \| ([^|]+) \| `([^|]+)` ?(ᵀ?) \|[^|]+\| (\w+) \|$", re.MULTILINE
)


@pytest.mark.slow
def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "docs/model.md", "exec"), {"__name__": "model_page"})


def test_table_lists_every_parameter():
    sizes = {"vocab": 7, "C": 96, "H": 3, "K": 32, "F": 40, "6": 6}
    ranks = {"decay_rank": 1, "alpha_rank": 2, "value_rank": 3, "gate_rank": 4}
    config = RWKV7Config(
        vocab_size=7, hidden_size=96, num_layers=5, head_size=32, intermediate_size=40, **ranks
    )
    model = nnx.eval_shape(lambda: nnx.state(RWKV7(config, rngs=nnx.Rngs(0))))
    actual = {".".join(path): value.shape for path, value in nnx.to_flat_state(model)}

    listed = {}
    for path, shape, official, transposed, group in ROW.findall(PAGE):
        axes = [(sizes | ranks)[axis.strip()] for axis in shape.split(",")]
        listed[path] = (5, *axes) if path.startswith("blocks.") else (*axes,)
        # The official rule: decay exactly the matrices called `.weight`; w0 learns twice as fast.
        is_matrix = official.endswith(".weight") and len(axes) == 2 and "ln_x" not in official
        assert group == ("decayed" if is_matrix else "fast" if official == "att.w0" else "plain")
        assert bool(transposed) == (is_matrix and path != "embedding")
    assert listed == actual
