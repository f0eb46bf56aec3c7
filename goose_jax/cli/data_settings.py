"""The flags that say which documents are read, and how."""

import dataclasses
from pathlib import Path

from goose_jax.chat import render_conversation
from goose_jax.data import DocumentSource, open_documents, open_standard_library


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentSettings:
    """Which documents are read, and how.

    Attributes:
      data: a text file, a JSONL file, a folder of both, or a folder that `save_to_disk` of Hugging
        Face's datasets wrote; `.gz` files are unpacked. By default the sources of this Python's
        standard library.
      pattern: which files of a folder are read: all whose names fit one of these, as in "*.txt".
      field: the field of JSONL and data sets that holds the text or the conversation; by default
        text, messages or conversations.
      strict: whether a file in a folder that is not UTF-8 text is an error; else it is left out.
    """

    data: Path | None = None
    pattern: tuple[str, ...] = ("*",)
    field: str | None = None
    strict: bool = False

    def open_documents(self) -> DocumentSource:
        """Opens the documents.

        Raises:
          OSError: if there is nothing at `data`.
          ValueError: if no file fits.
        """
        if self.data is None:
            return open_standard_library()
        return open_documents(
            self.data,
            patterns=self.pattern,
            field=self.field,
            render=render_conversation,
            strict=self.strict,
        )


__all__ = ["DocumentSettings"]
