"""The text of a training run: encoded documents to train on, and documents held out."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Bool, Int

from goose_jax.data.batches import RandomWindows
from goose_jax.data.documents import Document, encode_counted, split_documents
from goose_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingText:
    """Tokens to train on, and held-out text to measure on.

    Attributes:
      source: what messages call the text, such as its path.
      tokens: `[N]` int32, the text to train on.
      held_out: the documents to measure on.
      tokenizer: the tokenizer that made the tokens.
      counted: `[N]`, whether the loss counts a token; None counts all.

    Example:
      >>> documents = [Document("geese", "Honk! said the goose. " * 20)]
      >>> text = TrainingText.from_documents(
      ...     documents, ByteTokenizer(), source="geese", held_out_bytes=40
      ... )
      >>> text.windows(batch_size=2, sequence_length=8, seed=0)(0).inputs.shape
      (2, 8)
    """

    source: str
    tokens: Int[np.ndarray, " N"]
    held_out: Sequence[Document]
    tokenizer: Tokenizer
    counted: Bool[np.ndarray, " N"] | None = None

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        *,
        source: str,
        held_out_bytes: int,
    ) -> Self:
        """Divides documents with `split_documents`, and encodes those to train on.

        Args:
          documents: at least one.
          tokenizer: the tokenizer of the model.
          source: what messages call the text.
          held_out_bytes: how much to hold out at most; never more than a tenth of the text.

        Raises:
          ValueError: if the text is too short, or the tokenizer gives an id that it must not give.
        """
        training, held_out = split_documents(documents, held_out_bytes=held_out_bytes)
        tokens, counted = encode_counted(training, tokenizer)
        return cls(source, tokens, held_out, tokenizer, None if counted.all() else counted)

    def windows(
        self, *, batch_size: int, sequence_length: int, seed: int, microbatches: int = 1
    ) -> RandomWindows:
        """Returns batches of windows drawn at random from the tokens.

        Args:
          batch_size: B, rows of each microbatch.
          sequence_length: T, tokens of a row.
          seed: another seed gives other windows.
          microbatches: A; 1 gives batches without the leading axis.

        Raises:
          ValueError: if the tokens do not fill one window.
        """
        if len(self.tokens) <= sequence_length:
            raise ValueError(
                f"{self.source} is too short: {len(self.tokens)} tokens to train on, "
                f"but {sequence_length=}"
            )
        return RandomWindows(
            self.tokens,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=seed,
            microbatches=microbatches,
            source=self.source,
            counted=self.counted,
        )


__all__ = ["TrainingText"]
