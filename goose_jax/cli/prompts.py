"""Prompts from the command line, from files and from stdin."""

import sys
from collections.abc import Sequence
from pathlib import Path

_TEXTS = ("--prompt", "--system")


def join_texts(arguments: Sequence[str]) -> list[str]:
    """Joins `--prompt TEXT` to `--prompt=TEXT` where the text begins with a dash.

    Such a text would be taken for another flag. `--stop TEXT` is joined if it begins with one dash:
    two may be another flag.

    Args:
      arguments: the arguments of the command line.
    """
    joined: list[str] = []
    for argument in arguments:
        before = joined[-1] if joined else ""
        is_stop = before == "--stop" and not argument.startswith("--")
        if argument.startswith("-") and (before in _TEXTS or is_stop):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def read_prompt(prompt: str, file: Path | None) -> str:
    """Returns the prompt of `--prompt` or of `--prompt-file`.

    Args:
      prompt: the text of `--prompt`; empty if it was not given.
      file: a file of UTF-8 text; "-" for stdin; None if it was not given.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if both are given, or the file is not UTF-8 text.
    """
    if file is None:
        return prompt
    if prompt:
        raise ValueError("give either --prompt or --prompt-file, not both")
    is_stdin = str(file) == "-"
    data = sys.stdin.buffer.read() if is_stdin else file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = "stdin" if is_stdin else str(file)
        raise ValueError(
            f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        ) from error


__all__ = ["join_texts", "read_prompt"]
