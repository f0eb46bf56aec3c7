"""Tokenizers in files `tokenizer.json`, the format of Hugging Face's package `tokenizers`.

The package encodes texts. It is not used for decoding, because it decodes whole sequences only: the
text of the first tokens may change with the next one. This module derives the bytes of each token
from the decoder that the file describes.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from goose_jax.text.byte_level import from_byte_level
from goose_jax.text.tokenizer import REPLACEMENT

type _Step = Callable[[str | bytes], str | bytes]

_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_CONFIG = "tokenizer_config.json"
_MAX_ID = 2**24 - 1  # the package visits all ids up to the largest
_LONGEST = 250  # characters of a message, which may hold a part of the file


class HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json`.

    Texts are encoded without the special tokens that the file's template would add. Special tokens
    decode to nothing. The file's decoder must give each token its own bytes, as `ByteLevel`,
    `Metaspace`, `Replace` (of a text), `ByteFallback`, `Fuse` and a `Strip` of the first space do.
    Unlike the package, this class replaces only the bytes that are not UTF-8 by U+FFFD, not also
    valid bytes beside them, and it decodes ids that are not tokens to U+FFFD.

    Attributes:
      vocab_size: number of ids; all ids are less.
      end_of_document: id of the `eos_token` in the `tokenizer_config.json` beside the file. Without
        such a file, id of the special token with one of the usual names; None if there is none.
      leading_space: whether `encode` adds a space before a text, and `decode` removes it.

    Args:
      path: path of the `tokenizer.json`.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if the package `tokenizers` is missing (the message says what to install), or the
        file is not a `tokenizer.json`, or its decoder is not supported.
    """

    def __init__(self, path: Path | str):
        if importlib.util.find_spec("tokenizers") is None:
            raise ValueError(
                f"{path} needs the package tokenizers: pip install 'goose-jax[huggingface]'"
            )
        import tokenizers  # an extra

        try:
            text = Path(path).read_text(encoding="utf-8-sig")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            _check_ids(vocabulary)
            # The package writes all fields, in one form, whatever the file leaves out.
            fields = json.loads(self._tokenizer.to_str())
        except (OSError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # plain exceptions, and panics, which are none
            raise ValueError(f"{path} is no tokenizer.json: {_short(error)}") from error
        self._tokenizer.no_truncation()  # the file may say how long a text is for its model
        self._tokenizer.no_padding()
        self._path = path
        special = {token["content"] for token in fields["added_tokens"] if token["special"]}
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_of_document = _end_of_document(Path(path), vocabulary, special)
        try:
            to_bytes, self.leading_space = _decoder(fields["decoder"])
        except NotImplementedError as error:
            raise ValueError(f"{path} has a decoder that is not supported: {error}") from error
        self._bytes = {
            token: b"" if name in special or token == self.end_of_document else to_bytes(name)
            for name, token in vocabulary.items()
        }

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text.

        Raises:
          UnicodeEncodeError: if the text holds half of a surrogate pair, which UTF-8 cannot encode.
          ValueError: if the vocabulary has no token for a part of the text, nor one for what is
            unknown.
        """
        text.encode()
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises plain exceptions
            raise ValueError(f"{self._path} cannot encode the text: {_short(error)}") from error

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of token ids, the first of which begins a text. It never fails.

        Bytes that are not UTF-8 and ids that are not tokens become U+FFFD.
        """
        text = self.decode_bytes(tokens).decode(errors="replace")
        return text.removeprefix(" ") if self.leading_space else text

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Returns the bytes of token ids anywhere in a text. Ids that are no tokens give U+FFFD."""
        return b"".join(self._bytes.get(int(token), REPLACEMENT) for token in tokens)


def _check_ids(vocabulary: Mapping[str, int]) -> None:
    for name, token in vocabulary.items():
        if token > _MAX_ID:
            raise ValueError(f"{name[:80]!r} has the id {token}, at most {_MAX_ID} is read")


def _end_of_document(path: Path, vocabulary: Mapping[str, int], special: set[str]) -> int | None:
    config = path.with_name(_CONFIG)
    if not config.is_file():
        return next((vocabulary[name] for name in _END_NAMES if name in special), None)
    try:
        fields = json.loads(config.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not the JSON of a tokenizer: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{config} is not the JSON of a tokenizer: it holds no object")
    token = fields.get("eos_token")
    name = token.get("content", token) if isinstance(token, dict) else token
    if name is None:
        return None
    if not isinstance(name, str) or name not in vocabulary:
        raise ValueError(
            f"{config} has eos_token {_short(repr(name))}, which is not in {path.name}"
        )
    return vocabulary[name]


def _short(message: object) -> str:
    return str(message)[:_LONGEST]


def _decoder(fields: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """Returns a function from a token's name to its bytes, and whether a first space is removed."""
    steps: list[_Step] = []
    fused = leading_space = False
    for part in _parts(fields):
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and _strips_one_space(part):
            leading_space = True
        elif fused:
            raise NotImplementedError(f"{kind} after Fuse")
        else:
            steps.append(_step(part))
            leading_space |= kind == "Metaspace" and _prepends(part)

    def to_bytes(name: str) -> bytes:
        value: str | bytes = name
        for step in steps:
            value = step(value)
        return value.encode() if isinstance(value, str) else value

    return to_bytes, leading_space


def _parts(fields: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if fields is None:
        raise NotImplementedError("none at all")
    if fields["type"] == "Sequence":
        return [part for inner in fields["decoders"] for part in _parts(inner)]
    return [fields]


def _strips_one_space(part: Mapping[str, Any]) -> bool:
    return (part["content"], part["start"], part["stop"]) == (" ", 1, 0)


def _prepends(part: Mapping[str, Any]) -> bool:
    # Older files have the flag `add_prefix_space` instead of the scheme.
    return part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True)


def _step(part: Mapping[str, Any]) -> _Step:
    kind = part["type"]
    if kind == "ByteLevel":
        return _on_text(_from_byte_level)
    if kind == "ByteFallback":
        return _on_text(_from_byte_name)
    if kind == "Metaspace":
        return _on_text(lambda name: name.replace(part["replacement"], " "))
    if kind == "Replace" and "String" in part["pattern"]:
        return _on_text(lambda name: name.replace(part["pattern"]["String"], part["content"]))
    raise NotImplementedError(json.dumps(part))


def _on_text(step: Callable[[str], str | bytes]) -> _Step:
    """Returns a step that leaves values unchanged which an earlier step made bytes."""
    return lambda value: step(value) if isinstance(value, str) else value


def _from_byte_name(name: str) -> str | bytes:
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    return bytes.fromhex(match[1]) if match else name


def _from_byte_level(name: str) -> str | bytes:
    # A token that was added to the vocabulary by hand may be plain text.
    data = from_byte_level(name)
    return name if data is None else data


__all__ = ["HuggingFaceTokenizer"]
