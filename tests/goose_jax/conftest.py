"""Settings of the tests of goose_jax."""

from collections.abc import Iterator

import jax
import pytest

from goose_jax.cli import train_devices


@pytest.fixture(scope="session", autouse=True)
def _one_device_for_training() -> Iterator[None]:
    """Lets `goose-jax train` without `--mesh` use one of the 8 devices, as most machines have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_devices, "default_devices", lambda: jax.devices()[:1])
        yield
