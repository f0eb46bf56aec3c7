"""The end of a stream of text at a given text."""

from collections.abc import Sequence


class TextStop:
    """Cuts a stream of text off before the first of several texts.

    The end of the stream that may be the beginning of one of them is held back.

    Args:
      stops: texts, none of them empty.

    Attributes:
      reached: whether one of them was found; nothing comes after that.

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
        """What may be written now that more text has come."""
        if self.reached:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.reached = bool(found)
        end = min(found) if found else len(text) - self._beginning_at_end_of(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back when the stream ended."""
        return self._held

    def _beginning_at_end_of(self, text: str) -> int:
        """Length of the longest end of `text` that begins one of the stops."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )


__all__ = ["TextStop"]
