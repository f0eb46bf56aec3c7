"""The compiled programs of text generation: reading prompts, and decoding blocks of tokens.

The sampling settings, limit, stop tokens and random key of each row are arguments of the programs.
The same programs therefore serve batches whose rows start and stop together (`generate`) and
batches whose rows do not (`ContinuousBatch`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from goose_jax.config import RWKV7Config
from goose_jax.generation.sampling import (
    SamplingConfig,
    count_token,
    sample_token,
    stack_sampling,
)
from goose_jax.generation.validation import Ids
from goose_jax.nn import DecodingWeights
from goose_jax.state import RWKV7State, init_state, state_dtypes

NO_TOKEN = -1
"""Fills the tokens that `decode_block` returns after the end of a sequence."""

NOT_FINITE = -2
"""Stands for the token that could not be drawn, because the logits are NaN or infinite."""

MAX_PIECE = 2048
"""Longer prompts are read in pieces of this many tokens."""

_MIN_PIECE = 16

_STOPS = 8
"""Stop tokens are padded to a multiple of this number, so that few programs are compiled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """The values that decoding carries from token to token.

    Attributes:
      state: recurrent state after all tokens so far.
      logits: `[B, vocab]`, logits of the next token.
      counts: `[B, vocab]`, decayed counts of the tokens generated so far.
      lengths: `[B]` int32, number of tokens generated so far.
      stopped: `[B]`, true once a sequence has ended.
    """

    state: RWKV7State
    logits: Float[Array, "B vocab"]
    counts: Float[Array, "B vocab"]
    lengths: Int[Array, " B"]
    stopped: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """How each row is continued.

    Attributes:
      keys: `[B]` random keys. A token is drawn with the key of its row and its position.
      sampling: sampling settings whose numbers are `[B]`.
      stop_tokens: `[B, stops]` int32, padded with -1.
      limits: `[B]` int32, maximum number of generated tokens. A row with limit 0 generates none.
    """

    keys: Key[Array, " B"]
    sampling: SamplingConfig
    stop_tokens: Int[Array, "B stops"]
    limits: Int[Array, " B"]


def init_progress(config: RWKV7Config, batch_size: int) -> Progress:
    """Returns the progress of `batch_size` rows that have read nothing."""
    _, logits_dtype = state_dtypes(config)
    logits = jnp.zeros((batch_size, config.vocab_size), logits_dtype)
    return _before_first_token(init_state(config, batch_size), logits)


def _before_first_token(state: RWKV7State, logits: Float[Array, "B vocab"]) -> Progress:
    return Progress(
        state=state,
        logits=logits,
        counts=jnp.zeros_like(logits),
        lengths=jnp.zeros(len(logits), jnp.int32),
        stopped=jnp.zeros(len(logits), bool),
    )


