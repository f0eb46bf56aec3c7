"""Fixtures of the operators' tests."""

import faulthandler
import os
from collections.abc import Iterator

import pytest

SECONDS_UNTIL_HANGING = 300


@pytest.fixture
def no_races_and_no_hanging(capfd: pytest.CaptureFixture) -> Iterator[None]:
    """For interpreted kernels: fails on a race, ends the process where a barrier is never reached.

    Some releases of JAX raise on a race, others only print it.
    """
    with capfd.disabled():
        stderr = os.dup(2)  # pytest's own is lost when the process ends
    faulthandler.dump_traceback_later(SECONDS_UNTIL_HANGING, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
