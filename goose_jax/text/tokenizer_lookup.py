"""Finds a tokenizer by its name, by its file, or by the folder of a checkpoint."""

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from goose_jax.text.byte_tokenizer import ByteTokenizer
from goose_jax.text.tokenizer import Tokenizer
from goose_jax.text.tokenizer_json import HuggingFaceTokenizer
from goose_jax.text.vocabulary import VocabularyTokenizer, world_tokenizer
from goose_jax.text.vocabulary_json import vocabulary_tokenizer

_BY_NAME: dict[str, Callable[[], Tokenizer]] = {"byte": ByteTokenizer, "world": world_tokenizer}
TOKENIZER_NAMES = tuple(_BY_NAME)
"""The names that `get_tokenizer` knows."""

_IN_FOLDERS = ("rwkv_vocab*.txt", "rwkv_vocab*.json", "tokenizer.json")
_HOW_TO_GIVE_ONE = (
    "give --tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file"
)


def get_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Returns the tokenizer with this name, or the one in this file or folder.

    Args:
      name_or_path: "byte"; "world", the vocabulary of the official models (needs the extra
        "world"); the path of a vocabulary file, with lines `id literal length` or in JSON; the path
        of a `tokenizer.json`; or a folder that holds one of these files. A `tokenizer.json` needs
        the extra "huggingface", unless it takes the longest match or holds the World vocabulary:
        these are encoded by `VocabularyTokenizer`.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if there is no such tokenizer, its file is damaged, or an extra is missing.
    """
    if str(name_or_path) in _BY_NAME:
        return _BY_NAME[str(name_or_path)]()
    path = Path(name_or_path)
    if name_or_path == "" or not path.exists():
        raise ValueError(
            f"tokenizer {str(name_or_path)!r} is unknown; give one of {list(_BY_NAME)}, "
            "or the path of a tokenizer.json or a vocabulary file"
        )
    file = _file_in(path) if path.is_dir() else path
    return _open_json(file) if file.suffix == ".json" else VocabularyTokenizer.from_file(file)


def _open_json(file: Path) -> Tokenizer:
    return vocabulary_tokenizer(file, _read_json(file)) or HuggingFaceTokenizer(file)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no tokenizer.json: {error}") from error


def open_tokenizer(name_or_path: str | Path, vocab_size: int) -> Tokenizer:
    """Returns a tokenizer for a model, after checking that the model knows all of its ids.

    Args:
      name_or_path: a name or path that `get_tokenizer` accepts.
      vocab_size: number of ids in the model's vocabulary.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if there is no such tokenizer, or it has ids that the model does not have.
    """
    tokenizer = get_tokenizer(name_or_path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {str(name_or_path)!r} has {tokenizer.vocab_size} ids, "
            f"but the model's vocabulary is {vocab_size}"
        )
    return tokenizer


def tokenizer_name(checkpoint: Path, *, given: str | None, recorded: str | None) -> str:
    """Returns the name or the absolute path of a checkpoint's tokenizer, for `get_tokenizer`.

    Args:
      checkpoint: path of the checkpoint. A tokenizer file in its folder is preferred to `recorded`.
      given: the user's choice, which is preferred to both; None if there is none.
      recorded: the tokenizer that the checkpoint's metadata name; None if they name none.

    Raises:
      ValueError: if nothing names a tokenizer, or the folder holds several tokenizer files.
    """
    if given == "":
        raise ValueError("tokenizer must be a name or a path, got ''")
    file = find_tokenizer_file(checkpoint) if checkpoint.is_dir() and not given else None
    chosen = given or file or recorded
    if chosen is None:
        raise ValueError(f"{checkpoint} does not tell its tokenizer; {_HOW_TO_GIVE_ONE}")
    return absolute_name(str(chosen))


def absolute_name(name: str) -> str:
    """Returns the name or path of a tokenizer as it can be used from any folder.

    Args:
      name: a name or path that `get_tokenizer` accepts. What is neither does not change.
    """
    if name in TOKENIZER_NAMES or not Path(name).exists():
        return name
    return str(Path(name).absolute())


def find_tokenizer_file(folder: Path) -> Path | None:
    """Returns the tokenizer file in a folder, or None if there is none.

    Raises:
      OSError: if there are several, and one of them cannot be read.
      ValueError: if there are several that do not hold the same vocabulary.
    """
    files = [file for pattern in _IN_FOLDERS for file in sorted(folder.glob(pattern))]
    if len(files) > 1 and not _hold_one_vocabulary(files):
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds several tokenizers; give the path of one: {names}")
    return files[0] if files else None


def tokenizer_files(name_or_path: str | Path) -> dict[str, Path]:
    """Returns the files of a tokenizer, by the names with which a folder holds them.

    Files with these names in a folder are the tokenizer that `find_tokenizer_file` finds there.

    Args:
      name_or_path: a name or path that `get_tokenizer` accepts.

    Returns:
      The main file first; `{}` if there is no file, as for "byte" and "world".

    Raises:
      OSError: if a file cannot be read.
      ValueError: if a folder holds no tokenizer or several, or a file is damaged.
    """
    path = Path(name_or_path)
    if str(name_or_path) in _BY_NAME or not path.exists():
        return {}
    file = _file_in(path) if path.is_dir() else path
    if file.suffix != ".json":
        return {file.name if fnmatch(file.name, _IN_FOLDERS[0]) else "rwkv_vocab.txt": file}
    fields = _read_json(file)
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict):
        return {file.name if fnmatch(file.name, _IN_FOLDERS[1]) else "rwkv_vocab.json": file}
    named = model.get("vocab_file")
    beside = {named: file.with_name(named)} if isinstance(named, str) else {}
    return {"tokenizer.json": file} | beside


def _hold_one_vocabulary(files: Sequence[Path]) -> bool:
    tokenizers = [get_tokenizer(file) for file in files]
    first, *others = (
        tokenizer.vocabulary if isinstance(tokenizer, VocabularyTokenizer) else None
        for tokenizer in tokenizers
    )
    return first is not None and all(other == first for other in others)


def _file_in(folder: Path) -> Path:
    file = find_tokenizer_file(folder)
    if file is None:
        raise ValueError(f"{folder} holds no tokenizer: neither {' nor '.join(_IN_FOLDERS)}")
    return file


__all__ = [
    "TOKENIZER_NAMES",
    "absolute_name",
    "find_tokenizer_file",
    "get_tokenizer",
    "open_tokenizer",
    "tokenizer_files",
    "tokenizer_name",
]
