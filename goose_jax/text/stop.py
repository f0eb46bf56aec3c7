"""Ends a stream of text at a given text."""

from collections.abc import Sequence


class TextStop:
    """Ends a stream of text before the first of several stop texts.

    While the end of the stream may be the beginning of a stop text, it is held back.

    Args:
      stops: the stop texts.

    Attributes:
      reached: whether a stop text has come. All later text is dropped.

    Raises:
      ValueError: if one of `stops` is empty.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise ValueError(f"stop must not be an empty text, got {stops!r}")
        self.reached = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """Adds text to the stream, and returns the text that certainly precedes any stop text."""
        if self.reached:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.reached = bool(found)
        end = min(found) if found else len(text) - self._beginning_at_end_of(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def finish(self) -> str:
        """Ends the stream, and returns the text that was held back."""
        return self._held

    def _beginning_at_end_of(self, text: str) -> int:
        """Returns the length of the longest end of `text` that a stop text begins with."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )


__all__ = ["TextStop"]
