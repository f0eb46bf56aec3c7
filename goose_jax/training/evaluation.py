"""Bits per byte on held-out text."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from goose_jax.data import Batch, Document, encode_documents, evaluation_batches
from goose_jax.nn import RWKV7
from goose_jax.text import Tokenizer
from goose_jax.training.step import Losses, Parameters, full_losses
from pallas_kernels.types import Scalar


def make_evaluation(
    model: RWKV7,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    losses: Losses | None = None,
) -> Callable[..., float]:
    """Compiles `bits_per_byte = evaluate(params)`.

    It is the cross entropy of all tokens of the text (in windows of `sequence_length` that know
    nothing of each other), in bits, per byte of the text's UTF-8. Ends of documents are tokens
    that cost bits and have no bytes. So models with different tokenizers can be compared. (Only the
    text's very first token costs nothing, if the tokenizer has no end of a document.)

    Args:
      model: gives the structure; its parameters are not used.
      documents: the held-out text.
      tokenizer: of the model.
      batch_size: windows that are read at once.
      sequence_length: tokens of a window.
      losses: of a model that is fine-tuned; what is compiled is then `evaluate(trained, frozen)`.
    """
    losses = full_losses(model) if losses is None else losses
    num_bytes = sum(document.num_bytes for document in documents)
    batches = list(
        evaluation_batches(
            encode_documents(documents, tokenizer),
            batch_size=batch_size,
            sequence_length=sequence_length,
        )
    )

    @jax.jit
    def sum_of_losses(params: Parameters, frozen: Parameters | None, batch: Batch) -> Scalar:
        return jnp.sum(losses(params, frozen, batch))

    def evaluate(params: Parameters, frozen: Parameters | None = None) -> float:
        nats = sum(float(sum_of_losses(params, frozen, batch)) for batch in batches)
        return nats / math.log(2) / num_bytes

    return evaluate


__all__ = ["make_evaluation"]
