"""Text as the bytes of its UTF-8."""

from collections.abc import Iterable

from goose_jax.text.tokenizer import REPLACEMENT


class ByteTokenizer:
    """One token per byte of the text's UTF-8: id = byte + 1; id 0 ends a document.

    Attributes:
      vocab_size: 257.
      end_of_document: 0; also what padding looks like. It decodes to nothing.
      leading_space: False: nothing is put before a text.
    """

    vocab_size = 257
    end_of_document = 0
    leading_space = False

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
        return bytes([token - 1]) if 0 < token < self.vocab_size else REPLACEMENT


__all__ = ["ByteTokenizer"]
