import dataclasses
import itertools
import logging
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax.generation import (
    ContinuousBatch,
    NonFiniteLogitsError,
    SamplingConfig,
    continuous_batch,
    decoding,
    generate,
    prefill,
)
from goose_jax.nn import RWKV7
from goose_jax.state import init_state, take_rows
from tests.goose_jax.decoding import (
    CONFIG,
    GREEDY,
    VOCAB,
    WARM,
    WatchedBlocks,
    assert_states_agree,
    random_model,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

PLAIN = SamplingConfig()
BLOCK = 4
REQUESTS = [  # more than there are slots, and no two alike
    {"prompt": [5], "max_new_tokens": 30, "sampling": GREEDY},
    {"prompt": [7, 8, 9, 7, 8], "max_new_tokens": 3, "sampling": WARM, "seed": 3},
    {"prompt": list(range(30)), "max_new_tokens": 17, "sampling": PLAIN, "seed": 1},
    {"prompt": [1], "max_new_tokens": 8, "sampling": GREEDY},  # two blocks exactly
    {"prompt": [2, 3], "max_new_tokens": 40, "sampling": WARM, "seed": 3, "stop_tokens": [3, 30]},
    {"prompt": list(range(16)), "max_new_tokens": 1, "sampling": PLAIN, "seed": 2**32 - 1},
    {"prompt": [5], "max_new_tokens": 30, "sampling": GREEDY, "stop_tokens": [3, 30]},
    {"prompt": [6] * 17, "max_new_tokens": 25, "sampling": WARM, "stop_tokens": range(70, 78)},
    {"prompt": [5], "max_new_tokens": 21, "sampling": PLAIN, "seed": 9},
]


@pytest.fixture(scope="module")
def model():
    return random_model(0)


def alone_of(model, prompt, **settings):
    return generate(model, [prompt], block_size=BLOCK, **settings)


@pytest.fixture(scope="module")
def alone(model):
    """What `generate` gives for each of `REQUESTS`."""

    return [alone_of(model, **request) for request in REQUESTS]


@pytest.fixture
def batch(model):
    return ContinuousBatch(model, num_slots=3, block_size=BLOCK)


class Received:
    """Runs a batch to its end and collects what comes."""

    def __init__(self, batch):
        self.batch = batch
        self.tokens = {}
        self.last = {}

    def step(self):
        updates = self.batch.step()
        assert len({update.request for update in updates}) == len(updates)
        for update in updates:
            assert update.request not in self.last
            assert update.tokens or update.finish_reason
            assert update.finish_reason or update.state is None
            self.tokens.setdefault(update.request, []).extend(update.tokens)
            if update.finish_reason:
                self.last[update.request] = update
        return updates

    def run(self):
        while self.batch.unfinished:
            assert self.step()
        assert self.batch.step() == []
        return self

    @property
    def reasons(self):
        return {request: update.finish_reason for request, update in self.last.items()}


def submit(batch, index, **others):
    return batch.submit(**(REQUESTS[index] | others))


def expected_reason(result):
    return "length" if result.lengths[0] == result.tokens.shape[1] else "stop"


@pytest.mark.parametrize("num_slots", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_requests_get_the_tokens_that_they_get_alone(model, alone, num_slots):
    batch = ContinuousBatch(model, num_slots=num_slots, block_size=BLOCK)
    received = Received(batch)
    requests = [submit(batch, i, return_state=i % 2 == 0) for i in range(6)]
    for i in range(6, len(REQUESTS)):  # these arrive while others run
        received.step()
        requests.append(submit(batch, i, return_state=i % 2 == 0))
    received.run()
    assert requests == sorted(set(requests))
    for i, (request, result) in enumerate(zip(requests, alone, strict=True)):
        assert received.tokens[request] == result.sequences[0]
        assert received.reasons[request] == expected_reason(result)
        state = received.last[request].state
        assert (state is not None) == (i % 2 == 0)
        if state is not None:
            assert_states_agree(state, result.state)
    assert {expected_reason(result) for result in alone} == {"stop", "length"}
    assert {len(row) for result in alone for row in result.sequences} >= {1, 3, 8, 17, 30}


def test_a_slot_that_is_filled_again_gives_the_same_tokens(model, alone):
    batch = ContinuousBatch(model, num_slots=1, block_size=BLOCK)
    order = [4, 7, 4, 2, 4]
    requests = [submit(batch, i) for i in order]
    received = Received(batch).run()
    for i, request in zip(order, requests, strict=True):
        assert received.tokens[request] == alone[i].sequences[0]


@pytest.mark.slow
def test_any_block_size_gives_the_same_tokens(model, alone):
    batch = ContinuousBatch(model, num_slots=2, block_size=7)
    order = (4, 7, 1, 4, 7)  # of one way of sampling
    requests = [submit(batch, i) for i in order]
    received = Received(batch).run()
    for i, request in zip(order, requests, strict=True):
        assert received.tokens[request] == alone[i].sequences[0]


def test_a_request_that_runs_can_be_cancelled(model, batch, alone):
    requests = [submit(batch, i, return_state=True) for i in (0, 2, 4, 8, 7)]
    received = Received(batch)
    received.step()
    received.step()
    batch.cancel(requests[0])
    batch.cancel(requests[0])  # again: that changes nothing
    updates = {update.request: update for update in received.step()}
    assert updates[requests[0]].finish_reason == "cancelled"
    new = received.tokens[requests[0]]
    assert len(new) == 3 * BLOCK  # the block under way was still received
    assert new == alone[0].sequences[0][: 3 * BLOCK]
    state = updates[requests[0]].state
    with pytest.raises(ValueError, match=f"id of an unfinished request, got {requests[0]}"):
        batch.cancel(requests[0])

    received.run()  # its slot is filled again meanwhile
    assert_states_agree(state, prefill(model, [REQUESTS[0]["prompt"] + new]))
    for i, request in zip((2, 4, 8, 7), requests[1:], strict=True):
        assert received.tokens[request] == alone[i].sequences[0]
        assert received.reasons[request] == expected_reason(alone[i])


def test_a_request_in_the_queue_can_be_cancelled(model, batch, alone):
    state = prefill(model, [[1, 2]])
    running = [submit(batch, i) for i in (0, 2, 8)]
    queued = [submit(batch, 1, state=state, return_state=keep) for keep in (True, False)]
    received = Received(batch)
    received.step()
    for request in queued:
        batch.cancel(request)
    received.step()
    assert [received.tokens[request] for request in queued] == [[], []]
    assert [received.reasons[request] for request in queued] == ["cancelled"] * 2
    assert [received.last[request].state for request in queued] == [state, None]
    received.run()
    for i, request in zip((0, 2, 8), running, strict=True):
        assert received.tokens[request] == alone[i].sequences[0]


def test_all_requests_can_be_cancelled(batch, alone):
    received = Received(batch)
    for _ in range(2):
        requests = [submit(batch, i) for i in (0, 2, 4, 7)]
        received.step()
        for request in requests:
            batch.cancel(request)
        assert len(received.step()) == 4
        assert batch.unfinished == 0
        assert received.step() == []
    request = submit(batch, 7)
    assert received.run().tokens[request] == alone[7].sequences[0]


def test_a_request_that_ends_by_itself_was_not_cancelled(batch):
    request = submit(batch, 3)
    received = Received(batch)
    received.step()
    batch.cancel(request)  # its last block is under way
    received.run()
    assert received.reasons == {request: "length"}
    assert len(received.tokens[request]) == 8


def test_many_requests_continue_from_one_state(model, batch):
    prefix = list(range(20, 30))
    state = prefill(model, [prefix])
    kept = jax.tree.map(np.array, state)
    asked = [([1, 2, 3], 0), ([4], 1), ([1, 2, 3], 2), ([5] * 6, 3)]
    settings = {"max_new_tokens": 12, "sampling": WARM}
    requests = [
        batch.submit(rest, seed=seed, state=state, return_state=True, **settings)
        for rest, seed in asked
    ]
    other = submit(batch, 0)  # beside them, one from the start of a text
    received = Received(batch).run()
    chex.assert_trees_all_equal(state, kept)
    for request, (rest, seed) in zip(requests, asked, strict=True):
        whole = alone_of(model, prefix + rest, seed=seed, **settings)
        assert received.tokens[request] == whole.sequences[0]
        assert_states_agree(received.last[request].state, whole.state)
    assert len(received.tokens[other]) == 30

    # And from what they ended with.
    again = [
        batch.submit([9], seed=7, state=received.last[request].state, **settings)
        for request in requests
    ]
    received.run()
    for request, (rest, _), before in zip(again, asked, requests, strict=True):
        read = prefix + rest + received.tokens[before] + [9]
        whole = alone_of(model, read, seed=7, **settings)
        assert received.tokens[request] == whole.sequences[0]


def test_the_next_block_is_dispatched_before_tokens_are_waited_for(model, monkeypatch):
    watched = WatchedBlocks(continuous_batch.decode_block)
    monkeypatch.setattr(continuous_batch, "decode_block", watched)
    batch = ContinuousBatch(model, num_slots=3, block_size=BLOCK)
    submit(batch, 8, max_new_tokens=4 * BLOCK)
    Received(batch).run()
    expected = [("dispatch", 0), ("copy", 0)]
    for i in (1, 2, 3):
        expected += [("dispatch", i), ("copy", i), ("wait", i - 1)]
    assert watched.events == [*expected, ("wait", 3)]  # and no block that no request needs

    del watched.events[:]
    request = submit(batch, 8, stop_tokens=range(VOCAB))  # stops at once
    received = Received(batch).run()
    assert (received.tokens, received.reasons) == ({request: []}, {request: "stop"})
    names = [name for name, _ in watched.events]
    assert names == ["dispatch", "copy"] * 2 + ["wait"]
    del watched.events[:]
    submit(batch, 3)  # two blocks; that in which all rows rested is not waited for
    Received(batch).run()
    assert [event for event in watched.events if event[0] == "wait"] == [("wait", 6), ("wait", 7)]


def test_requests_whose_logits_are_not_finite_end_with_an_error(model, batch, alone):
    cached = prefill(model, [[5]])
    spoilt = dataclasses.replace(cached, wkv=cached.wkv.at[0, 0, 0, 0, 0].set(math.nan))
    ids = [batch.submit(**request) for request in REQUESTS[:2]]
    failing = batch.submit([5], max_new_tokens=9, state=spoilt, return_state=True)
    failing_too = batch.submit([5, 6], max_new_tokens=9, sampling=GREEDY, state=spoilt)
    last = batch.submit(**REQUESTS[3])
    received = {request: [] for request in [*ids, last]}
    failed, messages, reasons = [], [], {}
    while batch.unfinished:
        try:
            updates = batch.step()
        except NonFiniteLogitsError as error:
            messages.append(str(error))
            failed += error.failed
            continue
        assert updates
        for update in updates:
            received[update.request] += update.tokens
            reasons[update.request] = update.finish_reason
    assert failed == [failing, failing_too]
    assert messages[0].startswith(
        f"the model gave NaN or infinite logits for request {failing}: all parameters are finite"
    )
    assert [received[r] for r in [*ids, last]] == [alone[i].sequences[0] for i in (0, 1, 3)]
    assert set(reasons.values()) == {"length"}
    with pytest.raises(ValueError, match="must be the id of an unfinished request"):
        batch.cancel(failing)


def test_the_last_updates_are_not_lost_in_the_block_of_an_error(model, batch):
    cached = prefill(model, [[5]])
    spoilt = dataclasses.replace(cached, wkv=cached.wkv.at[0, 0, 0, 0, 0].set(math.nan))
    good = batch.submit([5], max_new_tokens=2, sampling=GREEDY)
    batch.submit([5], max_new_tokens=2, sampling=GREEDY, state=spoilt)
    with pytest.raises(NonFiniteLogitsError):
        batch.step()
    assert batch.unfinished == 1
    (update,) = batch.step()
    assert (update.request, len(update.tokens), update.finish_reason) == (good, 2, "length")
    assert batch.unfinished == 0
    assert batch.step() == []


def test_requests_that_come_and_go_compile_nothing(model, caplog):
    batch = ContinuousBatch(model, num_slots=3, block_size=BLOCK)

    def run(*groups):
        received = Received(batch)
        for group in groups:
            for i in group:
                submit(batch, i, return_state=True)
            received.step()
        received.run()

    for same_length in ((0, 1, 8), (2, 7, 2)):
        for size in (1, 2, 3):
            run(same_length[:size])
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for order in itertools.permutations((2, 4, 8, 0)):
            run(order[:1], order[1:3], order[3:], [1, 6])
    assert not [message for message in caplog.messages if "ompil" in message]


def test_one_program_decodes_for_generate_and_for_slots(model, monkeypatch):
    traces = []
    hidden = RWKV7.hidden

    def counted(self, tokens, *args):
        traces.append(tokens.shape)
        return hidden(self, tokens, *args)

    monkeypatch.setattr(RWKV7, "hidden", counted)
    settings = {"max_new_tokens": 7, "sampling": WARM}
    result = generate(model, [[1]] * 4, seed=range(4), block_size=3, **settings)
    batch = ContinuousBatch(model, num_slots=4, block_size=3)
    requests = [batch.submit([1], seed=seed, **settings) for seed in range(4)]
    received = Received(batch).run()
    assert traces.count((4, 1)) == 1  # of a size that no other test has
    assert [received.tokens[request] for request in requests] == result.sequences


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIECE", 32)
    monkeypatch.setattr(continuous_batch, "MAX_PIECE", 32)
    monkeypatch.setattr(continuous_batch, "_PREFILL_TOKENS", 32)


@pytest.mark.usefixtures("small_pieces")
def test_requests_go_on_while_a_long_prompt_is_read(model, alone):
    batch = ContinuousBatch(model, num_slots=3, block_size=BLOCK)
    busy = {"prompt": [5], "max_new_tokens": 60, "sampling": GREEDY}
    short = batch.submit(**busy)  # 15 blocks
    received = Received(batch)
    received.step()
    prompt = [token % VOCAB for token in range(200)]  # 7 pieces
    settings = {"max_new_tokens": 6, "sampling": WARM, "seed": 5}
    long = batch.submit(prompt, return_state=True, **settings)
    cancelled = batch.submit(prompt[:150], max_new_tokens=5, return_state=True)
    order = []
    while batch.unfinished:
        updates = {update.request: update for update in received.step()}
        order.append(sorted(updates))
        if len(order) == 3:
            batch.cancel(cancelled)  # while its prompt is read, or waits
            submit(batch, 1)  # gets its slot
    assert order[:6] == [[short]] * 3 + [[short, cancelled]] + [[short]] * 2
    assert [short, long] in order  # it began before the other one's end
    assert received.tokens[short] == alone_of(model, **busy).sequences[0]
    assert received.tokens[cancelled + 1] == alone[1].sequences[0]
    expected = alone_of(model, prompt, **settings)
    assert received.tokens[long] == expected.sequences[0]
    assert_states_agree(received.last[long].state, expected.state)
    assert received.reasons[cancelled] == "cancelled"
    assert received.last[cancelled].state is None  # it came with none
    assert received.tokens[cancelled] == []


@pytest.mark.usefixtures("small_pieces")
def test_a_long_prompt_alone_is_read_at_once(model):
    batch = ContinuousBatch(model, num_slots=3, block_size=BLOCK)
    prompts = [[token % VOCAB for token in range(length)] for length in (200, 100)]
    requests = [batch.submit(p, max_new_tokens=BLOCK, sampling=GREEDY) for p in prompts]
    received = Received(batch)
    first = received.step()
    assert [update.request for update in first] == requests[:1]
    received.run()
    for request, prompt in zip(requests, prompts, strict=True):
        expected = alone_of(model, prompt, max_new_tokens=BLOCK, sampling=GREEDY)
        assert received.tokens[request] == expected.sequences[0]


@pytest.mark.slow
def test_prompts_are_read_in_groups_of_one_length_and_bounded_size(model, monkeypatch):
    shapes = []
    read_piece = decoding.read_piece

    def recorded(graphdef, params, tokens, *args):
        shapes.append(tokens.shape)
        return read_piece(graphdef, params, tokens, *args)

    monkeypatch.setattr(decoding, "read_piece", recorded)
    monkeypatch.setattr(decoding, "MAX_PIECE", 32)
    monkeypatch.setattr(continuous_batch, "MAX_PIECE", 32)
    monkeypatch.setattr(continuous_batch, "_MAX_PREFILL_TOKENS", 64)
    monkeypatch.setattr(continuous_batch, "_PREFILL_TOKENS", 10**6)
    batch = ContinuousBatch(model, num_slots=16, block_size=BLOCK)
    lengths = [1, 40, 16, 3, 70, 20, 5, 31, 2, 17]
    prompts = [[length] * length for length in lengths]
    requests = [batch.submit(p, max_new_tokens=5, sampling=GREEDY) for p in prompts]
    received = Received(batch).run()
    # 1, 16, 3, 5 and 2 are padded to 16 tokens and read four at a time, 20, 31 and 17 two by two.
    expected = [(4, 16), (1, 16)] + [(1, 32)] * 2 + [(1, 32)] * 3 + [(2, 32), (1, 32)]
    assert shapes == expected
    for request, prompt in zip(requests, prompts, strict=True):
        result = alone_of(model, prompt, max_new_tokens=5, sampling=GREEDY)
        assert received.tokens[request] == result.sequences[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, r"prompt must hold at least one token, got \[\]"),
        ({"prompt": "text"}, "prompt must be .*encode text first.*'text'"),
        ({"prompt": [[1]]}, r"prompt must be a sequence of token ids, got \[\[1\]\]"),
        ({"prompt": [VOCAB]}, r"prompt must hold ids in 0\.\.96, got 97"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": 2**31}, r"max_new_tokens must be less than 2\*\*31, got 2147483648"),
        ({"stop_tokens": [-1]}, r"stop_tokens must hold ids in 0\.\.96, got -1"),
        ({"seed": -1}, r"seed must lie in 0\.\.2\*\*32-1, got -1"),
        ({"seed": [1]}, r"seed must lie in 0\.\.2\*\*32-1, got \[1\]"),
        ({"state": init_state(CONFIG, 2)}, r"state\.time_shift must have shape .* B=1"),
    ],
)
def test_wrong_arguments_are_named(batch, wrong, message):
    with pytest.raises(ValueError, match=message):
        batch.submit(**({"prompt": [1], "max_new_tokens": 1} | wrong))
    assert batch.unfinished == 0


def test_wrong_types_sizes_and_ids_are_named(model, batch):
    with pytest.raises(TypeError, match="sampling must be a SamplingConfig, got 'hot'"):
        batch.submit([1], max_new_tokens=1, sampling="hot")
    with pytest.raises(TypeError, match="state must be None or an RWKV7State"):
        batch.submit([1], max_new_tokens=1, state=jnp.zeros(3))
    for wrong in (0, "first"):
        with pytest.raises(ValueError, match=f"id of an unfinished request, got {wrong!r}"):
            batch.cancel(wrong)
    with pytest.raises(ValueError, match="num_slots must be an integer >= 1, got 0"):
        ContinuousBatch(model, num_slots=0)
    with pytest.raises(ValueError, match=r"block_size must be an integer >= 1, got 1\.5"):
        ContinuousBatch(model, block_size=1.5)


def test_a_row_of_a_batch_continues_in_a_slot(model, batch):
    result = generate(model, [[1, 2], [3]], max_new_tokens=6, sampling=GREEDY)
    row = take_rows(result.state, [1])
    request = batch.submit([4, 5], max_new_tokens=6, sampling=GREEDY, state=row)
    received = Received(batch).run()
    whole = [3, *result.sequences[1], 4, 5]
    expected = alone_of(model, whole, max_new_tokens=6, sampling=GREEDY)
    assert received.tokens[request] == expected.sequences[0]
