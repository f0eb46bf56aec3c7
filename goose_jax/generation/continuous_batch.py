"""Continuous batching: requests start and end independently in the rows of one running batch."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Array, Int

from goose_jax.generation.decoding import (
    MAX_PIECE,
    NOT_FINITE,
    Progress,
    RowSettings,
    decode_block,
    init_progress,
    padded_length,
    place_rows,
    read_in_pieces,
    row_settings,
)
from goose_jax.generation.non_finite import non_finite_logits
from goose_jax.generation.sampling import SamplingConfig, check_sampling
from goose_jax.generation.validation import (
    Ids,
    check_ids,
    check_max_new_tokens,
    check_prompt,
    check_seed,
)
from goose_jax.nn import RWKV7, DecodingWeights, prepare_decoding
from goose_jax.state import RWKV7State, check_state, init_state, join_states, take_rows
from pallas_kernels.validation import check_positive

type FinishReason = Literal["stop", "length", "cancelled"]
"""Why a request ended: by a stop token, at its greatest length, or because it was cancelled."""

_MAX_PREFILL_TOKENS = 8 * MAX_PIECE
"""Maximum number of prompt tokens that are read at once. It bounds the memory for reading."""

_PREFILL_TOKENS = MAX_PIECE
"""After reading this many prompt tokens, a block is decoded before more are read."""

_IN_FLIGHT = 2
"""Number of dispatched blocks: the one whose tokens are waited for, and the next one."""

_EMPTY_SLOT = SamplingConfig(temperature=0)  # greedy: no random numbers and no sorting


@dataclasses.dataclass(frozen=True)
class RequestUpdate:
    """The progress of one request in one block.

    Attributes:
      request: id of the request, which `ContinuousBatch.submit` returned.
      tokens: the new tokens in order. Only the last update of a request can have none.
      finish_reason: None while the request continues. "stop": the next token would have been a stop
        token. "length": the request has all of its `max_new_tokens`. "cancelled": the request was
        cancelled.
      state: recurrent state `[layers, 1, ...]` after the prompt and all tokens of the updates. It
        is given only in the last update, if the request asked for it. Pass it to `submit` with the
        text that comes next. A request that was cancelled before its prompt was read returns the
        state that it was submitted with.
    """

    request: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    state: RWKV7State | None = None


@dataclasses.dataclass(eq=False)
class _Request:
    """A request and its progress.

    Attributes:
      id: id of the request.
      prompt: `[T]` token ids.
      max_new_tokens: maximum number of new tokens.
      sampling: how tokens are drawn.
      stop_tokens: tokens that end the sequence.
      seed: seed of the random numbers.
      state: state of one row that the prompt continues from; None is the start of a text.
      return_state: whether the last update carries the state.
      is_read: whether the prompt has been read, so that its row generates.
      cancelled: whether the request is to end.
      finished: whether the last update has been made.
      dispatched: number of tokens in the blocks that have been dispatched.
      received: number of tokens in the updates.
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
      slots: the slot of each request.
      requests: the requests.
      pieces: reads the next piece. After the last piece it yields the progress of one row for each
        request, followed by rows of padding.
      tokens_per_piece: number of tokens in a piece of all rows.
    """

    slots: tuple[int, ...]
    requests: tuple[_Request, ...]
    pieces: Iterator[Progress | None]
    tokens_per_piece: int


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block that has been dispatched.

    Attributes:
      tokens: `[slots, block]` int32, as `decode_block` returns them. They may not be computed yet.
      slots: the request of each row, or None for a row that generates nothing.
    """

    tokens: Int[Array, "slots block"]
    slots: _Slots


