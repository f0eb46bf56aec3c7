"""What a tokenizer is here, and the decoding of a stream of its tokens.

UTF-8 spreads a character over up to four bytes, so a token may end in the middle of one.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd".encode()
"""The bytes of an id that is no token."""


class Tokenizer(Protocol):
    """What every tokenizer does: text to ids and back, through bytes.

    The bytes of tokens do not depend on their neighbours: `decode_bytes(a + b)` is
    `decode_bytes(a) + decode_bytes(b)`. Therefore a stream can be decoded piece by piece.
    """

    @property
    def vocab_size(self) -> int:
        """All ids are below this."""
        ...

    @property
    def end_of_document(self) -> int | None:
        """The id that ends a document; it decodes to nothing. None if there is none."""
        ...

    @property
    def leading_space(self) -> bool:
        """Whether `encode` puts a space before a text, which decoding takes off its beginning."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
          ValueError: if the text cannot be expressed.
        """
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids from the beginning of a text; never fails.

        What is not UTF-8 becomes U+FFFD, and so does each id that is no token.
        """
        ...

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of token ids from anywhere in a text; an id that is no token gives U+FFFD."""
        ...


class StreamingDecoder:
    """Turns tokens into text as they arrive, and holds back incomplete characters.

    The pieces together are what `tokenizer.decode` makes of all tokens at once, wherever the stream
    was cut. To decode what continues a prompt, push the prompt's tokens first.

    Args:
      tokenizer: of the tokens.

    Example:
      >>> decoder = StreamingDecoder(ByteTokenizer())
      >>> decoder.push([0xC3 + 1])  # the first of two bytes
      ''
      >>> decoder.push([0xA9 + 1])
      'é'
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._leading_space = tokenizer.leading_space

    def push(self, tokens: Sequence[int]) -> str:
        """The text that more tokens complete; never fails."""
        return self._without_leading_space(
            self._decoder.decode(self._tokenizer.decode_bytes(tokens))
        )

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became complete, or nothing."""
        return self._without_leading_space(self._decoder.decode(b"", final=True))

    def _without_leading_space(self, text: str) -> str:
        if text and self._leading_space:
            self._leading_space = False
            return text.removeprefix(" ")
        return text


__all__ = ["REPLACEMENT", "StreamingDecoder", "Tokenizer"]
