"""Finds the settings that the flags of `goose-jax train` change: of a file, or of a resumed run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from goose_jax.cli.flags import option
from goose_jax.cli.settings_file import NOT_RECORDED, from_values
from goose_jax.cli.train_defaults import with_defaults
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.training import RunDirectory
from goose_jax.training.yaml_file import read_yaml

_MAY_CHANGE = (
    *("steps", "data", "held_out", "prefetch", "data_workers", "from_"),
    *("compute_dtype", "remat", "unroll_layers", "implementation"),
    *("precision", "log_every", "tensorboard", "wandb", "peak_tflops", "non_finite"),
    *("evaluate_every", "save_every", "keep", "keep_best", "keep_every"),
    *("plot", "prompt", "sample_length", "mesh"),
)
"""The settings whose values may change when a run is resumed.

The data and the model of `from_` may have moved, but the trainer compares what they hold.
"""


def settings_before_flags(arguments: Sequence[str]) -> TrainSettings:
    """Returns the settings of `--config` or of the run of `--resume`, or those of no flag at all.

    Args:
      arguments: the arguments of the command line.

    Raises:
      OSError: if a file cannot be read, or there is no run.
      ValueError: if a file is damaged, a setting in it is out of range, or both flags are given.
    """
    config, resume = _value_of("--config", arguments), _value_of("--resume", arguments)
    if config is not None and resume is not None:
        raise ValueError("--config cannot be given with --resume: a run has its settings")
    if config is not None:
        return from_values(read_yaml(Path(config)), Path(config))
    if resume is not None:
        return _recorded(RunDirectory.open(resume))
    return TrainSettings()


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    found = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == flag:
            found = following
        elif argument.startswith(f"{flag}="):
            found = argument.removeprefix(f"{flag}=")
    return found or None


def _recorded(run: RunDirectory) -> TrainSettings:
    return from_values(run.read_settings(), run.settings_file)


def check_changes(settings: TrainSettings, run: RunDirectory) -> None:
    """Checks that only settings that may change differ from those of the run.

    Args:
      settings: complete settings.
      run: the run.

    Raises:
      ValueError: if others are different; the message names their flags.
    """
    before = with_defaults(_recorded(run))
    changed = [
        option(field.name)
        for field in dataclasses.fields(settings)
        if field.name not in (*NOT_RECORDED, *_MAY_CHANGE)
        and getattr(settings, field.name) != getattr(before, field.name)
    ]
    if changed:
        raise ValueError(f"a resumed run keeps its settings; leave out {', '.join(changed)}")


__all__ = ["check_changes", "settings_before_flags"]
