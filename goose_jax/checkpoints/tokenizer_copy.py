"""Keeps the files of a tokenizer in the folder of what was trained with it."""

from pathlib import Path

from goose_jax.text import tokenizer_files


def embed_tokenizer(name: str | None) -> tuple[str | None, dict[str, bytes]]:
    """Returns what a folder records and holds of a tokenizer, so that it needs no other file.

    Args:
      name: name or path of the tokenizer; None if it is unknown.

    Returns:
      name: the name to record: that of the main file in the folder, or `name` if the tokenizer has
        no file.
      files: contents of the files by name.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if `name` is a folder that holds no tokenizer or several.
    """
    files = {} if name is None else tokenizer_files(name)
    contents = {copy: file.read_bytes() for copy, file in files.items()}
    return next(iter(files), name), contents


def locate_tokenizer(recorded: str | None, folder: Path) -> str | None:
    """Returns the path of the tokenizer file that a folder records and holds, or `recorded`."""
    if recorded is None or Path(recorded).name != recorded or not (folder / recorded).is_file():
        return recorded
    return str((folder / recorded).absolute())


__all__ = ["embed_tokenizer", "locate_tokenizer"]
