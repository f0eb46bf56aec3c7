"""What commands say if memory cannot be had."""

import contextlib
import re
from collections.abc import Iterator

import jax

from goose_jax.cli.train_settings import TrainSettings

MORE_MEMORY = {
    "train": "a smaller --batch-size with more --microbatches makes the same step with less; "
    "--remat projections and --remat full need less, too",
    "tokenize": "fewer --workers need less",
    "evaluate": "a smaller --batch-size, --sequence-length or --dtype needs less",
    "generate": "a smaller --dtype needs less, and --mesh divides the model over devices",
    "chat": "a smaller --dtype needs less, and --mesh divides the model over devices",
    "convert": "a smaller --dtype needs less",
    "merge": "a smaller --dtype needs less",
}
"""For each command the flags with which it needs less memory. `inspect` has none."""

_SMALLER_MODEL = (
    "the parameters alone do not fit: a smaller --hidden-size, --intermediate-size, --num-layers "
    "or --vocab-size needs less, and --mesh fsdp=N divides them over N devices"
)
_SMALLER_TUNING = {
    "full": "--tune lora and --tune state need less, and --mesh fsdp=N divides the model over N "
    "devices",
    "lora": "a smaller --frozen-dtype or --lora-rank needs less, and --mesh fsdp=N divides the "
    "model over N devices",
    "state": "a smaller --frozen-dtype needs less, and --mesh fsdp=N divides the model over N "
    "devices",
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\.? ?([KMGTP]i?B|bytes)\b")


class ParametersError(MemoryError):
    """The parameters of a model do not fit. The message says what would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that host or device have too little memory."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, MemoryError)


def out_of_memory(error: BaseException, command: str) -> str:
    """Returns one line for an error of memory in a command, with what would help."""
    if isinstance(error, ParametersError):
        return str(error)
    return _describe(error, MORE_MEMORY.get(command, ""))


@contextlib.contextmanager
def parameters_fit(settings: TrainSettings) -> Iterator[None]:
    """Raises `ParametersError` in place of other errors of memory: no batch is there yet."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, ParametersError) or not is_out_of_memory(error):
            raise
        tuned = settings.from_ is not None
        advice = _SMALLER_TUNING[settings.tune or "full"] if tuned else _SMALLER_MODEL
        raise ParametersError(_describe(error, advice)) from error


def _describe(error: BaseException, advice: str) -> str:
    size = _SIZE.search(str(error))
    needed = f"{size[1]} {size[2]} could not be had" if size else "there is not enough"
    return f"out of memory: {needed}" + (f"; {advice}" if advice else "")


__all__ = ["MORE_MEMORY", "ParametersError", "is_out_of_memory", "out_of_memory", "parameters_fit"]
