"""Generates text for a batch of prompts that start together and run until the last one ends.

One compiled program reads the prompts, another one generates a block of tokens with `lax.scan`. The
recurrent state has a constant size, so that each token costs the same, however long the text is.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from goose_jax.config import RWKV7Config
from goose_jax.generation.decoding import (
    NOT_FINITE,
    Progress,
    RowSettings,
    decode_block,
    read_prompts,
    row_settings,
    trace_decode_block,
)
from goose_jax.generation.non_finite import non_finite_logits
from goose_jax.generation.sampling import SamplingConfig
from goose_jax.generation.validation import (
    Ids,
    check_ids,
    check_max_new_tokens,
    check_prompts,
    check_seeds,
)
from goose_jax.nn import RWKV7, DecodingWeights, prepare_decoding
from goose_jax.state import RWKV7State, check_state, init_state
from pallas_kernels.validation import check_positive

PADDING = 0
"""Fills `Generation.tokens` after the end of a sequence."""

_COMPILED: set[Hashable] = set()
"""The static arguments of the programs of `decode_block` that `generate` has compiled."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
      tokens: `[B, max_new_tokens]` int32, the new tokens, with `PADDING` after the end of a
        sequence.
      lengths: `[B]` int32, number of new tokens in each row. It is less than `max_new_tokens` if
        the row met a stop token or the callback ended the generation.
      state: recurrent state after the prompt and all new tokens of each row. Pass it to `generate`
        together with the text that comes next.
    """

    tokens: Int[np.ndarray, "B new"]
    lengths: Int[np.ndarray, " B"]
    state: RWKV7State = dataclasses.field(repr=False)

    @property
    def sequences(self) -> list[list[int]]:
        """The new tokens of each row, without padding."""
        return [
            row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)
        ]


def generate(
    model: RWKV7 | DecodingWeights,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    state: RWKV7State | None = None,
    on_tokens: Callable[[list[np.ndarray]], bool | None] | None = None,
    block_size: int = 16,
    implementation: str | None = None,
) -> Generation:
    """Continues prompts, one in each row of a batch.

    Two programs are compiled for each batch size. One reads prompts, and is compiled for each
    padded length (powers of two from 16 to 2048; longer prompts are read in pieces). The other one
    generates `block_size` tokens. Later calls reuse them for other parameters, prompts, seeds and
    numbers in `sampling`.

    The device does not wait for Python: it computes the next block while the tokens of one block
    are copied to the host and passed to the callback.

    Each token is drawn with a key made of the seed of its row and its position. The tokens of a row
    therefore depend neither on other rows nor on `block_size` nor on `on_tokens`.

    Args:
      model: the model. Its matrices are cast to the compute dtype once per call, if they have
        another dtype. For many calls pass `prepare_decoding(model)`, which does this once for all.
      prompts: B sequences of token ids, each with at least one. Their lengths may differ.
      max_new_tokens: maximum number of new tokens in each row.
      sampling: how tokens are drawn. None draws from the model's distribution unchanged.
      stop_tokens: a sequence ends before the first of these tokens. The stop token is neither
        returned nor read by the state. The generation ends when all sequences have ended.
      seed: integer in 0..2**32-1, from which each row gets random numbers of its own. Or a sequence
        of B such integers; a row's tokens then do not depend on its place in the batch (they equal
        those of the first row of a batch with that seed).
      state: recurrent state that the prompts continue from, such as `Generation.state`. None is the
        start of a text. Penalties count only the tokens of this call.
      on_tokens: called after each block with the new tokens of each row, a list of B integer arrays
        (empty for a row that has ended). The generation ends if it returns True.
      block_size: number of tokens that are generated before control returns to Python.
      implementation: implementation of the decoding step, a name that `RWKV7.decode` accepts.

    Raises:
      TypeError: if `state` or `sampling` has the wrong type.
      ValueError: if an argument is out of range. The message names the argument.
      NonFiniteLogitsError: if the logits of a row are NaN or infinite before the row has ended.
        The callback has got the tokens before that. The message names the likely cause.
      NotServed: if a named implementation does not serve this model or device.

    Example:
      >>> config = RWKV7Config(vocab_size=257, hidden_size=64, num_layers=1)
      >>> model = RWKV7(config, rngs=nnx.Rngs(0))
      >>> generate(model, [[1, 2, 3], [4]], max_new_tokens=5).tokens.shape
      (2, 5)
    """
    sampling = SamplingConfig() if sampling is None else sampling
    if not isinstance(sampling, SamplingConfig):
        raise TypeError(f"sampling must be None or a SamplingConfig, got {sampling!r}")
    check_max_new_tokens(max_new_tokens)
    check_positive("block_size", block_size)
    config = model.config
    rows = check_prompts(prompts, config.vocab_size)
    stops = check_ids("stop_tokens", stop_tokens, config.vocab_size)
    settings = row_settings(
        seeds=check_seeds(seed, len(rows)),
        sampling=[sampling] * len(rows),
        stop_tokens=[stops] * len(rows),
        limits=[max_new_tokens] * len(rows),
    )
    state = _initial_state(state, config, len(rows))
    weights = prepare_decoding(model)
    implementation = weights.decode_implementation(implementation)
    progress = _read_and_compile(weights, rows, state, settings, block_size, implementation)
    blocks: Iterable[_Block] = _dispatch_blocks(
        functools.partial(
            decode_block, weights, settings, block_size=block_size, implementation=implementation
        ),
        progress,
        num_blocks=-(-max_new_tokens // block_size),
        keep_states=on_tokens is not None,
    )
    if on_tokens is None and not stops.size:
        blocks = list(blocks)  # nothing can end the generation early, so nothing needs waiting for
    return _collect(weights, blocks, len(rows), max_new_tokens, on_tokens)


def prefill(
    model: RWKV7 | DecodingWeights,
    prompts: Sequence[Sequence[int]],
    *,
    state: RWKV7State | None = None,
) -> RWKV7State:
    """Reads prompts without generating tokens, with the compiled program that `generate` uses.

    Args:
      model: the model, or `prepare_decoding(model)`.
      prompts: B sequences of token ids, each with at least one. Their lengths may differ.
      state: recurrent state that the prompts continue from. None is the start of a text.

    Returns:
      The state after all tokens, from which `generate` can continue.

    Raises:
      TypeError: if `state` has the wrong type.
      ValueError: if an argument is out of range. The message names the argument.
    """
    config = model.config
    rows = check_prompts(prompts, config.vocab_size)
    state = _initial_state(state, config, len(rows))
    return read_prompts(prepare_decoding(model), rows, state).state


def _initial_state(state: RWKV7State | None, config: RWKV7Config, batch_size: int) -> RWKV7State:
    if state is None:
        return init_state(config, batch_size)
    check_state(state, config, batch_size)
    return state


def _read_and_compile(
    weights: DecodingWeights,
    prompts: Sequence[Ids],
    state: RWKV7State,
    settings: RowSettings,
    block_size: int,
    implementation: str | None,
) -> Progress:
    """Reads prompts. At the first call, `decode_block` is compiled in another thread meanwhile."""
    program = (weights.graphdef, len(prompts), block_size, implementation)
    if program in _COMPILED:
        return read_prompts(weights, prompts, state)
    traced = trace_decode_block(
        weights, settings, block_size=block_size, implementation=implementation
    )
    lowered = traced.lower()
    with ThreadPoolExecutor(max_workers=1) as thread:
        compiled = thread.submit(lowered.compile)
        progress = read_prompts(weights, prompts, state)
        compiled.result()
    _COMPILED.add(program)
    return progress


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block that has been dispatched. Its arrays may not be computed yet.

    Attributes:
      tokens: `[B, block]` int32, as `decode_block` returns them.
      state: recurrent state after these tokens.
    """

    tokens: Int[Array, "B block"]
    state: RWKV7State


