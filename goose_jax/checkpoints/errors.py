"""The error of all checkpoints, and how its message stays short."""

from collections.abc import Iterable, Sequence

_SHOWN = 4  # names of one kind, and misfits
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


def list_problems(
    missing: Sequence[str], unknown: Sequence[str], misfits: Sequence[str]
) -> list[str]:
    """Returns what is wrong with the tensors of a file, a few words for each kind.

    Args:
      missing: names of tensors that the file lacks.
      unknown: names of tensors that do not belong there.
      misfits: for each tensor of a wrong shape or dtype, what is wrong with it.
    """
    problems = [f"{len(missing):,} missing: {list_names(missing)}"] if missing else []
    problems += [f"{len(unknown):,} unknown: {list_names(unknown)}"] if unknown else []
    problems += misfits[:_SHOWN]
    if len(misfits) > _SHOWN:
        problems.append(f"{len(misfits) - _SHOWN:,} more of a wrong shape or dtype")
    return problems


__all__ = ["CheckpointError", "cause", "list_names", "list_problems", "shorten_name"]
