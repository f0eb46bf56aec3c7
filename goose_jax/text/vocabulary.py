r"""A tokenizer with a vocabulary of byte strings, such as the vocabulary of the World models.

A vocabulary file has one line for each token: its id, its text or bytes as a Python literal, and
its number of bytes. Lines may end with CR LF, and the file may begin with a byte order mark.

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
_TOKEN = -1  # key of the token that ends at a node of the trie; the other keys are bytes


class VocabularyTokenizer:
    """Encodes greedily: each token is the longest one that the rest of the text begins with.

    Attributes:
      vocab_size: number of ids; all ids are less.
      end_of_document: 0, which decodes to nothing.
      leading_space: False: `encode` adds no space.

    Args:
      vocabulary: the bytes of each id. Ids are at least 1; no bytes are empty, and no two ids have
        the same bytes.
      vocab_size: number of ids. None takes the highest id + 1.

    Raises:
      ValueError: if an id or its bytes break these rules.

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

    @property
    def vocabulary(self) -> dict[int, bytes]:
        """The bytes of each id, without the end of a document."""
        return {token: data for token, data in self._bytes.items() if token != self.end_of_document}

    @classmethod
    def from_file(cls, path: Path | str, *, vocab_size: int | None = None) -> "VocabularyTokenizer":
        """Makes the tokenizer of a vocabulary file.

        Raises:
          OSError: if the file cannot be read.
          ValueError: if a line is wrong. The message names it.
        """
        return cls(read_vocabulary(path), vocab_size=vocab_size)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text.

        Raises:
          UnicodeEncodeError: if the text holds half of a surrogate pair, which UTF-8 cannot encode.
          ValueError: if the vocabulary has no token for a byte of the text.
        """
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> list[int]:
        """Returns the token ids of any bytes, valid UTF-8 or not.

        Raises:
          ValueError: if the vocabulary has no token for one of them.
        """
        tokens, position = [], 0
        while position < len(data):
            token, position = self._longest(data, position)
            tokens.append(token)
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of token ids. It never fails.

        Bytes that are not UTF-8 and ids that are not tokens become U+FFFD.
        """
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Returns the exact bytes of token ids. An id that is not a token gives U+FFFD in UTF-8."""
        return b"".join(self._bytes.get(int(token), REPLACEMENT) for token in tokens)

    def _longest(self, data: bytes, position: int) -> tuple[int, int]:
        """Returns the longest token at a position, and the position after it."""
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
    """Returns the tokenizer of the World models: ids 1..65529, in a vocabulary of 65,536.

    The vocabulary file is part of the official package `rwkv`. No code of the package is executed.

    Raises:
      ValueError: if the package is missing or has no such file. The message says what to install.
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
    """Reads the bytes of each id from a vocabulary file, and checks every line.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if a line is not `id literal length`, if its id is 0 or too large, if an earlier
        line has the same id or bytes, or if its length is wrong. The message names the line.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
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