def _dispatch_blocks(
    decode: Callable[[Progress], tuple[Progress, Int[Array, "B block"]]],
    progress: Progress,
    *,
    num_blocks: int,
    keep_states: bool,
) -> Iterator[_Block]:
    """Dispatches one block after the other, without waiting for any.

    Args:
      decode: generates a block; the progress that it is given is donated.
      progress: progress before the first block.
      num_blocks: number of blocks.
      keep_states: whether the state of a block is still needed after the next block has been
        dispatched. If so it is copied, because the next block takes over its buffers.
    """
    for _ in range(num_blocks):
        progress, tokens = decode(progress)
        tokens.copy_to_host_async()
        state = jax.tree.map(jnp.copy, progress.state) if keep_states else progress.state
        yield _Block(tokens, state)


def _collect(
    weights: DecodingWeights,
    blocks: Iterable[_Block],
    batch_size: int,
    max_new_tokens: int,
    on_tokens: Callable[[list[np.ndarray]], bool | None] | None,
) -> Generation:
    """Waits for the blocks, one after the other, and puts their tokens together."""
    tokens = np.full((batch_size, max_new_tokens), PADDING, np.int32)
    lengths = np.zeros(batch_size, np.int32)
    begin = 0
    for block, next_block in _with_next(blocks):
        new = np.asarray(block.tokens)[:, : max_new_tokens - begin]
        is_token = new >= 0
        tokens[:, begin : begin + new.shape[1]] = np.where(is_token, new, PADDING)
        lengths += is_token.sum(axis=1, dtype=np.int32)
        begin += new.shape[1]
        ended = False
        if on_tokens is not None:
            ended = bool(on_tokens([row[kept] for row, kept in zip(new, is_token, strict=True)]))
        if failed := np.flatnonzero((new == NOT_FINITE).any(axis=1)).tolist():
            raise non_finite_logits(weights, "row", failed)
        if ended:
            return Generation(tokens, lengths, block.state)
        state = next_block.state
        if (~is_token).any(axis=1).all():  # all rows have ended: the next block changes nothing
            break
    return Generation(tokens, lengths, state)


def _with_next[T](items: Iterable[T]) -> Iterator[tuple[T, T]]:
    """Yields pairs of an item and its successor. The last item is its own successor."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, following
        item = following
    yield item, item
