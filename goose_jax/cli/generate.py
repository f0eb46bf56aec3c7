"""`goose-jax generate`: continues a prompt on the terminal."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from goose_jax.checkpoints.native import load_checkpoint
from goose_jax.generation import SamplingConfig
from goose_jax.generation import generate as generate_tokens
from goose_jax.text import StreamingDecoder, get_tokenizer


def generate(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    prompt: str = "",
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.85,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    penalty_decay: float = 0.996,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    echo: bool = True,
) -> None:
    """Continues a prompt with a trained model and writes the text as it comes.

    Args:
      checkpoint: Directory of a checkpoint, or of a training run (then its newest checkpoint).
      prompt: Text to continue; without one, a new document begins.
      max_new_tokens: The most tokens that are generated. The end of the document ends it sooner.
      temperature: 0 always takes the most probable token; higher is more varied.
      top_k: Draw from this many of the most probable tokens only; 0 is off.
      top_p: Draw from the most probable tokens that together have this probability; 1 is off.
      presence_penalty: Subtracted from the logits of tokens that were generated before.
      frequency_penalty: Subtracted from the logits as often as the token was generated before.
      penalty_decay: By this factor each token makes the ones before it count less.
      stop: Texts that end the generation; they are not written.
      seed: The same seed gives the same text.
      echo: Write the prompt, too.

    Raises:
      ValueError: if an argument is out of range, or the checkpoint is damaged.
      OSError: if there is no checkpoint, or it cannot be read.
    """
    sampling = SamplingConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_decay=penalty_decay,
    )
    ending = TextStop(stop)
    model, metadata = load_checkpoint(checkpoint)
    tokenizer = get_tokenizer(metadata.tokenizer)
    decoder = StreamingDecoder(tokenizer)

    def write_tokens(new: list[np.ndarray]) -> bool:
        _write(ending.push(decoder.push(new[0].tolist())))
        return ending.reached

    if echo:
        _write(prompt)
    generate_tokens(
        model,
        [tokenizer.encode(prompt) or [tokenizer.end_of_document]],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=[tokenizer.end_of_document],
        seed=seed,
        on_tokens=write_tokens,
    )
    _write(ending.push(decoder.finish()) + ending.finish() + "\n")


class TextStop:
    """Cuts a stream of text off before the first of several texts.

    The end of the stream that may be the beginning of one of them is held back.

    Args:
      stops: texts, none of them empty.

    Attributes:
      reached: whether one of them was found; nothing comes after that.

    Raises:
      ValueError: if one of `stops` is empty.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise ValueError(f"stop must not be an empty text, got {stops!r}")
        self.reached = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """What may be written now that more text has come."""
        if self.reached:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.reached = bool(found)
        end = min(found) if found else len(text) - self._beginning_at_end_of(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back when the stream ended."""
        return self._held

    def _beginning_at_end_of(self, text: str) -> int:
        """Length of the longest end of `text` that begins one of the stops."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


__all__ = ["TextStop", "generate"]
