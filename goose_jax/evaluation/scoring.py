"""Log-likelihoods of continuations, in batches and with common beginnings read once."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from goose_jax.evaluation.prefix_plan import Reading
from goose_jax.evaluation.prefix_states import PrefixStates, batches
from goose_jax.generation.decoding import MAX_PIECE, padded_length
from goose_jax.generation.non_finite import non_finite_logits
from goose_jax.generation.validation import Ids, check_ids, check_prompt
from goose_jax.nn import RWKV7, DecodingWeights, prepare_decoding
from goose_jax.state import RWKV7State, check_state
from pallas_kernels.validation import check_positive

_NOT_SCORED = -1
_LOGITS_AT_ONCE = 256
"""Logits of at most this many tokens are in memory, but of at least one token of each row."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    Attributes:
      log_likelihood: log-probability of all tokens of the continuation, in nats.
      is_greedy: whether each token is the most probable one (the lowest id of equal ones), so that
        greedy decoding would generate the continuation.
    """

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    model: RWKV7 | DecodingWeights,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
    state: RWKV7State | None = None,
    on_scored: Callable[[int], None] | None = None,
) -> list[Score]:
    """Computes the log-likelihood of continuations of contexts.

    What several contexts begin with is read once: the context of a multiple choice, or the examples
    that all prompts of a task have. A text may be of any length; the state carries all of it. Texts
    are padded to few lengths, so that few programs are compiled.

    Args:
      model: the model, or `prepare_decoding(model)`.
      pairs: token ids of contexts and continuations. A context has at least one token. For a whole
        text, give the token that ends documents as the context.
      batch_size: maximum number of texts that are read at once.
      state: state of one row that all contexts continue from; None is the start of a text.
      on_scored: called with the number of pairs that have been scored since the last call.

    Returns:
      The scores in the order of `pairs`. A continuation without tokens has log-likelihood 0.

    Raises:
      TypeError: if `state` has the wrong type.
      ValueError: if an argument is out of range. The message names the argument.
      NonFiniteLogitsError: if the logits are NaN or infinite. The message names the likely cause.

    Example:
      >>> config = RWKV7Config(vocab_size=257, hidden_size=64, num_layers=1)
      >>> model = RWKV7(config, rngs=nnx.Rngs(0))
      >>> [a, b] = score_continuations(model, [([1, 2, 3], [4]), ([1, 2, 3], [5, 6])])
      >>> a.log_likelihood > b.log_likelihood
      True
    """
    check_positive("batch_size", batch_size)
    vocab_size = model.config.vocab_size
    contexts = [check_prompt(f"pairs[{i}][0]", c, vocab_size) for i, (c, _) in enumerate(pairs)]
    continuations = [check_ids(f"pairs[{i}][1]", c, vocab_size) for i, (_, c) in enumerate(pairs)]
    if state is not None:
        check_state(state, model.config, 1)
    weights = prepare_decoding(model)
    # The last token of a context is read with the continuation, whose first token it predicts.
    beginnings = [context[:-1] for context in contexts]
    prefixes = PrefixStates(weights, beginnings, batch_size=batch_size, state=state)
    scores: list[Score | None] = [None] * len(pairs)
    for rests in prefixes.groups():
        readings = [
            dataclasses.replace(r, end=len(contexts[r.text]) + len(continuations[r.text]) - 1)
            for r in rests
        ]
        for batch in batches(readings, batch_size):
            texts = [np.concatenate([contexts[r.text], continuations[r.text]]) for r in batch]
            starts = [len(contexts[r.text]) for r in batch]
            found = _score(weights, prefixes, batch, texts, starts)
            for reading, score in zip(batch, found, strict=True):
                scores[reading.text] = score
            if on_scored is not None:
                on_scored(len(batch))
    return [score for score in scores if score is not None]


def _score(
    weights: DecodingWeights,
    prefixes: PrefixStates,
    batch: Sequence[Reading],
    texts: Sequence[Ids],
    starts: Sequence[int],
) -> Iterator[Score]:
    """Scores the tokens of each text from its start on.

    Args:
      weights: the model.
      prefixes: the states before the readings.
      batch: the readings, one for each text.
      texts: contexts with their continuations.
      starts: lengths of the contexts.
    """
    length = padded_length(max(r.end - r.begin for r in batch))
    shape = (1 << (len(batch) - 1).bit_length(), length)
    tokens, ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    targets = np.full(shape, _NOT_SCORED, np.int32)
    for row, (reading, text, start) in enumerate(zip(batch, texts, starts, strict=True)):
        place = slice(length - (reading.end - reading.begin), length)
        tokens[row, place] = text[reading.begin : reading.end]
        ids[row, place] = 1
        targets[row, length - (len(text) - start) :] = text[start:]
    state = prefixes.states(batch, len(tokens))
    log_likelihoods = np.zeros(len(batch))
    is_greedy = np.ones(len(batch), bool)
    for begin in range(0, length, MAX_PIECE):
        piece = (slice(None), slice(begin, begin + MAX_PIECE))
        of_tokens, greedy, state = _score_piece(
            weights, tokens[piece], targets[piece], ids[piece], state
        )
        log_likelihoods += np.asarray(of_tokens, np.float64).sum(axis=1)[: len(batch)]
        is_greedy &= np.asarray(greedy).all(axis=1)[: len(batch)]
    if failed := [
        r.text for r, x in zip(batch, log_likelihoods, strict=True) if not np.isfinite(x)
    ]:
        raise non_finite_logits(weights, "pair", failed)
    for value, greedy_row in zip(log_likelihoods.tolist(), is_greedy.tolist(), strict=True):
        yield Score(value, greedy_row)


@jax.jit
def _score_piece(
    weights: DecodingWeights,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    state: RWKV7State,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], RWKV7State]:
    """Reads a piece of B texts, whose tokens predict the targets.

    Returns:
      log_likelihoods: `[B, T]` float32, 0 where the target is `_NOT_SCORED`.
      greedy: `[B, T]`, whether a target is the most probable token, or is not scored.
      state: the state after the piece.
    """
    model = weights.model()
    hidden, state = model.hidden(tokens, state, segment_ids)
    B, T, C = hidden.shape
    width = min(T, max(1, _LOGITS_AT_ONCE // B))  # both are powers of two, or T is divisible
    chunks = hidden.reshape(B, T // width, width, C).swapaxes(0, 1)
    targets = targets.reshape(B, T // width, width).swapaxes(0, 1)

    def score(
        hidden: Float[Array, "B width C"], targets: Int[Array, "B width"]
    ) -> tuple[Array, ...]:
        logits = model.logits(hidden)
        scored = targets != _NOT_SCORED
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        log_likelihoods = chosen - jax.nn.logsumexp(logits, axis=-1)
        greedy = jnp.argmax(logits, axis=-1) == targets
        return jnp.where(scored, log_likelihoods, 0.0), greedy | ~scored

    def skip(
        hidden: Float[Array, "B width C"], targets: Int[Array, "B width"]
    ) -> tuple[Array, ...]:
        dtype = jax.eval_shape(score, hidden, targets)[0].dtype
        return jnp.zeros(targets.shape, dtype), jnp.ones(targets.shape, bool)

    def step(chunk: tuple[Array, Array]) -> tuple[Array, ...]:
        return jax.lax.cond(jnp.any(chunk[1] != _NOT_SCORED), score, skip, *chunk)

    log_likelihoods, greedy = jax.lax.map(step, (chunks, targets))
    return (
        log_likelihoods.swapaxes(0, 1).reshape(B, T),
        greedy.swapaxes(0, 1).reshape(B, T),
        state,
    )


__all__ = ["Score", "score_continuations"]
