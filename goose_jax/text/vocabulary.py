r"""Vocabularies of byte strings, as the World models' is, and greedy encoding with them.

A vocabulary file has one line for each token: its id, its text or bytes as a Python literal, and
the number of its bytes.

    31 '\x1e' 1
    261 '\n\n' 2
    132 b'\x83' 1
    13091 '是' 3
"""

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from goose_jax.config import WORLD_VOCAB_SIZE
from goose_jax.text.tokenizer import REPLACEMENT

_WORLD_PACKAGE, _WORLD_FILE = "rwkv", "rwkv_vocab_v20230424.txt"
_MAX_ID = 2**31 - 1  # ids are int32
_TOKEN = -1  # the key, beside those of the 256 bytes, of the token that ends at a node


class VocabularyTokenizer:
    """Always takes the longest token that the rest of the text's UTF-8 begins with.

    Attributes:
      vocab_size: all ids are below this.
      end_of_document: 0; it decodes to nothing.
      leading_space: False: nothing is put before a text.

    Args:
      vocabulary: the bytes of each id, none of them empty or twice; ids are at least 1.
      vocab_size: None takes the highest id + 1.

    Raises:
      ValueError: if an id or its bytes are out of place.

    Example:
      >>> VocabularyTokenizer({1: b"a", 2: b"b", 3: b"ab"}).encode("aab")
      [1, 3]
    """

    end_of_document = 0
    leading_space = False

    def __init__(self, vocabulary: Mapping[int, bytes], *, vocab_size: int | None = None):
        least = max(vocabulary, default=0) + 1
        if vocab_size is not None and vocab_size < least:
            raise ValueError(f"{vocab_size=} must be above the highest id, {least - 1}")
        self.vocab_size = least if vocab_size is None else vocab_size
        self._bytes = {self.end_of_document: b""} | dict(vocabulary)
        self._trie: dict[int, Any] = {}
        for token, data in vocabulary.items():
            if not data or not 1 <= token <= _MAX_ID:
                raise ValueError(f"vocabulary[{token}] must be some bytes of an id >= 1: {data!r}")
            node = self._trie
            for byte in data:
                node = node.setdefault(byte, {})
            if node.setdefault(_TOKEN, token) != token:
                raise ValueError(f"vocabulary has {data!r} twice: ids {node[_TOKEN]} and {token}")

    @classmethod
    def from_file(cls, path: Path | str, *, vocab_size: int | None = None) -> "VocabularyTokenizer":
        """The tokenizer of a vocabulary file.

        Raises:
          OSError: if the file cannot be read.
          ValueError: naming the line that is wrong.
        """
        return cls(read_vocabulary(path), vocab_size=vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
          UnicodeEncodeError: if the text holds half a surrogate pair, which UTF-8 cannot express.
          ValueError: if the vocabulary has no token for a byte of the text.
        """
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes, valid UTF-8 or not.

        Raises:
          ValueError: if the vocabulary has no token for one of them.
        """
        tokens, position = [], 0
        while position < len(data):
            token, position = self._longest(data, position)
            tokens.append(token)
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids; never fails.

        What is not UTF-8 becomes U+FFFD, and so does each id that is no token.
        """
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of token ids, exactly; an id that is no token gives those of U+FFFD."""
        return b"".join(self._bytes.get(int(token), REPLACEMENT) for token in tokens)

    def _longest(self, data: bytes, position: int) -> tuple[int, int]:
        """The longest token at a position, and where it ends."""
        node = self._trie
        token, end = None, position
        for at in range(position, len(data)):
            if data[at] not in node:
                break
            node = node[data[at]]
            if _TOKEN in node:
                token, end = node[_TOKEN], at + 1
        if token is None:
            raise ValueError(
                f"the vocabulary has no token for byte {data[position : position + 1]!r}"
            )
        return token, end


def world_tokenizer() -> VocabularyTokenizer:
    """The tokenizer of the World models: ids 1..65529, in 65,536 slots.

    The vocabulary comes with the official package `rwkv`, of which nothing is executed.

    Raises:
      ValueError: with what to install, if the package is missing or has no such file.
    """
    package = importlib.util.find_spec(_WORLD_PACKAGE)
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or [] if (file := Path(folder) / _WORLD_FILE).is_file()]
    if not files:
        raise ValueError(
            f"tokenizer 'world' needs {_WORLD_FILE} of the package {_WORLD_PACKAGE}: "
            "pip install 'goose-jax[world]', or give the path of such a file"
        )
    return VocabularyTokenizer.from_file(files[0], vocab_size=WORLD_VOCAB_SIZE)


def read_vocabulary(path: Path | str) -> dict[int, bytes]:
    """The bytes of each id in a vocabulary file; every line is checked.

    Raises:
      OSError: if the file cannot be read.
      ValueError: naming the line that is not `id literal length`, has an id that is 0, too large or
        there before, bytes that are there before, or another number of bytes than it says.
    """
    try:
        lines = Path(path).read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no vocabulary file: {error}") from error
    vocabulary: dict[int, bytes] = {}
    line_of: dict[int | bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, data = _parse_line(line.removesuffix("\r"))
            for key in (token, data):
                if key in line_of:
                    raise ValueError(f"{key!r} is in line {line_of[key]} already")
                line_of[key] = number
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        vocabulary[token] = data
    return vocabulary


def _parse_line(line: str) -> tuple[int, bytes]:
    token, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not (_is_number(token) and literal and _is_number(length)):
        raise ValueError(f"a line must be `id literal length`, got {line!r}")
    if not 1 <= int(token) <= _MAX_ID:
        raise ValueError(f"the id must be in 1..{_MAX_ID}, got {token}")
    data = _parse_literal(literal)
    if not data or len(data) != int(length):
        raise ValueError(f"{literal} has {len(data)} bytes, and the line says {length}")
    return int(token), data


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


def _parse_literal(literal: str) -> bytes:
    try:
        value = ast.literal_eval(literal)
        if isinstance(value, (str, bytes)):
            return value.encode() if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{literal[:80]} is no literal of text or bytes: {error}") from error
    raise ValueError(f"{literal[:80]} must be text or bytes, and is {type(value).__name__}")


__all__ = ["VocabularyTokenizer", "read_vocabulary", "world_tokenizer"]
