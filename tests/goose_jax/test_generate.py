import collections
import dataclasses
import itertools
import math
import re
import runpy
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from goose_jax.generation import (
    ContinuousBatch,
    NonFiniteLogitsError,
    SamplingConfig,
    decoding,
    generate,
    prefill,
    static_batch,
)
from goose_jax.nn import RWKV7, prepare_decoding
from goose_jax.state import init_state, take_rows
from tests.goose_jax.decoding import (
    CONFIG,
    GREEDY,
    STATE_TOLERANCE,
    VOCAB,
    WARM,
    WatchedBlocks,
    assert_states_agree,
    random_model,
    state_row,
)
from tests.helpers import relative_rms

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


ROOT = Path(__file__).parents[2]
PROMPTS = [[5], [7, 8, 9, 7, 8, 9, 7], list(range(16)), list(range(40, 60))]


@pytest.fixture(scope="module")
def model():
    return random_model(0)


@pytest.fixture(scope="module")
def forward(model):
    """Logits and state after reading one row of tokens all at once, padded to one length."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, tokens, segment_ids):
        return nnx.merge(graphdef, params)(tokens, segment_ids=segment_ids)

    def read(tokens):
        padding = 96 - len(tokens)
        ids = np.pad(np.ones((1, len(tokens)), np.int32), ((0, 0), (0, padding)))
        padded = np.pad(np.array([tokens], np.int32), ((0, 0), (0, padding)))
        logits, state = run(params, padded, ids)
        return np.asarray(logits[0, : len(tokens)]), state

    return read


def test_greedy_decoding_agrees_with_the_parallel_forward(model, forward):
    result = generate(model, PROMPTS, max_new_tokens=40, sampling=GREEDY)
    assert result.tokens.shape == (4, 40)
    assert result.tokens.dtype == result.lengths.dtype == np.int32
    assert result.lengths.tolist() == [40] * 4
    for row, (prompt, new) in enumerate(zip(PROMPTS, result.sequences, strict=True)):
        logits, state = forward(prompt + new)
        assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == new
        assert_states_agree(state_row(result.state, row), state_row(state, 0))
        assert len(set(new)) > 3  # the model is not stuck at one token


def test_each_prompt_of_a_batch_gets_what_it_gets_alone(model):
    together = generate(model, PROMPTS, max_new_tokens=20, sampling=WARM, seed=[3, 1, 4, 1])
    for row, (prompt, seed) in enumerate(zip(PROMPTS[:3], (3, 1, 4), strict=True)):
        alone = generate(model, [prompt], max_new_tokens=20, sampling=WARM, seed=seed)
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
        assert_states_agree(state_row(alone.state, 0), state_row(together.state, row))


def test_streaming_in_any_blocks_changes_nothing(model):
    settings = {"max_new_tokens": 20, "sampling": WARM, "seed": 11, "stop_tokens": [3, 30]}
    expected = generate(model, PROMPTS, **settings)
    assert set(expected.lengths) - {20}  # a row has stopped
    for block_size in (16, 7):
        blocks = []
        result = generate(
            model, PROMPTS, on_tokens=blocks.append, block_size=block_size, **settings
        )
        assert len(blocks) == math.ceil(20 / block_size)
        streamed = [np.concatenate(row).tolist() for row in zip(*blocks, strict=True)]
        assert streamed == expected.sequences == result.sequences
        assert (result.tokens == expected.tokens).all()
        chex.assert_trees_all_equal(result.state, expected.state)


def test_a_stopped_sequence_is_padded_and_its_state_rests(model, forward):
    free = generate(model, PROMPTS, max_new_tokens=40, sampling=GREEDY)
    stop = free.tokens[1, 5]
    expected = [row[: row.index(stop)] if stop in row else row for row in free.sequences]
    assert len({len(row) for row in expected}) > 1
    stopped = generate(model, PROMPTS, max_new_tokens=40, sampling=GREEDY, stop_tokens=[1, stop])
    expected = [[t for t in row if 1 not in row[: i + 1]] for i, row in enumerate(expected)]
    assert stopped.sequences == expected
    for row, (prompt, new) in enumerate(zip(PROMPTS, expected, strict=True)):
        assert (stopped.tokens[row, len(new) :] == static_batch.PADDING).all()
        assert_states_agree(state_row(stopped.state, row), state_row(forward(prompt + new)[1], 0))


def test_generation_ends_once_all_rows_have_stopped(model):
    blocks = []
    first = generate(model, PROMPTS, max_new_tokens=1, sampling=WARM).tokens[:, 0]
    result = generate(
        model,
        PROMPTS,
        max_new_tokens=1000,
        sampling=WARM,
        stop_tokens=first,
        on_tokens=blocks.append,
    )
    assert result.tokens.shape == (4, 1000)
    assert result.lengths.tolist() == [0] * 4
    assert [len(new) for new in blocks[0]] == [0] * 4
    assert len(blocks) == 1


def test_a_callback_can_end_the_generation(model, forward):
    result = generate(
        model, PROMPTS, max_new_tokens=100, sampling=GREEDY, on_tokens=lambda new: True
    )
    assert result.tokens.shape == (4, 100)
    assert result.lengths.tolist() == [16] * 4
    _, state = forward(PROMPTS[1] + result.sequences[1])
    assert_states_agree(state_row(result.state, 1), state_row(state, 0))


def test_the_state_is_that_of_the_block_which_the_callback_ended(model):
    def run(blocks):
        count = iter(range(100))
        return generate(
            model,
            PROMPTS,
            max_new_tokens=100,
            sampling=WARM,
            block_size=7,
            on_tokens=lambda new: next(count) + 1 == blocks,
        )

    for blocks in (1, 3):
        ended = run(blocks)
        exactly = generate(model, PROMPTS, max_new_tokens=7 * blocks, sampling=WARM, block_size=7)
        assert ended.lengths.tolist() == [7 * blocks] * 4
        assert ended.sequences == exactly.sequences
        assert not ended.tokens[:, 7 * blocks :].any()
        chex.assert_trees_all_equal(ended.state, exactly.state)


def watch(monkeypatch):
    watched = WatchedBlocks(decoding.decode_block)
    monkeypatch.setattr(static_batch, "decode_block", watched)
    return watched.events


def test_the_next_block_is_dispatched_before_the_callback_is_called(model, monkeypatch):
    events = watch(monkeypatch)

    def callback(new):
        events.append("callback")
        return events.count("callback") == 3

    generate(model, PROMPTS, max_new_tokens=100, sampling=WARM, on_tokens=callback)
    expected = [("dispatch", 0), ("copy", 0)]
    for i in range(3):
        expected += [("dispatch", i + 1), ("copy", i + 1), ("wait", i), "callback"]
    assert events == expected


def test_without_stop_tokens_and_callback_nothing_is_waited_for_before_the_end(model, monkeypatch):
    events = watch(monkeypatch)
    result = generate(model, PROMPTS, max_new_tokens=40, sampling=WARM)
    names = [name for name, _ in events]
    assert names == ["dispatch", "copy"] * 3 + ["wait"] * 3
    assert result.lengths.tolist() == [40] * 4


def test_the_block_after_the_end_changes_nothing(model, monkeypatch):
    settings = {"sampling": WARM, "block_size": 7}
    free = generate(model, PROMPTS, max_new_tokens=20, **settings)
    stops = free.tokens[:, 10]  # every row ends within two blocks, and not all in the first
    settings |= {"max_new_tokens": 100, "stop_tokens": stops}
    blocks = []
    called = generate(model, PROMPTS, on_tokens=blocks.append, **settings)
    assert len(blocks) == 2
    events = watch(monkeypatch)
    result = generate(model, PROMPTS, **settings)
    dispatched = sum(name == "dispatch" for name, _ in events)
    assert dispatched == len(blocks) + 1
    assert called.sequences == result.sequences
    chex.assert_trees_all_equal(result.state, called.state)
    read = [prompt + new for prompt, new in zip(PROMPTS, result.sequences, strict=True)]
    assert_states_agree(result.state, prefill(model, read))


def test_seeds(model):
    prompts = [[1, 2]] * 4

    def tokens(seed):
        result = generate(model, prompts, max_new_tokens=20, sampling=WARM, seed=seed)
        return result.tokens.tolist()

    first = tokens(0)
    assert first == tokens(0)
    assert first != tokens(1)
    assert len({tuple(row) for row in first}) == 4  # rows of one seed differ
    chosen = tokens([5, 0, 5, 2**32 - 1])
    assert chosen[0] == chosen[2] != chosen[3]
    assert chosen[1] == first[0]


def test_a_carried_state_continues_the_text(model, forward):
    first = generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    kept = jax.tree.map(np.array, first.state)
    more = [[1, 2, 3], [4], [5, 6], [7, 8]]
    second = generate(model, more, max_new_tokens=16, sampling=GREEDY, state=first.state)
    for row in range(4):
        read = PROMPTS[row] + first.sequences[row] + more[row]
        logits, _ = forward(read + second.sequences[row])
        assert logits[len(read) - 1 : -1].argmax(axis=-1).tolist() == second.sequences[row]
    # The state handed in is not consumed: it can be continued in several ways.
    chex.assert_trees_all_equal(first.state, kept)


def test_a_forked_state_continues_as_the_whole_text_does(model):
    prefix = list(range(30, 38))
    forks = take_rows(prefill(model, [prefix]), [0] * 4)
    rest = [[1, 2, 3], [1, 2, 3], [4], [1, 2, 3]]
    settings = {"max_new_tokens": 20, "sampling": WARM, "seed": [7, 8, 7, 7]}
    forked = generate(model, rest, state=forks, **settings)
    whole = generate(model, [prefix + tokens for tokens in rest], **settings)
    assert forked.sequences == whole.sequences
    assert_states_agree(forked.state, whole.state)
    # Rows that go on in the same way remain exactly the same.
    assert forked.sequences[0] == forked.sequences[3]
    chex.assert_trees_all_equal(state_row(forked.state, 0), state_row(forked.state, 3))
    assert len({tuple(row) for row in forked.sequences}) == 3


@pytest.mark.slow
def test_the_step_through_all_layers_at_once_gives_the_same_tokens(model):
    settings = {"max_new_tokens": 40, "sampling": WARM, "stop_tokens": [3, 30]}
    expected = generate(model, PROMPTS, **settings)
    assert set(expected.lengths) - {40}  # a row rests
    result = generate(model, PROMPTS, implementation="reference", **settings)
    assert result.sequences == expected.sequences
    assert_states_agree(result.state, expected.state)
    batch = ContinuousBatch(model, num_slots=2, implementation="reference")
    request = batch.submit(PROMPTS[0], **settings)
    tokens = []
    while batch.unfinished:
        tokens += batch.step()[0].tokens
    assert (request, tokens) == (0, expected.sequences[0])


def test_a_step_that_is_not_served_is_refused(model):
    with pytest.raises(NotImplementedError, match="mosaic_gpu needs bfloat16"):
        generate(model, [[1]], max_new_tokens=1, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"implementation='cuda' is unknown.*'mosaic_gpu', 'xla'"):
        generate(model, [[1]], max_new_tokens=1, implementation="cuda")


def test_penalties_count_what_was_generated(model):
    never_again = SamplingConfig(temperature=0, presence_penalty=1e6)
    result = generate(model, PROMPTS, max_new_tokens=VOCAB, sampling=never_again)
    assert [sorted(row) for row in result.sequences] == [list(range(VOCAB))] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_row(model, value):
    settings = {"max_new_tokens": 40, "sampling": WARM, "seed": 1}
    expected = generate(model, PROMPTS, **settings).sequences
    # A token that comes once in all rows, in a later block than the first.
    seen = collections.Counter(itertools.chain(*expected, *PROMPTS))
    row, place = next(
        (row, i) for row in range(4) for i in range(17, 40) if seen[expected[row][i]] == 1
    )
    broken, embedding = nnx.clone(model), np.array(model.embedding[...])
    embedding[expected[row][place]] = value
    broken.embedding[...] = jnp.asarray(embedding)
    streamed = [[] for _ in PROMPTS]

    def collect(new):
        for text, tokens in zip(streamed, new, strict=True):
            text.extend(tokens.tolist())

    message = f"^the model gave NaN or infinite logits for row {row}: the parameter embedding holds"
    with pytest.raises(NonFiniteLogitsError, match=message) as caught:
        generate(broken, PROMPTS, on_tokens=collect, **settings)
    assert caught.value.failed == (row,)
    assert streamed[row] == expected[row][: place + 1]  # with the token that spoils the next logits
    assert all(new == all_new[: len(new)] for new, all_new in zip(streamed, expected, strict=True))
    with pytest.raises(NonFiniteLogitsError, match=message):
        generate(broken, PROMPTS, **settings)
    # All tokens of the row may come before the logits that are not finite.
    short = settings | {"max_new_tokens": place + 1}
    assert generate(broken, PROMPTS, **short).sequences == [new[: place + 1] for new in expected]


def test_the_likely_cause_of_logits_that_are_not_finite_is_named(model):
    cached = prefill(model, [[5]])
    spoilt = dataclasses.replace(cached, wkv=cached.wkv.at[0, 0, 0, 0, 0].set(math.nan))
    message = "row 0: all parameters are finite, so the state .* exceeded the range of float32$"
    with pytest.raises(FloatingPointError, match=message):
        generate(model, [[5]], max_new_tokens=40, sampling=WARM, state=spoilt)


@pytest.mark.slow
def test_an_overflow_of_float16_is_named(model):
    def in_dtype(compute_dtype):
        config = dataclasses.replace(CONFIG, compute_dtype=compute_dtype)
        abstract = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
        params = jax.tree.map(lambda x: x, nnx.state(model))
        other = nnx.merge(nnx.graphdef(abstract), params)
        other.blocks.channel_mix.key[...] *= 1e3  # its square exceeds 65504
        return other

    settings = {"max_new_tokens": 4, "sampling": GREEDY, "block_size": 4}
    message = "float16, whose largest number is 65504, is likely .*choose the dtype bfloat16 or f"
    with pytest.raises(NonFiniteLogitsError, match=message):
        generate(in_dtype("float16"), [[5]], **settings)
    assert generate(in_dtype("bfloat16"), [[5]], **settings).lengths.tolist() == [4]


def test_long_prompts_are_read_in_pieces(model, forward, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIECE", 32)
    prompts = [list(range(70)), [9, 9], list(range(32)), list(range(33))]
    result = generate(model, prompts, max_new_tokens=16, sampling=GREEDY)
    for prompt, new in zip(prompts, result.sequences, strict=True):
        logits, _ = forward(prompt + new)
        assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == new


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 16), (16, 16), (17, 32), (1000, 1024), (2049, 4096), (5000, 6144)]
)
def test_padded_lengths_are_few(length, padded):
    assert decoding.padded_length(length) == padded


def test_programs_are_compiled_once(model, monkeypatch):
    traces = []
    hidden = RWKV7.hidden

    def counted(self, tokens, *args):
        traces.append(tokens.shape)
        return hidden(self, tokens, *args)

    monkeypatch.setattr(RWKV7, "hidden", counted)
    calls = [
        ([1], model, {}),
        ([1, 2, 3], random_model(1), {"seed": 4, "max_new_tokens": 3}),
        (list(range(16)), model, {"sampling": SamplingConfig(temperature=0.5)}),
        ([1], model, {"sampling": SamplingConfig(frequency_penalty=1), "seed": range(5)}),
        ([1], model, {"max_new_tokens": 50, "state": init_state(CONFIG, 5)}),
        ([1], model, {"on_tokens": lambda new: None, "stop_tokens": [1]}),
    ]
    for prompt, which, settings in calls:
        prompts = [prompt] + [[2]] * 4  # a batch size that no other test uses
        generate(which, prompts, **({"max_new_tokens": 20} | settings))
    assert traces == [(5, 1), (5, 16)]


def test_other_values_trace_nothing(model, monkeypatch):
    settings = {"max_new_tokens": 20, "sampling": WARM}
    generate(model, PROMPTS, **settings)
    monkeypatch.setattr(RWKV7, "hidden", chex.assert_max_traces(RWKV7.hidden, n=0))
    others = [[token + 1 for token in prompt] for prompt in PROMPTS]
    sampling = SamplingConfig(temperature=0.5, top_p=0.8)
    first = generate(random_model(1), others, seed=4, **settings | {"sampling": sampling})
    generate(model, PROMPTS, state=first.state, **settings)
    with pytest.raises(AssertionError, match="traced > 0 times"):
        generate(model, PROMPTS + [[1]] * 3, **settings)  # a batch size that no other test uses


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_is_called(model):
    compiled = []

    def listen(event, seconds, **of_event):
        if "backend_compile" in event:
            compiled.append(of_event["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(2):
            generate(model, [[1]] * 6, max_new_tokens=3)  # a batch size that no other test uses
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled.count("jit(_decode_block)") == compiled.count("jit(read_piece)") == 1


def test_prefill_forms_logits_of_the_last_token_only_and_bakes_in_no_parameter(model):
    weights = prepare_decoding(model)
    ids = jnp.ones((3, 32), jnp.int32)
    traced = decoding.read_piece.trace(weights, ids, ids, init_state(CONFIG, 3))
    text = str(traced.jaxpr)
    assert f"[3,1,{VOCAB}]" in text
    assert f"[3,32,{VOCAB}]" not in text
    assert f"[96,{VOCAB}]" not in text
    constants = {np.shape(constant) for constant in traced.jaxpr.consts}
    assert not constants & {np.shape(x) for x in jax.tree.leaves(weights)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": []}, "prompts must be a list of lists of token ids"),
        ({"prompts": "text"}, "prompts must be a list of lists of token ids"),
        ({"prompts": ["text"]}, r"prompts\[0\] must be .*encode text first.*'text'"),
        ({"prompts": [1, 2]}, r"prompts\[0\] must be a sequence of token ids, got 1"),
        ({"prompts": [[1], []]}, r"prompts\[1\] must hold at least one token"),
        ({"prompts": [[1], [2.0]]}, r"prompts\[1\] must be a sequence of token ids, got \[2.0\]"),
        ({"prompts": [[1], [2, VOCAB]]}, r"prompts\[1\] must hold ids in 0\.\.96, got 97"),
        ({"prompts": [[-1]]}, r"prompts\[0\] must hold ids in 0\.\.96, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens must be an integer >= 1, got 2\.0"),
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"stop_tokens": [VOCAB]}, r"stop_tokens must hold ids in 0\.\.96, got 97"),
        ({"stop_tokens": "\n"}, "stop_tokens must be a sequence of token ids"),
        ({"seed": -1}, r"seed must lie in 0\.\.2\*\*32-1, got -1"),
        ({"seed": [1, 2]}, r"seed must be an integer or one for each of 1 rows: seed=\[1, 2\]"),
        ({"seed": 1.5}, r"seed must lie in 0\.\.2\*\*32-1, got 1\.5"),
        ({"seed": [0.5]}, r"seed must lie in 0\.\.2\*\*32-1, got 0\.5"),
        ({"state": init_state(CONFIG, 2)}, r"state\.time_shift must have shape .* B=1"),
    ],
)
def test_wrong_arguments_are_named(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompts": [[1]], "max_new_tokens": 1} | wrong))


def test_wrong_types_are_named(model):
    with pytest.raises(TypeError, match="sampling must be None or a SamplingConfig"):
        generate(model, [[1]], max_new_tokens=1, sampling={"temperature": 1})
    with pytest.raises(TypeError, match="state must be None or an RWKV7State"):
        generate(model, [[1]], max_new_tokens=1, state=jnp.zeros(3))


def test_tokens_can_be_read_without_generating_any(model):
    result = generate(model, [[5, 6, 7]], max_new_tokens=4, sampling=WARM)
    state = prefill(model, [[5, 6, 7]])
    state = prefill(model, result.sequences, state=state)
    for name in ("time_shift", "wkv", "channel_shift"):
        assert relative_rms(getattr(state, name), getattr(result.state, name)) < STATE_TOLERANCE
    with pytest.raises(ValueError, match=r"prompts\[0\] must hold at least one token"):
        prefill(model, [[]])
    with pytest.raises(TypeError, match="state must be None or an RWKV7State"):
        prefill(model, [[1]], state=3)


@pytest.mark.slow
def test_the_page_about_generation_runs(capsys):
    page = (ROOT / "docs/generation.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    names = {}
    exec("\n".join(blocks), names)
    assert names["answers"].tokens.shape == (2, 32)
    assert names["variants"].tokens.shape == (3, 32)
    assert names["mixed"].wkv.shape[:2] == (2, 2)
    assert names["batch"].unfinished == 0
    assert "re " in capsys.readouterr().out


def programs(sampling):
    """What the decoding program of four rows computes, as text."""
    weights = prepare_decoding(random_model(0))
    settings = decoding.row_settings(
        seeds=[(0, 0)] * 4,
        sampling=sampling,
        stop_tokens=[np.arange(2)] * 4,
        limits=[5] * 4,
    )
    return str(decoding.trace_decode_block(weights, settings, block_size=2).jaxpr)


def test_only_sampling_draws_random_numbers_and_only_filters_sort():
    plain, filtered = SamplingConfig(), SamplingConfig(top_k=3)
    greedy = SamplingConfig(temperature=0, top_k=3)
    for sampling, draws, sorts in (
        ([greedy] * 4, False, False),
        ([plain] * 4, True, False),
        ([greedy, plain, greedy, greedy], True, False),
        ([plain, filtered, plain, greedy], True, True),
    ):
        text = programs(sampling)
        assert ("random_bits" in text) == draws
        assert (" sort[" in text) == sorts


@pytest.mark.slow
def test_the_decoding_example_runs(capsys):
    result = runpy.run_path(str(ROOT / "examples/generate.py"))["main"]()
    assert result.lengths.tolist() == [64] * 2
    lines = capsys.readouterr().out
    assert all(lines.count(f"'{start}") == 1 for start in ("def main(", "import"))


@pytest.mark.slow
def test_the_example_of_modules_learns(capsys):
    with jax.numpy_rank_promotion("allow"):  # as in a user's program
        losses = runpy.run_path(str(ROOT / "examples/modules.py"))["main"](steps=60)
    assert losses[-1] < losses[0] / 5  # measured: a fourteenth
