"""Bits per byte on held-out text."""

import hashlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from goose_jax.data import Batch, Document, encode_counted, evaluation_batches
from goose_jax.nn import RWKV7
from goose_jax.parallel import place_batch
from goose_jax.parallel.in_model import on_mesh, sum_over_mesh
from goose_jax.text import Tokenizer
from goose_jax.training.step import Loss, Parameters, full_loss
from pallas_kernels.types import Scalar


class Evaluation:
    """Measures bits per byte of held-out text; `make_evaluation` makes it.

    Args:
      batches: the text.
      num_bytes: length of the text in UTF-8.
      loss: returns the sum of the losses of a batch, in nats, from trained parameters and frozen
        ones; a compiled function.
      mesh: the mesh that batches are divided over; None for one device.

    Attributes:
      checksum: SHA-256 of the text's tokens and its length, in hexadecimal digits.
      num_tokens: number of tokens that are predicted.
      bytes_per_token: bytes of the text per token that is predicted.
    """

    def __init__(
        self, batches: Sequence[Batch], num_bytes: int, loss: Loss, mesh: Mesh | None = None
    ):
        self._batches, self._num_bytes, self._loss, self._mesh = batches, num_bytes, loss, mesh
        self.num_tokens = sum(int(np.sum(np.asarray(batch.targets) >= 0)) for batch in batches)
        self.bytes_per_token = num_bytes / self.num_tokens
        digest = hashlib.sha256(str(num_bytes).encode())
        for batch in batches:
            targets = np.asarray(batch.targets, np.int32)
            digest.update(targets[targets >= 0].tobytes())  # whatever the size of batches
        self.checksum = digest.hexdigest()

    def __call__(self, trained: Parameters, frozen: Parameters | None = None) -> float:
        """Returns bits per byte of the model that these parameters make; None is `{}`."""
        frozen = {} if frozen is None else frozen
        sums = [
            self._loss(
                trained, frozen, batch if self._mesh is None else place_batch(batch, self._mesh)
            )
            for batch in self._batches
        ]
        return sum(map(float, sums)) / math.log(2) / self._num_bytes


def make_evaluation(
    model: RWKV7,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    loss: Loss | None = None,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Returns an `Evaluation`, which measures bits per byte of held-out text.

    Bits per byte are the cross entropy of all tokens of the text, in bits, divided by the bytes of
    the text in UTF-8; so models with different tokenizers can be compared. The text is read in
    windows, each without memory of the window before it. The ends of documents are tokens too: they
    add bits, but no bytes. If the tokenizer has no end of a document, the very first token of the
    text adds no bits. Of a conversation only what the loss counts adds bits and bytes.

    Args:
      model: gives the structure; its parameters are not used.
      documents: the held-out text.
      tokenizer: the tokenizer of the model.
      batch_size: number of windows that are read at once.
      sequence_length: tokens of a window.
      loss: the loss of a model that is fine-tuned, such as `lora_loss(model, config)`; None takes
        `full_loss(model)`.
      mesh: the mesh that the parameters are divided over; None for one device.

    Returns:
      `evaluate(trained, frozen=None)`, which returns bits per byte as a float. `trained` and
      `frozen` are the first two arguments of `loss`.

    Raises:
      ValueError: if the tokenizer gives ids outside of its vocabulary, a size is not a positive
        integer, or the loss counts nothing of the text.
    """
    of_device = full_loss(model) if loss is None else loss

    def total(trained: Parameters, frozen: Parameters, batch: Batch) -> Scalar:
        return sum_over_mesh(of_device(trained, frozen, batch))

    compiled = jax.jit(on_mesh(total, mesh, gradient=False))
    num_bytes = sum(document.num_counted_bytes for document in documents)
    if num_bytes == 0:
        raise ValueError("the held-out text has nothing that the loss counts")
    tokens, counted = encode_counted(documents, tokenizer)
    batches = list(
        evaluation_batches(
            tokens, batch_size=batch_size, sequence_length=sequence_length, counted=counted
        )
    )
    return Evaluation(batches, num_bytes, compiled, mesh)


__all__ = ["Evaluation", "make_evaluation"]
