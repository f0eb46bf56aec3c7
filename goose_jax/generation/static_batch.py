"""Text generation: a jitted prefill, then `lax.scan` over tokens inside one compiled program.

The recurrent state has a constant size, so that the millionth token costs what the first one does.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from goose_jax.generation.decoding import (
    NO_TOKEN,
    Progress,
    decode_block,
    lower_decode_block,
    read_prompts,
    row_settings,
)
from goose_jax.generation.sampling import SamplingConfig
from goose_jax.generation.validation import (
    check_ids,
    check_max_new_tokens,
    check_prompts,
    check_seeds,
)
from goose_jax.nn.model import RWKV7
from goose_jax.state import RWKV7State, check_state, init_state
from pallas_kernels.validation import check_positive

PADDING = 0
"""Stands after the last token of a sequence that has stopped."""

_COMPILED: set[Hashable] = set()
"""What is static in programs of `decode_block` that `generate` has compiled."""


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
    implementation: str | None = None,
) -> Generation:
    """Continues prompts, one in each row of a batch.

    Two programs are compiled for each batch size: one reads prompts (for each of a few lengths that
    prompts are padded to, 16 to 2048 in powers of two; longer prompts are read in pieces), one
    generates `block_size` tokens. Later calls use them again, whatever the parameters, prompts,
    seeds and numbers in `sampling` are.

    The device does not wait for Python: a block is under way while the tokens of the one before it
    come to the host and the callback is called.

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
      implementation: of the step that reads a new token, as for `RWKV7.decode`.

    Raises:
      TypeError: if `state` or `sampling` is something else.
      ValueError: naming the argument that is out of range.
      NotImplementedError: if a named implementation does not serve this model or device.

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
    vocab_size = model.config.vocab_size
    rows = check_prompts(prompts, vocab_size)
    stops = check_ids("stop_tokens", stop_tokens, vocab_size)
    settings = row_settings(
        seeds=check_seeds(seed, len(rows)),
        sampling=[sampling] * len(rows),
        stop_tokens=[stops] * len(rows),
        limits=[max_new_tokens] * len(rows),
    )
    graphdef, params = nnx.split(model)
    state = _initial_state(state, model, len(rows))
    arguments = (graphdef, params, settings)
    static: dict[str, Any] = {"block_size": block_size, "implementation": implementation}
    program = (graphdef, len(rows), block_size, implementation)
    if program in _COMPILED:
        progress = read_prompts(graphdef, params, rows, state)
    else:
        lowered = lower_decode_block(model.config, *arguments, **static)
        with ThreadPoolExecutor(max_workers=1) as thread:
            compiled = thread.submit(lowered.compile)  # meanwhile the other program is compiled
            progress = read_prompts(graphdef, params, rows, state)
            compiled.result()
        _COMPILED.add(program)
    blocks: Iterable[_Block] = _dispatch_blocks(
        functools.partial(decode_block, *arguments, **static),
        progress,
        num_blocks=-(-max_new_tokens // block_size),
        keep_states=on_tokens is not None,
    )
    if on_tokens is None and not stops.size:
        blocks = list(blocks)  # nothing can end it early, so that nothing is waited for

    tokens = np.full((len(rows), max_new_tokens), PADDING, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for i, (block, next_block) in enumerate(_with_next(blocks)):
        new = np.asarray(block.tokens)[:, : max_new_tokens - i * block_size]
        is_token = new != NO_TOKEN
        columns = slice(i * block_size, i * block_size + new.shape[1])
        tokens[:, columns] = np.where(is_token, new, PADDING)
        lengths += is_token.sum(axis=1, dtype=np.int32)
        if on_tokens is not None:
            of_rows = zip(new, is_token, strict=True)
            if on_tokens([row[kept] for row, kept in of_rows]):
                return Generation(tokens, lengths, block.state)
        state = next_block.state
        if (~is_token).any(axis=1).all():  # all rows have ended: the next block changes nothing
            break
    return Generation(tokens, lengths, state)


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
    rows = check_prompts(prompts, model.config.vocab_size)
    graphdef, params = nnx.split(model)
    return read_prompts(graphdef, params, rows, _initial_state(state, model, len(rows))).state


def _initial_state(state: RWKV7State | None, model: RWKV7, batch_size: int) -> RWKV7State:
    if state is None:
        return init_state(model.config, batch_size)
    check_state(state, model.config, batch_size)
    return state


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block that has been dispatched; its arrays may still be computed.

    Attributes:
      tokens: `[B, block]` int32, `NO_TOKEN` after the end of a sequence.
      state: after these tokens.
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
      decode: uses the progress up that it is given.
      progress: before the first block.
      num_blocks: how many.
      keep_states: whether the state of a block is needed when the next one has been dispatched,
        which would take its buffers.
    """
    for _ in range(num_blocks):
        progress, tokens = decode(progress)
        tokens.copy_to_host_async()
        state = jax.tree.map(jnp.copy, progress.state) if keep_states else progress.state
        yield _Block(tokens, state)


def _with_next[T](items: Iterable[T]) -> Iterator[tuple[T, T]]:
    """Each item with the one after it, which is made first; the last one with itself."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, following
        item = following
    yield item, item
