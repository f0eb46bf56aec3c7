"""Text as bytes, and the decoding of a stream of tokens.

UTF-8 spreads a character over up to four bytes, so a token may end in the middle of one.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd".encode()


class ByteTokenizer:
    """One token per byte of the text's UTF-8: id = byte + 1; id 0 ends a document.

    Attributes:
      vocab_size: 257.
      end_of_document: 0; also what padding looks like. It decodes to nothing.
    """

    vocab_size = 257
    end_of_document = 0

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
          UnicodeEncodeError: if the text holds half a surrogate pair, which UTF-8 cannot express.
        """
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes, valid UTF-8 or not."""
        return [byte + 1 for byte in data]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids; never fails.

        What is not UTF-8 becomes U+FFFD, and so does each id that is no token.
        """
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of token ids, exactly; an id that is no token gives those of U+FFFD."""
        return b"".join(self._bytes_of(int(token)) for token in tokens)

    def _bytes_of(self, token: int) -> bytes:
        if token == self.end_of_document:
            return b""
        return bytes([token - 1]) if 0 < token < self.vocab_size else _REPLACEMENT


class DecodesBytes(Protocol):
    """A tokenizer that `StreamingDecoder` can use."""

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of token ids; never fails."""
        ...


class StreamingDecoder:
    """Turns tokens into text as they arrive, and holds back incomplete characters.

    The pieces together are what `tokenizer.decode` makes of all tokens at once, wherever the stream
    was cut.

    Args:
      tokenizer: anything with `decode_bytes(tokens) -> bytes`.

    Example:
      >>> decoder = StreamingDecoder(ByteTokenizer())
      >>> decoder.push([0xC3 + 1])  # the first of two bytes
      ''
      >>> decoder.push([0xA9 + 1])
      'é'
    """

    def __init__(self, tokenizer: DecodesBytes):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, tokens: Sequence[int]) -> str:
        """The text that more tokens complete; never fails."""
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became complete, or nothing."""
        return self._decoder.decode(b"", final=True)


__all__ = ["ByteTokenizer", "DecodesBytes", "StreamingDecoder"]
