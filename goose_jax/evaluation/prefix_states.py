"""Reads texts so that what several of them begin with is read once."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from goose_jax.evaluation.prefix_plan import START, Reading, plan_prefixes
from goose_jax.generation.decoding import MAX_PIECE, padded_length, read_prompts
from goose_jax.generation.validation import Ids
from goose_jax.nn import DecodingWeights
from goose_jax.state import RWKV7State, init_state

_MAX_TOKENS = 8 * MAX_PIECE
"""Maximum number of tokens that are read at once. It bounds the memory for reading."""


class PrefixStates:
    """The states after the common beginnings of texts, each read once.

    Args:
      weights: the model.
      texts: token ids of each text.
      batch_size: maximum number of rows that are read at once.
      state: state of one row that all texts continue from; None is the start of a text.
    """

    def __init__(
        self,
        weights: DecodingWeights,
        texts: Sequence[Ids],
        *,
        batch_size: int,
        state: RWKV7State | None = None,
    ):
        self._weights = weights
        self._texts = texts
        self._batch_size = batch_size
        self._plan = plan_prefixes(texts, batch_size)
        start = init_state(weights.config, 1) if state is None else state
        num_slots = _power_of_two(self._plan.num_slots)  # few programs are compiled
        empty = jax.eval_shape(lambda: init_state(weights.config, num_slots))
        self._slots = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty)
        self._slots = _place(self._slots, start, np.array([START], np.int32))

    def groups(self) -> Iterator[list[Reading]]:
        """Yields what is left of the texts, by groups, when the states before them have been read.

        The states of a group are there until the next group is asked for. Each text is in one
        group.
        """
        for group in self._plan.groups:
            for level in group.levels:
                for batch in batches(level, self._batch_size):
                    self._read(batch)
            yield group.rests

    def states(self, readings: Sequence[Reading], num_rows: int | None = None) -> RWKV7State:
        """Returns the states before some readings, as rows of one state.

        Args:
          readings: readings of the current group.
          num_rows: number of rows; those after the readings are the start of a text. None means one
            row for each reading.
        """
        sources = [reading.source for reading in readings]
        padding = 0 if num_rows is None else num_rows - len(sources)
        return _gather(self._slots, np.array(sources + [START] * padding, np.int32))

    def _read(self, batch: Sequence[Reading]) -> None:
        rows = _power_of_two(len(batch))
        prompts = [self._texts[r.text][r.begin : r.end] for r in batch]
        prompts += [np.zeros(0, np.int32)] * (rows - len(batch))
        state = read_prompts(self._weights, prompts, self.states(batch, rows)).state
        nowhere = len(jax.tree.leaves(self._slots)[0][0])
        targets = [nowhere if r.target is None else r.target for r in batch]
        targets += [nowhere] * (rows - len(batch))
        self._slots = _place(self._slots, state, np.array(targets, np.int32))


def batches(readings: Sequence[Reading], batch_size: int) -> Iterator[list[Reading]]:
    """Yields readings that are read together: of similar length, and not too many tokens.

    Args:
      readings: the readings.
      batch_size: maximum number of readings in a batch.
    """
    batch: list[Reading] = []
    for reading in sorted(readings, key=lambda r: r.end - r.begin):
        tokens = (len(batch) + 1) * min(padded_length(reading.end - reading.begin), MAX_PIECE)
        if batch and (len(batch) == batch_size or tokens > _MAX_TOKENS):
            yield batch
            batch = []
        batch.append(reading)
    if batch:
        yield batch


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@jax.jit
def _gather(slots: RWKV7State, rows: Int[Array, " n"]) -> RWKV7State:
    return jax.tree.map(lambda leaf: leaf[:, rows], slots)


def _place_rows(slots: RWKV7State, new: RWKV7State, rows: Int[Array, " n"]) -> RWKV7State:
    return jax.tree.map(lambda old, value: old.at[:, rows].set(value, mode="drop"), slots, new)


_place = jax.jit(_place_rows, donate_argnums=0)


__all__ = ["PrefixStates", "batches"]
