"""Tokenizers, and the decoding of a stream of tokens."""

from goose_jax.text.byte_tokenizer import ByteTokenizer
from goose_jax.text.stop import TextStop
from goose_jax.text.text_stream import TextStream
from goose_jax.text.tokenizer import StreamingDecoder, Tokenizer, encode_continuation
from goose_jax.text.tokenizer_json import HuggingFaceTokenizer
from goose_jax.text.tokenizer_lookup import (
    TOKENIZER_NAMES,
    find_tokenizer_file,
    get_tokenizer,
    open_tokenizer,
    tokenizer_files,
    tokenizer_name,
)
from goose_jax.text.vocabulary import VocabularyTokenizer, read_vocabulary, world_tokenizer

__all__ = [
    "TOKENIZER_NAMES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "StreamingDecoder",
    "TextStop",
    "TextStream",
    "Tokenizer",
    "VocabularyTokenizer",
    "encode_continuation",
    "find_tokenizer_file",
    "get_tokenizer",
    "open_tokenizer",
    "read_vocabulary",
    "tokenizer_files",
    "tokenizer_name",
    "world_tokenizer",
]
