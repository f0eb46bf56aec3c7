"""Decodes the continuation of a prompt up to a stop text."""

from collections.abc import Sequence

from goose_jax.text.stop import TextStop
from goose_jax.text.tokenizer import StreamingDecoder, Tokenizer


class TextStream:
    """Turns the new tokens of a text into pieces of text, which end before the first stop text.

    Args:
      tokenizer: tokenizer of the tokens.
      prompt: tokens before the new ones. Their text is not returned.
      stop: the stop texts.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: TextStop):
        self._decoder = StreamingDecoder(tokenizer)
        self._decoder.push(prompt)
        self._stop = stop

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stop.reached

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens, and returns the text that is complete."""
        return self._stop.push(self._decoder.push(tokens))

    def finish(self, *, complete: bool = True) -> str:
        """Ends the stream, and returns the text that was held back.

        Args:
          complete: whether the text ended by itself, not at a limit. If not, an incomplete
            character at its end is dropped.
        """
        tail = self._stop.push(self._decoder.finish()) if complete else ""
        return tail + self._stop.finish()


__all__ = ["TextStream"]
