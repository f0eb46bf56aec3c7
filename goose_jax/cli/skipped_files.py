"""Tells on stderr which files of a folder are left out."""

import sys
from pathlib import Path

import tqdm

_NAMED = 5


class SkippedFiles:
    """Names the first files that are left out, and counts all of them.

    Attributes:
      count: number of files so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, file: Path, why: str) -> None:
        """Takes note of a file and what is wrong with it."""
        self.count += 1
        if self.count <= _NAMED:
            tqdm.tqdm.write(f"left out: {file} {why}", file=sys.stderr)

    def tell_count(self) -> None:
        """Prints the number of files on stderr, if not all of them were named."""
        if self.count > _NAMED:
            print(f"{self.count} files were left out, which are not text", file=sys.stderr)


__all__ = ["SkippedFiles"]