def row_settings(
    *,
    seeds: Sequence[tuple[int, int]],
    sampling: Sequence[SamplingConfig],
    stop_tokens: Sequence[Ids],
    limits: Sequence[int],
) -> RowSettings:
    """Puts the settings of B rows on the device, where many blocks use them.

    Args:
      seeds: for each row its seed, and a number that differs between rows of the same seed.
      sampling: sampling settings of each row.
      stop_tokens: stop tokens of each row; rows may have different numbers of them.
      limits: maximum number of generated tokens of each row.
    """
    most = max(len(stops) for stops in stop_tokens)
    width = max(_STOPS, -(-most // _STOPS) * _STOPS)
    padded = [np.pad(ids, (0, width - len(ids)), constant_values=-1) for ids in stop_tokens]
    seed, row = np.array(seeds, np.uint32).T
    return RowSettings(
        keys=_row_keys(seed, row),
        sampling=jax.device_put(stack_sampling(sampling)),
        stop_tokens=jnp.asarray(np.stack(padded)),
        limits=jnp.array(limits, jnp.int32),
    )


@jax.jit
@jax.vmap
def _row_keys(seed: Int[Array, ""], row: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), row)


def padded_length(length: int) -> int:
    """Returns the length that prompts are padded to, so that few programs are compiled."""
    if length > MAX_PIECE:
        return -(-length // MAX_PIECE) * MAX_PIECE
    return max(_MIN_PIECE, 1 << (length - 1).bit_length())


def read_prompts(weights: DecodingWeights, prompts: Sequence[Ids], state: RWKV7State) -> Progress:
    """Reads whole prompts. The arguments are those of `read_in_pieces`."""
    *_, progress = read_in_pieces(weights, prompts, state)
    assert progress is not None
    return progress


def read_in_pieces(
    weights: DecodingWeights, prompts: Sequence[Ids], state: RWKV7State
) -> Iterator[Progress | None]:
    """Reads prompts piece by piece. Padding is on the left, so that all prompts end together.

    Args:
      weights: the model.
      prompts: B sequences of ids, at least one of them not empty. An empty sequence is a row of
        padding, and its state does not change.
      state: the state of B rows that the prompts continue from.

    Yields:
      None after each piece except the last, and the progress after the last.
    """
    length = padded_length(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros((len(prompts), length), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt) :] = prompt
        segment_ids[i, length - len(prompt) :] = 1

    for start in range(0, length, MAX_PIECE):
        piece = slice(start, start + MAX_PIECE)
        logits, state = read_piece(weights, tokens[:, piece], segment_ids[:, piece], state)
        yield None if start + MAX_PIECE < length else _before_first_token(state, logits)


@jax.jit
def read_piece(
    weights: DecodingWeights,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    state: RWKV7State,
) -> tuple[Float[Array, "B vocab"], RWKV7State]:
    """Returns the logits after the last token only, and the new state."""
    model = weights.model()
    hidden, state = model.hidden(tokens, state, segment_ids)
    return model.logits(hidden[:, -1:])[:, 0], state


def decode_block(
    weights: DecodingWeights,
    settings: RowSettings,
    progress: Progress,
    *,
    block_size: int,
    implementation: str | None = None,
) -> tuple[Progress, Int[Array, "B block"]]:
    """Generates up to `block_size` tokens in each row. A row that ends gets fewer.

    A row whose logits are NaN or infinite before it has all of its tokens ends with `NOT_FINITE`.
    The host looks for it among the tokens that it reads anyway.

    Args:
      weights: the model.
      settings: settings of the B rows.
      progress: progress of the B rows. It is donated: the result takes over its buffers.
      block_size: number of tokens.
      implementation: implementation of `RWKV7.decode`.

    Returns:
      The new progress, and `[B, block_size]` int32 tokens with `NO_TOKEN` after the end of a
      sequence, before which `NOT_FINITE` may stand.
    """
    return _decode_program()(
        weights, settings, progress, block_size=block_size, implementation=implementation
    )


def trace_decode_block(
    weights: DecodingWeights,
    settings: RowSettings,
    *,
    block_size: int,
    implementation: str | None = None,
) -> jax.stages.Traced:
    """Traces `decode_block`. Once its program is compiled, calls of `decode_block` compile nothing.

    The arguments are those of `decode_block`.
    """
    batch_size = len(settings.limits)
    progress = jax.eval_shape(lambda: init_progress(weights.config, batch_size))
    return _decode_program().trace(
        weights, settings, progress, block_size=block_size, implementation=implementation
    )


@functools.cache
def _decode_program() -> Any:
    """Returns `_decode_block` as a jitted function.

    On a CPU, XLA would order operations so that many of them are ready to run at the same time. A
    token needs its weights one after the other, and takes 1.5 times as long in that order.
    """
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(
        _decode_block,
        static_argnames=("block_size", "implementation"),
        donate_argnames="progress",
        compiler_options=(
            {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else None
        ),
    )


def _decode_block(
    weights: DecodingWeights,
    settings: RowSettings,
    progress: Progress,
    *,
    block_size: int,
    implementation: str | None = None,
) -> tuple[Progress, Int[Array, "B block"]]:
    """`decode_block`, to be jitted."""
    model = weights.model()

    def step(progress: Progress, _: None) -> tuple[Progress, Int[Array, " B"]]:
        keys = jax.vmap(jax.random.fold_in)(settings.keys, progress.lengths)
        token = sample_token(keys, progress.logits, progress.counts, settings.sampling)
        is_stop = (token[:, None] == settings.stop_tokens).any(axis=-1)
        ended = progress.stopped | (progress.lengths >= settings.limits)
        finite = jnp.isfinite(progress.logits).all(axis=-1)
        stopped = ended | is_stop | ~finite
        read = jnp.where(stopped, 0, token)
        hidden, state = model.decode(read, progress.state, ~stopped, implementation=implementation)
        progress = Progress(
            state=state,
            logits=model.logits(hidden[:, None])[:, 0],
            counts=count_token(progress.counts, read, settings.sampling),
            lengths=progress.lengths + ~stopped,
            stopped=stopped,
        )
        token = jnp.where(stopped, NO_TOKEN, token)
        return progress, jnp.where(ended | finite, token, NOT_FINITE)

    progress, tokens = jax.lax.scan(step, progress, length=block_size)
    return progress, tokens.T


@functools.partial(jax.jit, donate_argnums=0)
def place_rows(progress: Progress, new: Progress, rows: Int[Array, " n"]) -> Progress:
    """Replaces some rows of a batch.

    Args:
      progress: progress of B rows. It is donated.
      new: progress of n rows.
      rows: `[n]` integers, the place of each new row in the batch. A new row whose place is B or
        more is dropped.
    """

    def place(old: Array, value: Array) -> Array:
        return old.at[rows].set(value, mode="drop")

    def place_state(old: Array, value: Array) -> Array:
        return old.at[:, rows].set(value, mode="drop")

    return Progress(
        state=jax.tree.map(place_state, progress.state, new.state),
        logits=place(progress.logits, new.logits),
        counts=place(progress.counts, new.counts),
        lengths=place(progress.lengths, new.lengths),
        stopped=place(progress.stopped, new.stopped),
    )
