"""The compiled programs of text generation: reading prompts, and decoding in blocks of tokens.

Everything that a row of the batch has of its own (sampling, limit, stop tokens, random numbers) is
an argument, so that the same programs serve rows that begin and end together and rows that do not.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from goose_jax.config import RWKV7Config
from goose_jax.generation.sampling import (
    SamplingConfig,
    count_token,
    sample_token,
    stack_sampling,
)
from goose_jax.generation.validation import Ids
from goose_jax.state import RWKV7State, init_state, state_dtypes

NO_TOKEN = -1
"""Stands after the last token of a sequence that has stopped, in what `decode_block` returns."""

MAX_PIECE = 2048
"""Longer prompts are read in pieces of this many tokens."""

_MIN_PIECE = 16

_STOPS = 8
"""Stop tokens are padded to a multiple of this, so that few different programs are compiled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """What decoding carries from token to token.

    Attributes:
      state: has read all tokens so far.
      logits: `[B, vocab]`, for the next token.
      counts: `[B, vocab]`, decayed, of the tokens generated.
      lengths: `[B]` int32, number of tokens generated.
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
    """What each row is to be continued by.

    Attributes:
      keys: `[B]` random keys; a token is drawn with its row's key and its position.
      sampling: its numbers are `[B]`.
      stop_tokens: `[B, stops]` int32, padded with -1.
      limits: `[B]` int32, the most tokens that are generated; a row with 0 rests.
    """

    keys: Key[Array, " B"]
    sampling: SamplingConfig
    stop_tokens: Int[Array, "B stops"]
    limits: Int[Array, " B"]


def init_progress(config: RWKV7Config, batch_size: int) -> Progress:
    """Before anything is read."""
    _, logits_dtype = state_dtypes(config)
    logits = jnp.zeros((batch_size, config.vocab_size), logits_dtype)
    return _progress(init_state(config, batch_size), logits)


def _progress(state: RWKV7State, logits: Float[Array, "B vocab"]) -> Progress:
    """Before the first new token."""
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
    """Puts the settings of B rows on the device, once for many blocks.

    Args:
      seeds: of each row, and a number that tells it from others of the same seed.
      sampling: of each row.
      stop_tokens: of each row, any number.
      limits: of each row.
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
    """The length that prompts are padded to, so that few different programs are compiled."""
    if length > MAX_PIECE:
        return -(-length // MAX_PIECE) * MAX_PIECE
    return max(_MIN_PIECE, 1 << (length - 1).bit_length())


def read_prompts(
    graphdef: nnx.GraphDef, params: nnx.State, prompts: Sequence[Ids], state: RWKV7State
) -> Progress:
    """Reads prompts; arguments as of `read_in_pieces`."""
    *_, progress = read_in_pieces(graphdef, params, prompts, state)
    assert progress is not None
    return progress


def read_in_pieces(
    graphdef: nnx.GraphDef, params: nnx.State, prompts: Sequence[Ids], state: RWKV7State
) -> Iterator[Progress | None]:
    """Reads prompts, which end at the same place and so have their padding on the left.

    Args:
      graphdef: of the model.
      params: of the model.
      prompts: B, one of them not empty. A row without tokens is padding, and its state rests.
      state: that they continue from.

    Yields:
      None after each piece but the last, then the progress.
    """
    length = padded_length(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros((len(prompts), length), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt) :] = prompt
        segment_ids[i, length - len(prompt) :] = 1

    for start in range(0, length, MAX_PIECE):
        piece = slice(start, start + MAX_PIECE)
        logits, state = read_piece(graphdef, params, tokens[:, piece], segment_ids[:, piece], state)
        yield None if start + MAX_PIECE < length else _progress(state, logits)


@functools.partial(jax.jit, static_argnums=0)
def read_piece(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    state: RWKV7State,
) -> tuple[Float[Array, "B vocab"], RWKV7State]:
    """Logits after the last token only, and the new state."""
    model = nnx.merge(graphdef, params)
    hidden, state = model.hidden(tokens, state, segment_ids)
    return model.logits(hidden[:, -1:])[:, 0], state


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("block_size", "implementation"),
    donate_argnames="progress",
)
def decode_block(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    settings: RowSettings,
    progress: Progress,
    *,
    block_size: int,
    implementation: str | None = None,
) -> tuple[Progress, Int[Array, "B block"]]:
    """Generates up to `block_size` tokens in each row: those of a row that ends are fewer.

    Args:
      graphdef: of the model.
      params: of the model.
      settings: of the rows.
      progress: is used up; its buffers are those of the new progress.
      block_size: number of tokens.
      implementation: of `RWKV7.decode`.

    Returns:
      The new progress, and `[B, block_size]` int32 tokens, `NO_TOKEN` after the end of a sequence.
    """
    model = nnx.merge(graphdef, params)
    weights = None if implementation == "xla" else model.layer_weights()

    def step(progress: Progress, _: None) -> tuple[Progress, Int[Array, " B"]]:
        keys = jax.vmap(jax.random.fold_in)(settings.keys, progress.lengths)
        token = sample_token(keys, progress.logits, progress.counts, settings.sampling)
        is_stop = (token[:, None] == settings.stop_tokens).any(axis=-1)
        stopped = progress.stopped | is_stop | (progress.lengths >= settings.limits)
        read = jnp.where(stopped, 0, token)
        hidden, state = model.decode(
            read, progress.state, ~stopped, weights=weights, implementation=implementation
        )
        progress = Progress(
            state=state,
            logits=model.logits(hidden[:, None])[:, 0],
            counts=count_token(progress.counts, read, settings.sampling),
            lengths=progress.lengths + ~stopped,
            stopped=stopped,
        )
        return progress, jnp.where(stopped, NO_TOKEN, token)

    progress, tokens = jax.lax.scan(step, progress, length=block_size)
    return progress, tokens.T


def lower_decode_block(
    config: RWKV7Config,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    settings: RowSettings,
    *,
    block_size: int,
    implementation: str | None = None,
) -> jax.stages.Lowered:
    """`decode_block`, ready to be compiled: calls find what has been. Arguments as of that."""
    progress = jax.eval_shape(functools.partial(init_progress, config, len(settings.limits)))
    return decode_block.lower(
        graphdef,
        params,
        settings,
        progress,
        block_size=block_size,
        implementation=implementation,
    )


@functools.partial(jax.jit, donate_argnums=0)
def place_rows(progress: Progress, new: Progress, rows: Int[Array, " n"]) -> Progress:
    """Overwrites some rows of a batch.

    Args:
      progress: of B rows, is used up.
      new: of n rows.
      rows: where each of them belongs; those with B or more belong nowhere.
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
