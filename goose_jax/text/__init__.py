"""Tokenizers, and the decoding of a stream of tokens."""

from goose_jax.text.byte_tokenizer import ByteTokenizer, StreamingDecoder

_TOKENIZERS = {"byte": ByteTokenizer}


def get_tokenizer(name: str) -> ByteTokenizer:
    """The tokenizer of a name, as checkpoints keep it.

    Raises:
      ValueError: if there is no such tokenizer.
    """
    if name not in _TOKENIZERS:
        raise ValueError(f"tokenizer {name=} is unknown; give one of {list(_TOKENIZERS)}")
    return _TOKENIZERS[name]()


__all__ = ["ByteTokenizer", "StreamingDecoder", "get_tokenizer"]
