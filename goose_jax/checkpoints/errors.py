"""The error of all checkpoints, and how its message stays short."""

from collections.abc import Iterable

_SHOWN = 4  # names of one kind
_LONGEST = 80  # characters of a name
_LONGEST_CAUSE = 250  # characters of a library's message


class CheckpointError(ValueError):
    """A path is not a checkpoint, the checkpoint is damaged, or it does not fit the model."""


def shorten_name(name: object, longest: int = _LONGEST) -> str:
    """Returns a name from a file, cut and with escapes in place of what cannot be printed."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def cause(error: Exception) -> str:
    """Returns the message of a library's error, which may hold a part of the file, cut."""
    return shorten_name(error, _LONGEST_CAUSE)


def list_names(names: Iterable[object]) -> str:
    """Returns the first few of the names, and how many others there are."""
    names = list(names)
    shown = ", ".join(shorten_name(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"


__all__ = ["CheckpointError", "cause", "list_names", "shorten_name"]
