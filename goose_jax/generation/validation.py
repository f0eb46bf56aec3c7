"""Checks the arguments of requests for generated text."""

import numbers
from typing import Any

import numpy as np
from jaxtyping import Int

from pallas_kernels.validation import check_positive

type Ids = Int[np.ndarray, " T"]

SEEDS = 2**32
_MAX_LENGTH = 2**31 - 1  # lengths are int32


def check_ids(name: str, ids: Any, vocab_size: int) -> Ids:
    """Converts token ids to an int32 array.

    Raises:
      ValueError: if `ids` is not a sequence of integers in 0..vocab_size-1. The message begins with
        `name`.
    """
    if isinstance(ids, (str, bytes)):
        raise ValueError(f"{name} must be a sequence of token ids (encode text first), got {ids!r}")
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a sequence of token ids, got {ids!r}")
    wrong = array[(array < 0) | (array >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{name} must hold ids in 0..{vocab_size - 1}, got {wrong[0]}")
    return array.astype(np.int32)


def check_prompt(name: str, prompt: Any, vocab_size: int) -> Ids:
    """Converts at least one token id to an int32 array.

    Raises:
      ValueError: if `prompt` is not a sequence of at least one id.
    """
    ids = check_ids(name, prompt, vocab_size)
    if not ids.size:
        raise ValueError(f"{name} must hold at least one token, got {prompt!r}")
    return ids


def check_prompts(prompts: Any, vocab_size: int) -> list[Ids]:
    """Converts the prompts of a batch to int32 arrays.

    Raises:
      ValueError: if `prompts` is empty, or one of them is not a sequence of at least one id.
    """
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__") or not len(prompts):
        raise ValueError(f"prompts must be a list of lists of token ids, got {prompts!r}")
    return [check_prompt(f"prompts[{i}]", row, vocab_size) for i, row in enumerate(prompts)]


def check_max_new_tokens(value: Any) -> None:
    """Checks that a maximum number of new tokens is a positive int32."""
    check_positive("max_new_tokens", value)
    if value > _MAX_LENGTH:
        raise ValueError(f"max_new_tokens must be less than 2**31, got {value!r}")


def check_seed(seed: Any) -> int:
    """Checks that a seed is an unsigned 32-bit integer, and returns it."""
    if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < SEEDS:
        raise ValueError(f"seed must lie in 0..2**32-1, got {seed!r}")
    return int(seed)


def check_seeds(seed: Any, batch_size: int) -> list[tuple[int, int]]:
    """Checks the seed or seeds of a batch.

    Returns:
      For each row its seed, and a number that differs between rows which share one seed.
    """
    if not hasattr(seed, "__len__"):
        return [(check_seed(seed), row) for row in range(batch_size)]
    if len(seed) != batch_size:
        raise ValueError(f"seed must be an integer or one for each of {batch_size} rows: {seed=}")
    return [(check_seed(value), 0) for value in seed]
