"""Tokenizers, and the decoding of a stream of tokens."""

from collections.abc import Callable
from pathlib import Path

from goose_jax.text.byte_tokenizer import ByteTokenizer
from goose_jax.text.huggingface import HuggingFaceTokenizer
from goose_jax.text.stop import TextStop
from goose_jax.text.tokenizer import StreamingDecoder, Tokenizer
from goose_jax.text.vocabulary import VocabularyTokenizer, read_vocabulary, world_tokenizer

_BY_NAME: dict[str, Callable[[], Tokenizer]] = {"byte": ByteTokenizer, "world": world_tokenizer}
TOKENIZER_NAMES = tuple(_BY_NAME)
"""What `get_tokenizer` takes beside paths."""

_IN_FOLDERS = ("tokenizer.json", "rwkv_vocab*.txt")


def get_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a name, as checkpoints keep it, or in a file or folder.

    Args:
      name_or_path: "byte"; "world", the vocabulary of the official models (needs the extra
        "world"); a `tokenizer.json` (needs the extra "huggingface"); a vocabulary file of lines
        `id literal length`; or a folder that holds one of these files.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if there is no such tokenizer, or its file is damaged, or an extra is missing.
    """
    if str(name_or_path) in _BY_NAME:
        return _BY_NAME[str(name_or_path)]()
    path = Path(name_or_path)
    if not path.exists():
        raise ValueError(
            f"tokenizer {str(name_or_path)!r} is unknown; give one of {list(_BY_NAME)}, "
            "or the path of a tokenizer.json or a vocabulary file"
        )
    file = _file_in(path) if path.is_dir() else path
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    return VocabularyTokenizer.from_file(file)


def find_tokenizer_file(folder: Path) -> Path | None:
    """The one tokenizer file in a folder; None if there is none.

    Raises:
      ValueError: if there are several.
    """
    files = sorted(file for pattern in _IN_FOLDERS for file in folder.glob(pattern))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds several tokenizers; give the path of one: {names}")
    return files[0] if files else None


def _file_in(folder: Path) -> Path:
    file = find_tokenizer_file(folder)
    if file is None:
        raise ValueError(f"{folder} holds no tokenizer: neither {' nor '.join(_IN_FOLDERS)}")
    return file


__all__ = [
    "TOKENIZER_NAMES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "StreamingDecoder",
    "TextStop",
    "Tokenizer",
    "VocabularyTokenizer",
    "find_tokenizer_file",
    "get_tokenizer",
    "read_vocabulary",
    "world_tokenizer",
]
