import pytest

from pallas_kernels.dispatch import dispatch


def refuse(x: int) -> str:
    raise NotImplementedError(f"not for {x=}")


def accept(x: int) -> str:
    return f"took {x}"


def fail(x: int) -> str:
    raise ValueError(f"{x=} is wrong")


def test_none_takes_the_first_that_can():
    assert dispatch("op", {"fast": refuse, "plain": accept}, None, 1) == "took 1"
    assert dispatch("op", {"plain": accept, "fast": fail}, None, x=2) == "took 2"


def test_a_named_implementation_never_falls_back():
    with pytest.raises(NotImplementedError, match="not for x=1"):
        dispatch("op", {"fast": refuse, "plain": accept}, "fast", 1)


def test_errors_of_the_caller_are_not_swallowed():
    with pytest.raises(ValueError, match="x=1 is wrong"):
        dispatch("op", {"fast": fail, "plain": accept}, None, 1)


def test_all_refusals_are_told():
    with pytest.raises(ExceptionGroup, match="op: no implementation serves this call") as error:
        dispatch("op", {"fast": refuse, "faster": refuse}, None, 1)
    notes = [note for refusal in error.value.exceptions for note in refusal.__notes__]
    assert notes == [f"while trying op with implementation={n!r}" for n in ("fast", "faster")]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"op: implementation='fastest' is unknown.*\['fast'\]"):
        dispatch("op", {"fast": accept}, "fastest", 1)
