"""Every formula of docs/rwkv7.md computes what it should, and a changed one makes a test fail."""

import re
import warnings

import jax
import numpy as np
import pytest

from pallas_kernels import wkv7
from tests.docs import document, measurements, scenarios
from tests.docs.scenarios import scenario

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


@pytest.mark.parametrize("name", scenarios.BUILDERS)
def test_blocks_compute_what_the_definitions_give(name):
    scenario(name).run()


def test_every_formula_is_a_block_that_runs():
    for info, _ in document.fences():
        assert re.fullmatch(r"python \w+", info), f"a fenced block without a name: {info!r}"
    assert len(document.fences()) == len(document.blocks()), "two blocks share a name"
    used = {block for name in scenarios.BUILDERS for block in scenario(name).blocks}
    assert set(document.blocks()) == used
    assert not re.search(r"^(    |\t)(?!.*\|)\S.*=", document.prose(), re.MULTILINE)


def test_formulas_in_the_text_are_those_of_the_blocks():
    code = "\n".join(document.blocks().values())
    spans = re.findall(r"`([^`]+)`", document.prose())
    for span in spans:
        assert "=" not in span or span in code, f"no block computes {span!r}"
    text = re.sub(r"`[^`]+`", "", document.prose())
    assert "=" not in text, "a formula outside of code"


@pytest.mark.parametrize("block", document.blocks())
def test_damaged_formulas_are_noticed(block):
    judges = [scenario(n) for n in scenarios.BUILDERS if block in scenario(n).blocks]
    survivors, number = [], 0
    for code, fault in document.mutants(document.blocks()[block]):
        number += 1
        for judge in judges:
            try:
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    judge.run({block: code})
            except Exception:
                break
        else:
            survivors.append(fault)
    assert number > 0
    assert not survivors, "\n".join(survivors)


def test_the_definition_is_that_of_the_operator():
    given, results = scenarios.sequential(5)
    tokens = [given[name][None, :, None] for name in scenarios.TOKENS]  # [B, T, H, _]
    with jax.enable_x64(True):
        o, final_state = wkv7(
            *tokens,
            scale=scenarios.SCALE,
            initial_state=given["S0"][None, None],
            implementation="reference",
        )
    scenarios.assert_equal("o", o[0, :, 0], results["o"])
    scenarios.assert_equal("final_state", final_state[0, 0], results["S1"])


def same_digits(cell: str, measured: float) -> bool:
    if not cell:
        return bool(np.isnan(measured))
    cell = cell.replace(",", "")
    digits = len(cell.partition(".")[2])
    return abs(float(cell) - measured) <= 0.501 * 10.0**-digits


def same_magnitude(cell: str, measured: float) -> bool:
    if cell.startswith("<"):
        return measured < float(cell[1:])
    return 0.1 < measured / float(cell) < 10


@pytest.mark.parametrize("name", document.tables())
def test_tables_are_as_measured(name):
    exact = name in measurements.EXACT
    agree = same_digits if exact else same_magnitude
    rows = (measurements.EXACT | measurements.ROUNDING)[name]()
    printed = document.tables()[name]
    assert len(printed) == len(rows)
    for cells, row in zip(printed, rows, strict=True):
        for cell, measured in zip(cells[-len(row) :], row, strict=True):
            assert agree(cell, measured), f"{cells}: {measured:.3g} instead of {cell!r}"


def test_all_measured_tables_are_printed():
    assert set(document.tables()) == {*measurements.EXACT, *measurements.ROUNDING}
