"""Continuous batching: requests come and go in the rows of one batch that is being decoded."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from goose_jax.generation.decoding import (
    MAX_PIECE,
    NO_TOKEN,
    Progress,
    RowSettings,
    decode_block,
    init_progress,
    padded_length,
    place_rows,
    read_in_pieces,
    row_settings,
)
from goose_jax.generation.sampling import SamplingConfig, check_sampling
from goose_jax.generation.validation import (
    Ids,
    check_ids,
    check_max_new_tokens,
    check_prompt,
    check_seed,
)
from goose_jax.nn.model import RWKV7
from goose_jax.state import RWKV7State, check_state, init_state, join_states, take_rows
from pallas_kernels.validation import check_positive

type FinishReason = Literal["stop", "length", "cancelled"]

_MAX_PREFILL_TOKENS = 8 * MAX_PIECE
"""So many tokens are read at once at most, which bounds the memory that reading needs."""

_PREFILL_TOKENS = MAX_PIECE
"""When so many have been read between two blocks, the next block comes first."""

_IN_FLIGHT = 2
"""Blocks under way: the one whose tokens are waited for, and the next."""

_EMPTY_SLOT = SamplingConfig(temperature=0)  # needs neither random numbers nor sorting


@dataclasses.dataclass(frozen=True)
class RequestUpdate:
    """What came of one request in one block.

    Attributes:
      request: the id that `ContinuousBatch.submit` returned.
      tokens: the new ones, in order; there can be none only in a request's last update.
      finish_reason: None while more is to come. "stop": the next token would have been a stop
        token. "length": the request has all its `max_new_tokens`. "cancelled": it was cancelled.
      state: if the request asked for it and has finished, the state `[layers, 1, ...]` that has
        read its prompt and all tokens of its updates: `submit` it with what comes next. (Of a
        request that was cancelled while it was queued, the state it came with.)
    """

    request: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    state: RWKV7State | None = None


@dataclasses.dataclass(eq=False)
class _Request:
    """What is asked for, and how far it is.

    Attributes:
      id: of the request.
      prompt: `[T]`.
      max_new_tokens: as given.
      sampling: as given.
      stop_tokens: as given.
      seed: as given.
      state: that the prompt continues from, of one row.
      return_state: as given.
      is_read: whether its prompt has been read, and its row generates.
      cancelled: whether it shall end.
      finished: whether its last update has been made.
      dispatched: number of tokens for which blocks have been dispatched.
      received: number of tokens in its updates.
    """

    id: int
    prompt: Ids
    max_new_tokens: int
    sampling: SamplingConfig
    stop_tokens: Ids
    seed: int
    state: RWKV7State | None
    return_state: bool
    is_read: bool = False
    cancelled: bool = False
    finished: bool = False
    dispatched: int = 0
    received: int = 0


type _Slots = tuple[_Request | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """Requests whose prompts are read together, a piece at a time.

    Attributes:
      slots: where they will be decoded.
      requests: as many.
      pieces: reads the next piece; after the last it gives a row for each, and more for padding.
      tokens_per_piece: of all rows.
    """

    slots: tuple[int, ...]
    requests: tuple[_Request, ...]
    pieces: Iterator[Progress | None]
    tokens_per_piece: int


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block that has been dispatched.

    Attributes:
      tokens: `[slots, block]` int32, `NO_TOKEN` after the end of a sequence; may still be computed.
      slots: the request that each row generated for.
    """

    tokens: Int[Array, "slots block"]
    slots: _Slots


