"""The protocol of tokenizers, and the decoding of a stream of tokens.

A character has up to four bytes in UTF-8, so a token may end in the middle of a character.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd".encode()
"""The bytes that an id which is not a token decodes to."""


class Tokenizer(Protocol):
    """Converts text to token ids, and token ids to bytes and text.

    The bytes of a token do not depend on its neighbours: `decode_bytes(a + b)` equals
    `decode_bytes(a) + decode_bytes(b)`. A stream of tokens can therefore be decoded in pieces.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids; all ids are less."""
        ...

    @property
    def end_of_document(self) -> int | None:
        """The id that ends a document, which decodes to nothing; None if there is none."""
        ...

    @property
    def leading_space(self) -> bool:
        """Whether `encode` adds a space before a text, and `decode` removes it."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text.

        Raises:
          ValueError: if the text cannot be encoded.
        """
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of token ids, the first of which begins a text. It never fails.

        Bytes that are not UTF-8 and ids that are not tokens become U+FFFD.
        """
        ...

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Returns the bytes of token ids anywhere in a text. Ids that are no tokens give U+FFFD."""
        ...


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of a text that follows other text, without a space before it.

    It differs from `tokenizer.encode` only for a tokenizer that adds such a space. If the space and
    the beginning of the text are one token, the space stays.

    Args:
      tokenizer: the tokenizer.
      text: the text. It may be empty.

    Raises:
      ValueError: if the text cannot be encoded.
    """
    tokens = tokenizer.encode(text)
    if tokenizer.leading_space:
        for candidate in (tokens, tokens[1:], tokenizer.encode(text.removeprefix(" "))):
            if tokenizer.decode_bytes(candidate) == text.encode():
                return candidate
    return tokens


class StreamingDecoder:
    """Decodes tokens as they arrive, and holds back incomplete characters.

    The pieces together equal the text that `tokenizer.decode` gives for all tokens at once, however
    the tokens are divided. To decode the continuation of a prompt, push the tokens of the prompt
    first.

    Args:
      tokenizer: tokenizer of the tokens.

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
        """Adds tokens, and returns the text that they complete. It never fails."""
        return self._without_leading_space(
            self._decoder.decode(self._tokenizer.decode_bytes(tokens))
        )

    def finish(self) -> str:
        """Ends the stream. Returns U+FFFD if the last character is incomplete, else no text."""
        return self._without_leading_space(self._decoder.decode(b"", final=True))

    def _without_leading_space(self, text: str) -> str:
        if text and self._leading_space:
            self._leading_space = False
            return text.removeprefix(" ")
        return text


__all__ = ["REPLACEMENT", "StreamingDecoder", "Tokenizer", "encode_continuation"]
