r"""Vocabularies in JSON from which texts are encoded by the longest match.

The vocabulary of the World models is found in these forms:

- `{"1": [0], "257": "\t\n", ...}`: the text or the bytes of each id (web-rwkv, Ai00).
- A `tokenizer.json` whose model is `RwkvTrie`, or `WordPiece` without a prefix, on the byte-level
  alphabet. Both mean the longest match. (The package `tokenizers` needs cubic time for the second
  one, and does not know the first one.)
- A `tokenizer.json` of any other model, with the bytes and ids of the World vocabulary.
- A `tokenizer.json` whose model is `RWKV7LongestMatch`. It names a file, in which each character
  of a token stands for the byte with its code.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from goose_jax.text.byte_level import from_byte_level
from goose_jax.text.vocabulary import VocabularyTokenizer

_WORLD_TOKENS = 65529
_WORLD_SHA256 = "2df0627f02263a61cf2606e02941969c3037394752d1d0b1f463838ca48d6839"
_END = re.compile("<.+>")
"""Names of id 0, which ends a document, in files of different writers."""
_PLACEHOLDER = re.compile("\ue000[0-9]+\ue001|<\\|rwkv_unused_[0-9]+\\|>")
"""Names of ids that have no bytes, in files of different writers."""


def vocabulary_tokenizer(path: Path, fields: Any) -> VocabularyTokenizer | None:
    """Returns the tokenizer of a file if it is one of the forms that this module describes.

    Id 0 ends a document, whatever the file calls it.

    Args:
      path: path of the file.
      fields: contents of the file.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if the file has one of these forms, and its vocabulary is damaged.
    """
    try:
        vocabulary = _vocabulary(path, fields)
        return None if vocabulary is None else VocabularyTokenizer(vocabulary)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged vocabulary: {error}") from error


def _vocabulary(path: Path, fields: Any) -> dict[int, bytes] | None:
    if not isinstance(fields, dict) or not fields:
        return None
    if all(key.isascii() and key.isdigit() for key in fields):
        return {
            int(key): _listed(key, value)
            for key, value in fields.items()
            if not isinstance(value, str) or _is_token(value, int(key))
        }
    model = fields.get("model")
    if not isinstance(model, dict):
        return None
    if model.get("type") == "RWKV7LongestMatch":
        return _by_id(_read_ids(path, model.get("vocab_file")), lambda name: name.encode("latin-1"))
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not (_is_longest_match(fields, model) or _is_world(ids)):
        return None
    vocabulary = _by_id(ids, from_byte_level)
    # Such files are for the package: id 0 is a token like others, or there are more special tokens.
    return None if 0 in vocabulary or _has_others(fields, vocabulary) else vocabulary


def _listed(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list) and all(type(byte) is int for byte in value):
        return bytes(value)  # raises a ValueError for numbers that are no bytes
    raise ValueError(f"id {key} must have a text or a list of bytes, and has {str(value)[:80]!r}")


def _read_ids(path: Path, name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"vocab_file must be the name of a file in its folder, got {name!r}")
    ids = json.loads(path.with_name(name).read_text(encoding="utf-8-sig"))
    if not isinstance(ids, dict):
        raise ValueError(f"{name} must hold the ids of tokens")
    return ids


def _is_token(name: str, token: Any) -> bool:
    """Returns whether an entry has bytes: neither the end of a document nor a placeholder."""
    return not (token == 0 and _END.fullmatch(name)) and not _PLACEHOLDER.fullmatch(name)


def _by_id(ids: Mapping[str, Any], to_bytes: Callable[[str], bytes | None]) -> dict[int, bytes]:
    vocabulary: dict[int, bytes] = {}
    for name, token in ids.items():
        if not _is_token(name, token):
            continue
        if type(token) is not int or token in vocabulary:
            raise ValueError(f"{name[:80]!r} must have an id of its own, and has {token!r}")
        data = to_bytes(name)
        if data is None:
            raise ValueError(f"{name[:80]!r} has a character that stands for no byte")
        vocabulary[token] = data
    return vocabulary


def _is_longest_match(fields: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Returns whether the model takes the longest token at each place of the whole text."""
    splitter, decoder = fields.get("pre_tokenizer"), fields.get("decoder")
    if fields.get("normalizer") is not None or not _is_byte_level(decoder):
        return False
    if model.get("type") == "RwkvTrie":
        return splitter is None or _keeps_text_whole(splitter)
    return (
        model.get("type") == "WordPiece"
        and model.get("continuing_subword_prefix") == ""
        and _keeps_text_whole(splitter)
    )


def _is_byte_level(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "ByteLevel"


def _keeps_text_whole(splitter: Any) -> bool:
    return (
        _is_byte_level(splitter)
        and splitter.get("add_prefix_space") is False
        and splitter.get("use_regex") is False
    )


def _is_world(ids: Mapping[str, Any]) -> bool:
    """Returns whether the tokens are those of the World vocabulary."""
    if len(ids) < _WORLD_TOKENS:
        return False
    tokens = [
        (token, from_byte_level(name)) for name, token in ids.items() if _is_token(name, token)
    ]
    if any(type(token) is not int or data is None for token, data in tokens):
        return False
    lines = "".join(f"{token} {data.hex()}\n" for token, data in sorted(tokens) if data)
    return hashlib.sha256(lines.encode()).hexdigest() == _WORLD_SHA256


def _has_others(fields: Mapping[str, Any], vocabulary: Mapping[int, bytes]) -> bool:
    """Returns whether tokens were added that are neither the end of a document nor known texts."""
    known = set(vocabulary.values())
    added = fields.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return True
    names = [(token.get("content"), token.get("id")) for token in added]
    return any(
        not isinstance(name, str) or (_is_token(name, token) and name.encode() not in known)
        for name, token in names
    )


__all__ = ["vocabulary_tokenizer"]