class ContinuousBatch:
    """Decodes many requests, which start and stop at different times, in one batch.

    The batch has a fixed number of slots; requests wait in a queue until one is free. A request
    gets the tokens that `generate` gives for its prompt alone, whatever runs beside it (up to
    rounding: matrix products of another batch size may differ in their last bit).

    One program decodes, of all slots at once; idle slots cost what busy ones do. (There are three
    of it: for batches that are greedy, that sample, and that sample from filtered probabilities.)
    Prompts are read in groups of similar length, padded to a power of two of rows, by the programs
    that `generate` reads prompts with; long ones in pieces, between which the other requests go on.
    Requests that come and go compile nothing anew.

    The device does not wait for Python: when a block's tokens are handed out, the next block is
    under way. A sequence that has ended is therefore noticed one block later, and its slot rests
    for one block before it is filled again.

    Not for several threads at once.

    Args:
      model: its parameters are passed to the compiled programs as arguments, as they are now.
      num_slots: most requests that are decoded at the same time.
      block_size: number of tokens that are generated between two returns to Python.
      implementation: of the step that reads a new token, as for `RWKV7.decode`.

    Raises:
      ValueError: naming the argument that is out of range.

    Example:
      >>> config = RWKV7Config(vocab_size=257, hidden_size=64, num_layers=1)
      >>> batch = ContinuousBatch(RWKV7(config, rngs=nnx.Rngs(0)), num_slots=2)
      >>> requests = [batch.submit([1, 2, 3], max_new_tokens=n) for n in (5, 50, 8)]
      >>> received = {request: [] for request in requests}
      >>> while batch.unfinished:
      ...     for update in batch.step():
      ...         received[update.request] += update.tokens
      >>> [len(received[request]) for request in requests]
      [5, 50, 8]
    """

    def __init__(
        self,
        model: RWKV7,
        *,
        num_slots: int = 8,
        block_size: int = 16,
        implementation: str | None = None,
    ):
        check_positive("num_slots", num_slots)
        check_positive("block_size", block_size)
        self._config = model.config
        self._graphdef, self._params = nnx.split(model)
        self._block_size = block_size
        self._implementation = implementation
        self._ids = itertools.count()
        self._queue: collections.deque[_Request] = collections.deque()
        self._unfinished: dict[int, _Request] = {}
        self._slots: list[_Request | None] = [None] * num_slots
        self._progress = init_progress(model.config, num_slots)
        self._start_of_text = init_state(model.config, 1)
        self._reading: collections.deque[_Reading] = collections.deque()
        self._in_flight: collections.deque[_Block] = collections.deque()
        self._decoded: _Slots = ()
        self._settings: RowSettings | None = None

    @property
    def unfinished(self) -> int:
        """Number of requests, queued ones included, of which more updates will come."""
        return len(self._unfinished)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        state: RWKV7State | None = None,
        return_state: bool = False,
    ) -> int:
        """Queues a request; `step` does the work.

        Args:
          prompt: token ids, one at least.
          max_new_tokens: the most tokens that are generated.
          sampling: how they are drawn; None draws from the model's distribution unchanged.
          stop_tokens: the sequence ends before the first of these; the stop token is neither
            returned nor read by the state.
          seed: in 0..2**32-1; the tokens are those of `generate` with this seed for the row.
          state: of one row, that the prompt continues from; None is the start of a text. It is not
            used up: many requests can continue from the same one.
          return_state: whether the last update shall have the state.

        Returns:
          The request's id, which no other request of this object has.

        Raises:
          TypeError: if `state` or `sampling` is something else.
          ValueError: naming the argument that is out of range.
        """
        sampling = SamplingConfig() if sampling is None else sampling
        check_sampling("sampling", sampling)
        check_max_new_tokens(max_new_tokens)
        if state is not None:
            check_state(state, self._config, 1)
        request = _Request(
            id=next(self._ids),
            prompt=check_prompt("prompt", prompt, self._config.vocab_size),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=check_ids("stop_tokens", stop_tokens, self._config.vocab_size),
            seed=check_seed(seed),
            state=state,
            return_state=return_state,
        )
        self._queue.append(request)
        self._unfinished[request.id] = request
        return request.id

    def cancel(self, request: int) -> None:
        """Ends a request: the next `step` has its last update.

        That update has the tokens of the block that is under way now, which its state has read.

        Raises:
          ValueError: if there is no such request, or its last update has been given.
        """
        if request not in self._unfinished:
            raise ValueError(f"request must be the id of an unfinished request, got {request!r}")
        self._unfinished[request].cancelled = True

    def step(self) -> list[RequestUpdate]:
        """Reads prompts for free slots, dispatches the next block, and waits for the one before it.

        Returns:
          An update of each request that took part in that block, or was cancelled before it could:
          at least one while there are `unfinished` requests.
        """
        updates = self._drop_cancelled()
        # A block in which all rows rested is not worth waiting for.
        while self._in_flight and not any(map(_is_running, self._in_flight[0].slots)):
            self._in_flight.popleft()
        while len(self._in_flight) < _IN_FLIGHT and self._dispatch():
            pass
        if self._in_flight:
            updates += self._receive(self._in_flight.popleft())
        return updates

    def _drop_cancelled(self) -> list[RequestUpdate]:
        """Ends what was cancelled before it could generate anything."""
        dropped = [
            request
            for request in self._unfinished.values()
            if request.cancelled and not request.is_read
        ]
        for request in dropped:
            if request in self._queue:
                self._queue.remove(request)
            else:
                self._slots[self._slots.index(request)] = None
        return [
            self._update(request, [], "cancelled", request.state if request.return_state else None)
            for request in dropped
        ]

    def _dispatch(self) -> bool:
        """Dispatches a block, unless no row has anything to generate in it."""
        self._admit()
        self._read_pieces()
        slots = self._generating()
        if slots is None:
            return False
        if slots != self._decoded:
            self._decoded, self._settings = slots, _settings_of(slots)
        self._progress, tokens = decode_block(
            self._graphdef,
            self._params,
            self._settings,
            self._progress,
            block_size=self._block_size,
            implementation=self._implementation,
        )
        tokens.copy_to_host_async()
        self._in_flight.append(_Block(tokens, slots))
        for request in filter(None, slots):
            request.dispatched += self._block_size
        return True

    def _generating(self) -> _Slots | None:
        """The requests whose rows are decoded, or None if no row has anything to generate."""
        slots = tuple(r if r and r.is_read and not r.cancelled else None for r in self._slots)
        return slots if any(r and r.dispatched < r.max_new_tokens for r in slots) else None

    def _admit(self) -> None:
        """Gives free slots to requests from the queue, whose prompts are then to be read."""
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        admitted = list(zip(free, self._queue, strict=False))
        for slot, request in admitted:
            self._slots[slot] = request
            self._queue.popleft()
        self._reading.extend(self._start_reading(*group) for group in _groups(admitted))

    def _start_reading(self, slots: Sequence[int], requests: Sequence[_Request]) -> _Reading:
        """The batch is padded to a power of two of rows, so that there are few sizes."""
        padding = _power_of_two(len(requests)) - len(requests)
        prompts = [request.prompt for request in requests] + [np.zeros(0, np.int32)] * padding
        start = self._start_of_text
        states = [start if request.state is None else request.state for request in requests]
        state = join_states(states + [start] * padding)
        longest = max(len(prompt) for prompt in prompts)
        return _Reading(
            slots=tuple(slots),
            requests=tuple(requests),
            pieces=read_in_pieces(self._graphdef, self._params, prompts, state),
            tokens_per_piece=len(prompts) * min(padded_length(longest), MAX_PIECE),
        )

    def _read_pieces(self) -> None:
        """Reads pieces of prompts, first come, first served.

        There are few between two blocks, so that long prompts do not stop the others; but all that
        there are if nothing else is to be done.
        """
        tokens = 0
        while self._reading and (tokens < _PREFILL_TOKENS or self._generating() is None):
            reading = self._reading[0]
            progress = None
            if any(not request.finished for request in reading.requests):
                progress = next(reading.pieces)
                tokens += reading.tokens_per_piece
                if progress is None:
                    continue
            self._reading.popleft()
            if progress is not None:
                self._place(reading, progress)

    def _place(self, reading: _Reading, progress: Progress) -> None:
        """Lets what has been read go on in its slots; that of requests cancelled meanwhile not."""
        nowhere = len(self._slots)
        rows = np.full(len(progress.stopped), nowhere, np.int32)
        for i, (slot, request) in enumerate(zip(reading.slots, reading.requests, strict=True)):
            if not request.finished:
                rows[i] = slot
                request.is_read = True
        self._progress = place_rows(self._progress, progress, rows)

    def _receive(self, block: _Block) -> list[RequestUpdate]:
        updates = []
        for slot, (row, request) in enumerate(
            zip(np.asarray(block.tokens), block.slots, strict=True)
        ):
            if request is None or request.finished:
                continue
            tokens = row[row != NO_TOKEN].tolist()
            request.received += len(tokens)
            reason = self._finish_reason(request, len(tokens))
            state = None
            if reason is not None:
                self._slots[slot] = None
                # Later blocks that are under way have let the row rest.
                if request.return_state:
                    state = take_rows(self._progress.state, [slot])
            updates.append(self._update(request, tokens, reason, state))
        return updates

    def _finish_reason(self, request: _Request, num_new: int) -> FinishReason | None:
        if request.received == request.max_new_tokens:
            return "length"
        if num_new < self._block_size:
            return "stop"
        more_to_come = any(request in block.slots for block in self._in_flight)
        return "cancelled" if request.cancelled and not more_to_come else None

    def _update(
        self,
        request: _Request,
        tokens: list[int],
        reason: FinishReason | None,
        state: RWKV7State | None,
    ) -> RequestUpdate:
        if reason is not None:
            request.finished = True
            del self._unfinished[request.id]
        return RequestUpdate(request.id, tokens, reason, state)


def _is_running(request: _Request | None) -> bool:
    return request is not None and not request.finished


def _settings_of(slots: _Slots) -> RowSettings:
    none = np.zeros(0, np.int32)
    return row_settings(
        seeds=[(r.seed if r else 0, 0) for r in slots],
        sampling=[r.sampling if r else _EMPTY_SLOT for r in slots],
        stop_tokens=[r.stop_tokens if r else none for r in slots],
        limits=[r.max_new_tokens if r else 0 for r in slots],
    )


def _groups(
    admitted: Iterable[tuple[int, _Request]],
) -> Iterable[tuple[tuple[int, ...], tuple[_Request, ...]]]:
    """Slots and requests that are read together: of one padded length, and not too many."""
    by_length: dict[int, list[tuple[int, _Request]]] = {}
    for slot, request in admitted:
        by_length.setdefault(padded_length(len(request.prompt)), []).append((slot, request))
    for length, members in by_length.items():
        most = _MAX_PREFILL_TOKENS // min(length, MAX_PIECE)
        for group in itertools.batched(members, most):
            slots, requests = zip(*group, strict=True)
            yield slots, requests


def _power_of_two(number: int) -> int:
    """The first that is not less."""
    return 1 << (number - 1).bit_length()
