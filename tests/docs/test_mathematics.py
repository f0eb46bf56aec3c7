"""The mathematics that the site shows beside the code of docs/rwkv7.md says what the code says."""

import ast

import pytest

from tests.docs import document
from website.mathematics import NotMathematics, formulas

CODE_ONLY = {
    # Loops that build an inverse or blocks, places of tokens, a choice of functions, a scatter.
    *("doubling", "substitution", "blockwise", "pairs_of_blocks", "segments", "align"),
    *("low_rank", "low_rank_gradient", "cross_entropy_gradient"),
}


def latex(code):
    return [(depth, formula) for depth, formula, _ in formulas(code)]


def test_blocks_have_mathematics():
    without = set()
    for name, code in document.blocks().items():
        try:
            assert all("=" in formula or "for" in formula for _, formula in latex(code))
        except NotMathematics:
            without.add(name)
    assert without == CODE_ONLY


def test_formulas_are_those_of_the_paper():
    assert latex("S1 = keep[:, None] * S0 + k_exit.T @ v") == [
        (
            0,
            r"\text{S1} = \operatorname{diag}(\text{keep}) \, \text{S0} "
            r"+ k_{\text{exit}}^{\intercal} \, v",
        )
    ]
    assert latex("y = scale * ((a + b) @ c)") == [
        (0, r"y = \text{scale} \cdot \left(a + b\right) \, c")
    ]
    assert latex("dk = np.exp(-g) * np.tril(A, -1)[t]") == [
        (0, r"\text{d}k = e^{-g} \odot \operatorname{tril}_{-1}\left(A\right)_{t}")
    ]


@pytest.mark.slow
def test_every_changed_operation_changes_the_mathematics():
    """So no operator, constant or name of the code is missing in the formula."""
    hidden, compared = [], 0
    for name, code in document.blocks().items():
        if name in CODE_ONLY:
            continue
        shown = latex(ast.unparse(ast.parse(code)))
        for wrong, fault in document.mutants(code):
            try:
                compared += 1
                if latex(wrong) == shown:
                    hidden.append(fault)
            except NotMathematics:
                pass
    assert compared > 900
    # Sizes of arrays of zeros, and the axis of a cumulative sum, are not shown.
    unseen = [x for x in hidden if "np.zeros" not in x and "cumsum" not in x]
    assert not unseen, unseen


@pytest.mark.parametrize(
    "code", ["x = {1: 2}", "while True:\n    x = 1", "print(x)", "x = np.fft(y)"]
)
def test_unknown_statements_are_refused(code):
    with pytest.raises(NotMathematics):
        formulas(code)
