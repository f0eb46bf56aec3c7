"""The code of the tutorials runs, and their claims hold."""

import math
import pathlib
import re

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.md"))


def run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    names = {"__name__": page.stem}
    exec(compile("\n".join(blocks), f"docs/tutorials/{page.name}", "exec"), names)
    return names


CLAIMS = {
    "fine-tune": lambda names: names["losses"][-1] < names["losses"][0] - 1,
    "from-fla": lambda names: names["model"].config.num_layers == 2,
    "from-rwkv-lm": lambda names: int(names["state"].step) == 3,
    "long-contexts": lambda names: (
        names["devices"] == 2 and abs(float(names["metrics"].loss) - math.log(257)) < 0.7
    ),
    "resets-in-a-scan": lambda names: sum(names["history"][-20:]) / 20 > 0.9,
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_code_runs(page):
    assert CLAIMS[page.stem](run(page))