class ContinuousBatch:
    """Decodes many requests, which start and end at different times, in one batch.

    The batch has a fixed number of slots. Requests wait in a queue until a slot is free. A request
    gets the tokens that `generate` gives for its prompt alone, whatever runs beside it. (Up to
    rounding: matrix products of another batch size may differ in their last bit.)

    One compiled program decodes all slots at once; an idle slot costs as much as a busy one. (There
    are three variants: for greedy batches, for batches that sample, and for batches that sample
    from filtered probabilities.) The programs of `generate` read the prompts: prompts of one padded
    length together, padded to a power of two of rows. Long prompts are read in pieces, between
    which the other requests continue. Once these programs are compiled, new requests compile
    nothing.

    The device does not wait for Python: when the tokens of a block are handed out, the next block
    has been dispatched. The end of a sequence is therefore noticed one block later, and its slot is
    idle for one block before it is filled again.

    An object must not be used by several threads at once.

    Args:
      model: the model, or `prepare_decoding(model)`. Its matrices are cast to the compute dtype
        here, once. Later changes of the model's parameters have no effect.
      num_slots: maximum number of requests that are decoded at the same time.
      block_size: number of tokens that are generated before control returns to Python.
      implementation: implementation of the decoding step, a name that `RWKV7.decode` accepts.

    Raises:
      ValueError: if an argument is out of range. The message names the argument.

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
        model: RWKV7 | DecodingWeights,
        *,
        num_slots: int = 8,
        block_size: int = 16,
        implementation: str | None = None,
    ):
        check_positive("num_slots", num_slots)
        check_positive("block_size", block_size)
        self._config = model.config
        self._weights = prepare_decoding(model)
        self._block_size = block_size
        self._implementation = self._weights.decode_implementation(implementation)
        self._ids = itertools.count()
        self._queue: collections.deque[_Request] = collections.deque()
        self._unfinished: dict[int, _Request] = {}
        self._slots: list[_Request | None] = [None] * num_slots
        self._progress = init_progress(model.config, num_slots)
        self._start_of_text = init_state(model.config, 1)
        self._reading: collections.deque[_Reading] = collections.deque()
        self._in_flight: collections.deque[_Block] = collections.deque()
        self._delayed: list[RequestUpdate] = []
        self._decoded: _Slots = ()
        self._settings: RowSettings | None = None

    @property
    def unfinished(self) -> int:
        """Number of requests, in the queue too, whose last update `step` has not returned."""
        return len(self._unfinished) + sum(u.finish_reason is not None for u in self._delayed)

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
        """Queues a request, which `step` works on.

        Args:
          prompt: at least one token id.
          max_new_tokens: maximum number of new tokens.
          sampling: how tokens are drawn. None draws from the model's distribution unchanged.
          stop_tokens: the sequence ends before the first of these tokens. The stop token is neither
            returned nor read by the state.
          seed: integer in 0..2**32-1. The tokens are those that `generate` gives with `[seed]`.
          state: state of one row that the prompt continues from. None is the start of a text. The
            state is not consumed: several requests can continue from the same one.
          return_state: whether the last update carries the state.

        Returns:
          The id of the request, which no other request of this object has.

        Raises:
          TypeError: if `state` or `sampling` has the wrong type.
          ValueError: if an argument is out of range. The message names the argument.
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
        """Ends a request. The next `step` returns its last update.

        That update has the tokens of the block that has been dispatched, and its state has read
        them.

        Args:
          request: id of the request.

        Raises:
          ValueError: if there is no such request, or it has finished.
        """
        if request not in self._unfinished:
            raise ValueError(f"request must be the id of an unfinished request, got {request!r}")
        self._unfinished[request].cancelled = True

    def step(self) -> list[RequestUpdate]:
        """Reads prompts for free slots, dispatches the next block, and waits for the one before.

        Returns:
          An update of each request that took part in the block that was waited for, and of each
          request that was cancelled before it generated anything. There is at least one update
          while `unfinished` is not 0.

        Raises:
          NonFiniteLogitsError: if the logits of requests are NaN or infinite. These requests, the
            ids of which are in the error's `failed`, have ended without an update. The others go
            on: the next `step` returns their updates.
        """
        if self._delayed:
            updates, self._delayed = self._delayed, []
            return updates
        updates = self._drop_cancelled()
        # A block in which no row generated is not worth waiting for.
        while self._in_flight and not any(map(_is_running, self._in_flight[0].slots)):
            self._in_flight.popleft()
        while len(self._in_flight) < _IN_FLIGHT and self._dispatch():
            pass
        if self._in_flight:
            received, failed = self._receive(self._in_flight.popleft())
            updates += received
            if failed:
                self._delayed = updates
                raise non_finite_logits(self._weights, "request", failed)
        return updates

    def _drop_cancelled(self) -> list[RequestUpdate]:
        """Ends requests that were cancelled before they generated anything."""
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
        """Dispatches a block. Returns False if no row has tokens to generate."""
        self._admit()
        self._read_pieces()
        slots = self._generating()
        if slots is None:
            return False
        if self._settings is None or slots != self._decoded:
            self._decoded, self._settings = slots, _settings_of(slots)
        self._progress, tokens = decode_block(
            self._weights,
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
        """Returns the requests whose rows are decoded, or None if no row has tokens to generate."""
        slots = tuple(r if r and r.is_read and not r.cancelled else None for r in self._slots)
        return slots if any(r and r.dispatched < r.max_new_tokens for r in slots) else None

    def _admit(self) -> None:
        """Gives free slots to requests from the queue, and starts to read their prompts."""
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        admitted = list(zip(free, self._queue, strict=False))
        for slot, request in admitted:
            self._slots[slot] = request
            self._queue.popleft()
        self._reading.extend(self._start_reading(*group) for group in _groups(admitted))

    def _start_reading(self, slots: Sequence[int], requests: Sequence[_Request]) -> _Reading:
        """Starts to read prompts. The batch is padded to a power of two of rows: few programs."""
        padding = _power_of_two(len(requests)) - len(requests)
        prompts = [request.prompt for request in requests] + [np.zeros(0, np.int32)] * padding
        start = self._start_of_text
        states = [start if request.state is None else request.state for request in requests]
        state = join_states(states + [start] * padding)
        longest = max(len(prompt) for prompt in prompts)
        return _Reading(
            slots=tuple(slots),
            requests=tuple(requests),
            pieces=read_in_pieces(self._weights, prompts, state),
            tokens_per_piece=len(prompts) * min(padded_length(longest), MAX_PIECE),
        )

    def _read_pieces(self) -> None:
        """Reads pieces of prompts in the order of the requests.

        It stops after `_PREFILL_TOKENS` tokens, so that long prompts do not hold up the requests
        that generate. If no request generates, it continues until one does.
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
        """Puts the rows whose prompts have been read in their slots, except cancelled requests."""
        nowhere = len(self._slots)
        rows = np.full(len(progress.stopped), nowhere, np.int32)
        for i, (slot, request) in enumerate(zip(reading.slots, reading.requests, strict=True)):
            if not request.finished:
                rows[i] = slot
                request.is_read = True
        self._progress = place_rows(self._progress, progress, rows)

    def _receive(self, block: _Block) -> tuple[list[RequestUpdate], list[int]]:
        """Waits for a block.

        Returns:
          An update of each request that generated in it, and the ids of the requests whose logits
          are NaN or infinite.
        """
        updates, failed = [], []
        for slot, (row, request) in enumerate(
            zip(np.asarray(block.tokens), block.slots, strict=True)
        ):
            if request is None or request.finished:
                continue
            if NOT_FINITE in row:
                failed.append(request.id)
                self._slots[slot] = None
                self._end(request)
                continue
            tokens = row[row >= 0].tolist()
            request.received += len(tokens)
            reason = self._finish_reason(request, len(tokens))
            state = None
            if reason is not None:
                self._slots[slot] = None
                # The blocks dispatched since then have not changed the state of this row.
                if request.return_state:
                    state = take_rows(self._progress.state, [slot])
            updates.append(self._update(request, tokens, reason, state))
        return updates, failed

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
            self._end(request)
        return RequestUpdate(request.id, tokens, reason, state)

    def _end(self, request: _Request) -> None:
        request.finished = True
        del self._unfinished[request.id]


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
    """Yields slots and requests that are read together: one padded length, and not too many."""
    by_length: dict[int, list[tuple[int, _Request]]] = {}
    for slot, request in admitted:
        by_length.setdefault(padded_length(len(request.prompt)), []).append((slot, request))
    for length, members in by_length.items():
        most = _MAX_PREFILL_TOKENS // min(length, MAX_PIECE)
        for group in itertools.batched(members, most):
            slots, requests = zip(*group, strict=True)
            yield slots, requests


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
