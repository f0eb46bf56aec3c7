"""A tokenizer whose tokens are the bytes of UTF-8."""

from collections.abc import Iterable

from goose_jax.text.tokenizer import REPLACEMENT


class ByteTokenizer:
    """Encodes each byte of a text's UTF-8 as the id `byte + 1`. Id 0 ends a document.

    Attributes:
      vocab_size: 257.
      end_of_document: 0, which padding has too. It decodes to nothing.
      leading_space: False: `encode` adds no space.
    """

    vocab_size = 257
    end_of_document = 0
    leading_space = False

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text.

        Raises:
          UnicodeEncodeError: if the text holds half of a surrogate pair, which UTF-8 cannot encode.
        """
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> list[int]:
        """Returns the token ids of any bytes, valid UTF-8 or not."""
        return [byte + 1 for byte in data]

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of token ids. It never fails.

        Bytes that are not UTF-8 and ids that are not tokens become U+FFFD.
        """
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Returns the exact bytes of token ids. An id that is not a token gives U+FFFD in UTF-8."""
        return b"".join(self._bytes_of(int(token)) for token in tokens)

    def _bytes_of(self, token: int) -> bytes:
        if token == self.end_of_document:
            return b""
        return bytes([token - 1]) if 0 < token < self.vocab_size else REPLACEMENT


__all__ = ["ByteTokenizer"]
