"""Data sets of Hugging Face's package `datasets`, as `save_to_disk` writes them."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_OF_ONE = ("state.json", "dataset_info.json")
_OF_SPLITS = "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """Returns whether a folder looks like a data set, damaged or not, or one in splits."""
    if (path / _OF_SPLITS).is_file():
        return True
    present = [(path / name).is_file() for name in _OF_ONE]
    return all(present) or (any(present) and any(path.glob("*.arrow")))


def open_saved_dataset(path: Path) -> Any:
    """Opens a data set, whose rows stay on disk until they are asked for.

    Raises:
      ValueError: if it is damaged or divided into splits, or the package is missing.
    """
    if (path / _OF_SPLITS).is_file():
        raise ValueError(f"{path} is divided into splits: give one of {_splits(path)}")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{path} needs the package datasets: pip install 'goose-jax[datasets]'")
    import datasets  # an extra

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the package and its Arrow raise errors of many kinds
        raise ValueError(f"{path} cannot be read as a data set: {_line(error)}") from error
    return dataset


def read_rows(path: Path, start: int = 0) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yields the rows of a data set from number `start` on, and the number of each.

    Raises:
      ValueError: if the data set is damaged. The message names it, and the row.
    """
    dataset = open_saved_dataset(path)
    for row in range(start, len(dataset)):
        try:
            record = dataset[row]
        except Exception as error:
            raise ValueError(f"{path}, row {row}: cannot be read: {_line(error)}") from error
        yield record, row


def _splits(path: Path) -> str:
    file = path / _OF_SPLITS
    try:
        names = json.loads(file.read_bytes())["splits"]
        return ", ".join(str(path / name) for name in names)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error


def _line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]


__all__ = ["is_saved_dataset", "open_saved_dataset", "read_rows"]
