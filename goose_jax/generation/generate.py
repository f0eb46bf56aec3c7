"""Text generation: a jitted prefill, then `lax.scan` over tokens inside one compiled program.

The recurrent state has a constant size, so that the millionth token costs what the first one does.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from goose_jax.config import RWKV7Config
from goose_jax.generation.sampling import SamplingConfig, count_token, sample_token
from goose_jax.nn.model import RWKV7
from goose_jax.state import RWKV7State, check_state, init_state
from pallas_kernels.validation import check_positive

PADDING = 0
"""Stands after the last token of a sequence that has stopped."""

MAX_PIECE = 1024
"""Longer prompts are read in pieces of this many tokens."""

_MIN_PIECE = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: `[B, max_new_tokens]` int32, the new tokens; `PADDING` after the end of a sequence.
      lengths: `[B]` int32, how many of a row's tokens are real; less than `max_new_tokens` if the
        sequence met a stop token or the callback ended the generation.
      state: the recurrent state after each row's prompt and new tokens, all of them read: hand it
        to `generate` with what comes next in the text.
    """

    tokens: Int[np.ndarray, "B new"]
    lengths: Int[np.ndarray, " B"]
    state: RWKV7State

    @property
    def sequences(self) -> list[list[int]]:
        """The new tokens of each row, without padding."""
        return [
            row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
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


def generate(
    model: RWKV7,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    state: RWKV7State | None = None,
    on_tokens: Callable[[list[np.ndarray]], bool | None] | None = None,
    block_size: int = 16,
) -> Generation:
    """Continues prompts, one in each row of a batch.

    Two programs are compiled for each batch size: one reads prompts (for each of a few lengths that
    prompts are padded to, 16 to 1024 in powers of two; longer prompts are read in pieces), one
    generates `block_size` tokens. Later calls use them again, whatever the parameters, prompts,
    seeds and numbers in `sampling` are.

    Each token is drawn with a key made of the row's seed and the token's position, so that a row's
    tokens depend neither on the other rows nor on `block_size` nor on `on_tokens`.

    Args:
      model: its parameters are passed to the compiled programs as arguments. It is fastest if
        `param_dtype` is `compute_dtype`, because every token reads all parameters.
      prompts: B sequences of token ids, each with one at least; their lengths may differ.
      max_new_tokens: the most tokens that are generated in each row.
      sampling: how tokens are drawn; None draws from the model's distribution unchanged.
      stop_tokens: a sequence ends before the first of these; the stop token is neither returned nor
        read by the state. The generation ends when all sequences have.
      seed: in 0..2**32-1; gives each row its own random numbers. Or one for each row: then a row's
        tokens do not depend on its place in the batch either (the first row with seed s equals
        any row with its own seed s).
      state: the state that a row's prompt continues from, as `Generation.state` gives it; None is
        the start of a text. Penalties count the tokens of this call only.
      on_tokens: called after each block with the new tokens of each row, a list of B integer arrays
        (empty for a row that has stopped). If it returns True the generation ends there.
      block_size: number of tokens that are generated between two returns to Python.

    Raises:
      TypeError: if `state` or `sampling` is something else.
      ValueError: naming the argument that is out of range.

    Example:
      >>> config = RWKV7Config(vocab_size=257, hidden_size=64, num_layers=1)
      >>> model = RWKV7(config, rngs=nnx.Rngs(0))
      >>> generate(model, [[1, 2, 3], [4]], max_new_tokens=5).tokens.shape
      (2, 5)
    """
    sampling = SamplingConfig() if sampling is None else sampling
    if not isinstance(sampling, SamplingConfig):
        raise TypeError(f"sampling must be None or a SamplingConfig, got {sampling!r}")
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("block_size", block_size)
    vocab_size = model.config.vocab_size
    rows = _check_prompts(prompts, vocab_size)
    stops = _check_ids("stop_tokens", stop_tokens, vocab_size)
    keys = _row_keys(*_check_seed(seed, len(rows)))
    if state is not None:
        check_state(state, model.config, len(rows))

    graphdef, params = nnx.split(model)
    progress = _read_prompts(graphdef, params, rows, state, model.config)
    few_sizes = max(8, -(-len(stops) // 8) * 8)  # and so few programs
    stops = np.pad(stops, (0, few_sizes - len(stops)), constant_values=-1)
    limit = np.int32(max_new_tokens)
    decode = functools.partial(_decode_block, graphdef, params, block_size=block_size)

    tokens = np.full((len(rows), max_new_tokens), PADDING, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for start in range(0, max_new_tokens, block_size):
        progress, block = decode(progress, keys, sampling, stops, np.int32(start), limit)
        stop = min(start + block_size, max_new_tokens)
        tokens[:, start:stop] = np.asarray(block).T[:, : stop - start]
        before, lengths = lengths, np.array(progress.lengths)  # a copy: decode reuses the buffer
        if on_tokens is not None:
            new = [row[a:b] for row, a, b in zip(tokens, before, lengths, strict=True)]
            if on_tokens(new):
                break
        if (lengths < stop).all():
            break
    return Generation(tokens, lengths, progress.state)


def prefill(
    model: RWKV7, prompts: Sequence[Sequence[int]], *, state: RWKV7State | None = None
) -> RWKV7State:
    """Reads tokens without generating any, with the program that `generate` reads prompts with.

    Args:
      model: as for `generate`.
      prompts: B sequences of token ids, each with one at least; their lengths may differ.
      state: the state they continue from; None is the start of a text.

    Returns:
      The state after all tokens, from which `generate` can go on.

    Raises:
      TypeError: if `state` is something else.
      ValueError: naming the argument that is out of range.
    """
    rows = _check_prompts(prompts, model.config.vocab_size)
    if state is not None:
        check_state(state, model.config, len(rows))
    graphdef, params = nnx.split(model)
    return _read_prompts(graphdef, params, rows, state, model.config).state


def _check_ids(name: str, ids: Any, vocab_size: int) -> np.ndarray:
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


def _check_prompts(prompts: Any, vocab_size: int) -> list[np.ndarray]:
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__") or not len(prompts):
        raise ValueError(f"prompts must be a list of lists of token ids, got {prompts!r}")
    rows = [_check_ids(f"prompts[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        if not row.size:
            raise ValueError(f"prompts[{i}] must hold at least one token, got {prompts[i]!r}")
    return rows


def _check_seed(seed: Any, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The seed of each row, `[B]`, and the number that tells apart rows of the same seed."""
    one_for_all = not hasattr(seed, "__len__")
    seeds = [seed] * batch_size if one_for_all else list(seed)
    if len(seeds) != batch_size:
        raise ValueError(f"seed must be an integer or one for each of {batch_size} rows: {seed=}")
    for value in seeds:
        if not isinstance(value, numbers.Integral) or not 0 <= int(value) < 2**32:
            raise ValueError(f"seed must lie in 0..2**32-1, got {value!r}")
    rows = np.arange(batch_size) * one_for_all
    return np.array(seeds, np.uint32), rows.astype(np.uint32)


@jax.jit
@jax.vmap
def _row_keys(seed: Int[Array, ""], row: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), row)


def _padded_length(length: int) -> int:
    """The length that prompts are padded to, so that few different programs are compiled."""
    if length > MAX_PIECE:
        return -(-length // MAX_PIECE) * MAX_PIECE
    return max(_MIN_PIECE, 1 << (length - 1).bit_length())


def _read_prompts(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    rows: list[np.ndarray],
    state: RWKV7State | None,
    config: RWKV7Config,
) -> _Progress:
    """Reads the prompts, which end at the same place and so have their padding on the left."""
    length = _padded_length(max(len(row) for row in rows))
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segment_ids[i, length - len(row) :] = 1

    state = init_state(config, len(rows)) if state is None else state
    for start in range(0, length, MAX_PIECE):
        piece = slice(start, start + MAX_PIECE)
        logits, state = _read_piece(
            graphdef, params, tokens[:, piece], segment_ids[:, piece], state
        )
    return _Progress(
        state=state,
        logits=logits,
        counts=jnp.zeros_like(logits),
        lengths=jnp.zeros(len(rows), jnp.int32),
        stopped=jnp.zeros(len(rows), bool),
    )


@functools.partial(jax.jit, static_argnums=0)
def _read_piece(
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
    jax.jit, static_argnums=0, static_argnames="block_size", donate_argnames="progress"
)
def _decode_block(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    progress: _Progress,
    keys: Key[Array, " B"],
    sampling: SamplingConfig,
    stop_tokens: Int[Array, " stops"],
    start: Int[Array, ""],
    limit: Int[Array, ""],
    *,
    block_size: int,
) -> tuple[_Progress, Int[Array, "block B"]]:
    """Generates the tokens at positions `start`, `start + 1`, ... but none from `limit` on."""
    model = nnx.merge(graphdef, params)

    def step(progress: _Progress, position: Int[Array, ""]) -> tuple[_Progress, Int[Array, " B"]]:
        position_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        token = sample_token(position_keys, progress.logits, progress.counts, sampling)
        stopped = progress.stopped | jnp.isin(token, stop_tokens) | (position >= limit)
        token = jnp.where(stopped, PADDING, token)
        # To the model a stopped row is padding, which leaves its state as it is.
        segment_ids = (~stopped).astype(jnp.int32)[:, None]
        hidden, state = model.hidden(token[:, None], progress.state, segment_ids)
        progress = _Progress(
            state=state,
            logits=model.logits(hidden)[:, 0],
            counts=count_token(progress.counts, token, sampling),
            lengths=progress.lengths + ~stopped,
            stopped=stopped,
        )
        return progress, token

    positions = start + jnp.arange(block_size, dtype=jnp.int32)
    return jax.lax.scan(step, progress, positions)
