"""Checks that `goose-jax train` makes before it makes or reads anything."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from goose_jax.cli.data_settings import check_field
from goose_jax.cli.model_devices import mesh_named
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.data import open_documents
from goose_jax.data.binidx import is_binidx
from goose_jax.generation.validation import SEEDS
from goose_jax.parallel import parse_mesh
from pallas_kernels import NotServed
from pallas_kernels.dispatch import DEVICE_CHECKS


def check_before_training(settings: TrainSettings) -> None:
    """Checks the settings of a run against the machine and its files.

    Args:
      settings: complete settings.

    Raises:
      OSError: if there is no data.
      ValueError: if a setting does not fit; the message names its flag.
      NotServed: if the implementation does not serve the device.
    """
    is_new = settings.resume is None
    if (is_new or settings.sample_length) and settings.seed >= SEEDS:
        raise ValueError(f"--seed must lie in 0..2**32-1, got {settings.seed}")
    if settings.mesh is not None:
        with mesh_named(settings.mesh):
            parse_mesh(settings.mesh)
    if (check := DEVICE_CHECKS.get(settings.implementation or "")) is not None:
        check()
    if is_new:
        check_folder(f"--out {settings.out}", settings.out)
        _check_field(settings)


def check_folder(flag: str, folder: Path) -> None:
    """Checks that a folder exists or can be made.

    Args:
      flag: the flag with its value, for the error.
      folder: path of the folder.

    Raises:
      ValueError: if a file is in the way; the message names the flag.
    """
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.exists() and not there.is_dir():
        raise ValueError(f"{flag}: {there} is a file, not a folder")


def _check_field(settings: TrainSettings) -> None:
    if settings.field is None:
        return
    sources = []
    if settings.data is None or not is_binidx(settings.data):
        sources.append(settings.open_documents())
    if settings.held_out is not None:
        sources.append(open_documents(settings.held_out, patterns=settings.pattern))
    check_field(settings.field, sources)


@contextlib.contextmanager
def refusals_named(settings: TrainSettings) -> Iterator[None]:
    """Raises a `ValueError` that names `--implementation` if that does not serve the training."""
    try:
        yield
    except NotServed as error:
        if settings.implementation is None:  # a bug: another one should have served
            raise
        raise ValueError(
            f"--implementation {settings.implementation} cannot run this training: {error}"
        ) from error


def check_warmup(settings: TrainSettings, typed: set[str]) -> None:
    """Checks that a warm-up that was not typed is shorter than the run.

    Args:
      settings: settings after flags, before `with_defaults`.
      typed: the names of the flags that were typed.

    Raises:
      ValueError: if it is not; the message names the file that it comes from.
    """
    steps, warmup = settings.steps, settings.warmup_steps
    source = settings.config or settings.resume
    if source is None or "warmup_steps" in typed or steps is None or warmup is None:
        return
    if steps <= warmup:
        hint = "" if settings.config is None else "; give --warmup-steps, too"
        raise ValueError(
            f"--steps={steps} must be more than the {warmup} steps of warm-up in {source}{hint}"
        )


def check_steps_left(settings: TrainSettings, checkpoint: Path) -> None:
    """Checks that a run does not end before the checkpoint that it is resumed from.

    Raises:
      ValueError: if it does; the message names `--steps`.
    """
    if not checkpoint.name.isdecimal():  # a copy with a name of the user's
        return
    made, steps = int(checkpoint.name), settings.steps or 0
    if made > steps:
        raise ValueError(f"--steps={steps} must be more than the {made} steps of {checkpoint}")


__all__ = [
    "check_before_training",
    "check_folder",
    "check_steps_left",
    "check_warmup",
    "refusals_named",
]
