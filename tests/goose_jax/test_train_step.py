"""The train step on a model small enough to compile in a moment."""

import dataclasses
import os
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.data import (
    NOT_COUNTED,
    Batch,
    Document,
    next_token_batch,
    pack_documents,
    random_batch,
)
from goose_jax.training import (
    Metrics,
    NonFiniteError,
    OptimizerConfig,
    StopRequest,
    init_train_state,
    make_evaluation,
    make_train_step,
    mean_loss,
    train_steps,
    training_loop,
    with_params,
)
from goose_jax.training.loss import num_targets, num_tokens
from goose_jax.training.training_loop import STEPS_AHEAD
from tests.helpers import relative_rms

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

CONFIG = RWKV7Config(
    vocab_size=16, hidden_size=32, num_layers=2, head_size=16, compute_dtype="float32"
)
RECIPE = OptimizerConfig(total_steps=50, warmup_steps=0, learning_rate=1e-3)
T = 12  # short enough for the token by token operator, which compiles fastest


@pytest.fixture(scope="module")
def model():
    """All parameters away from their initial values, where many are zero."""
    model = RWKV7(CONFIG, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), jnp.float32), state
    )
    return nnx.merge(graphdef, noisy)


@pytest.fixture(scope="module")
def train_step(model):
    return make_train_step(model, RECIPE, l2wrap=0.5)


@pytest.fixture(scope="module")
def gradient_of_mean_loss(model):
    """Of the mean loss with `l2wrap=0.5`, by parameter."""
    graphdef = nnx.graphdef(model)

    @jax.jit
    def gradient(params, batch):
        return jax.value_and_grad(
            lambda params: mean_loss(nnx.merge(graphdef, params), batch, l2wrap=0.5)
        )(params)

    return lambda batch: gradient(nnx.to_pure_dict(nnx.state(model)), batch)


def some_tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape)


def assert_close(tree, expected, tolerance):
    for (path, x), reference in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True
    ):
        assert relative_rms(x, reference) < tolerance, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_the_loss_is_that_of_full_logits(model, gradient_of_mean_loss):
    """L2Wrap is the gradient of `l2wrap / 2 * max_logit^2`, without being part of the value."""
    batch = next_token_batch(some_tokens(4, T + 1))
    targets = np.where(some_tokens(4, T, seed=2) < 3, NOT_COUNTED, batch.targets)
    batch = dataclasses.replace(batch, targets=targets)
    graphdef = nnx.graphdef(model)

    @jax.jit
    def reference(params):
        def losses(params):
            logits, _ = nnx.merge(graphdef, params)(jnp.asarray(batch.inputs))
            at_target = jnp.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
            entropy = jax.nn.logsumexp(logits, axis=-1) - at_target
            counted = targets != NOT_COUNTED
            pull = 0.25 * jnp.max(logits, axis=-1) ** 2
            return jnp.mean(entropy, where=counted) + jnp.mean(pull, where=counted), jnp.mean(
                entropy, where=counted
            )

        return jax.grad(losses, has_aux=True)(params)

    expected_gradient, expected = reference(nnx.to_pure_dict(nnx.state(model)))
    value, gradient = gradient_of_mean_loss(batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    unused = gradient["blocks"]["time_mix"]
    assert not np.any(unused["value_residual_base"][0])  # of layer 0
    assert_close(gradient, expected_gradient, 1e-4)


@pytest.mark.slow
def test_microbatches_make_the_step_of_the_big_batch(model, train_step):
    """Although they do not count the same number of targets."""
    big = next_token_batch(some_tokens(4, T + 1))
    targets = big.targets.copy()
    targets[0] = NOT_COUNTED
    targets[2, 3:] = NOT_COUNTED
    big = dataclasses.replace(big, targets=targets)
    small = jax.tree.map(lambda array: array.reshape(2, 2, T), big)

    state, metrics = train_step(init_train_state(model, RECIPE), big)
    accumulated, accumulated_metrics = train_step(init_train_state(model, RECIPE), small)

    assert int(metrics.targets) == int(accumulated_metrics.targets) == 2 * T + 3
    assert_close(accumulated_metrics, metrics, 1e-5)
    assert_close(accumulated.opt_state, state.opt_state, 1e-4)
    assert int(accumulated.step) == int(state.step) == 1


@pytest.mark.slow
def test_a_packed_batch_is_its_documents(model, gradient_of_mean_loss):
    documents = [some_tokens(n, seed=n) for n in (3, 7, 2, 9)]
    tokens, segment_ids = pack_documents(documents, length=T + 1)
    packed = next_token_batch(tokens, segment_ids)
    assert packed.inputs.shape == (2, T)

    inputs = np.zeros((len(documents), T), np.int32)
    targets = np.full_like(inputs, NOT_COUNTED)
    for row, document in enumerate(documents):
        inputs[row, : len(document)] = document
        targets[row, : len(document) - 1] = document[1:]
    value, gradient = gradient_of_mean_loss(packed)
    expected, expected_gradient = gradient_of_mean_loss(Batch(inputs, targets))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, expected_gradient, 1e-4)


def test_a_batch_without_targets_has_no_loss(gradient_of_mean_loss):
    batch = next_token_batch(some_tokens(4, T + 1))
    nothing = dataclasses.replace(batch, targets=np.full_like(batch.targets, NOT_COUNTED))
    loss, gradient = gradient_of_mean_loss(nothing)
    assert float(loss) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_any_target_below_zero_is_not_counted(gradient_of_mean_loss):
    batch = next_token_batch(some_tokens(4, T + 1))
    left_out = some_tokens(4, T, seed=2) < 3
    results = []
    for value in (NOT_COUNTED, -100, np.iinfo(np.int32).min):
        targets = np.where(left_out, value, batch.targets).astype(np.int32)
        changed = dataclasses.replace(batch, targets=targets)
        assert int(num_targets(changed)) == np.sum(~left_out)
        results.append(gradient_of_mean_loss(changed))
    assert np.isfinite(results[0][0])
    for other in results[1:]:
        chex.assert_trees_all_equal(other, results[0])


@pytest.mark.parametrize("field", ["inputs", "targets"])
@pytest.mark.parametrize("token", [CONFIG.vocab_size, 2**31 - 1])
def test_a_token_out_of_range_makes_every_gradient_nan(gradient_of_mean_loss, field, token):
    batch = next_token_batch(some_tokens(4, T + 1))
    values = getattr(batch, field).copy()
    values[2, 0] = token
    loss, gradient = gradient_of_mean_loss(dataclasses.replace(batch, **{field: values}))
    assert np.isnan(loss)
    norm = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(gradient)))
    assert np.isnan(norm)
    assert np.isnan(gradient["head"]).all()


@pytest.mark.slow
def test_a_token_out_of_range_is_an_error_where_it_is_known(model):
    batch = next_token_batch(some_tokens(4, T + 1))
    for field in ("inputs", "targets"):
        values = getattr(batch, field).copy()
        values[2, 0] = CONFIG.vocab_size
        with pytest.raises(ValueError, match=r"(tokens|targets) must .* in .*15, got"):
            mean_loss(model, dataclasses.replace(batch, **{field: values}))


def test_a_state_is_used_up_and_the_model_is_not(model, train_step):
    state = init_train_state(model, RECIPE)
    train_step(state, next_token_batch(some_tokens(4, T + 1)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))


def test_a_step_on_other_values_traces_nothing(model, train_step, monkeypatch):
    def run(*shape, seed):
        batch = next_token_batch(some_tokens(*shape, seed=seed))
        return train_step(init_train_state(model, RECIPE), batch)

    run(4, T + 1, seed=1)
    monkeypatch.setattr(RWKV7, "hidden", chex.assert_max_traces(RWKV7.hidden, n=0))
    state, _ = run(4, T + 1, seed=2)
    train_step(state, next_token_batch(some_tokens(4, T + 1, seed=3)))
    with pytest.raises(AssertionError, match="traced > 0 times"):
        run(5, T + 1, seed=2)


def test_metrics(model, train_step, gradient_of_mean_loss):
    batch = next_token_batch(some_tokens(4, T + 1))
    loss, gradient = gradient_of_mean_loss(batch)
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient)))
    _, metrics = train_step(init_train_state(model, RECIPE), batch)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics.gradient_norm) == pytest.approx(norm, rel=1e-5)
    assert float(metrics.learning_rate) == pytest.approx(1e-3)
    assert int(metrics.tokens) == int(metrics.targets) == 4 * T


def test_tokens_are_those_that_are_read_and_targets_those_that_count():
    tokens = some_tokens(2, T + 1)
    segment_ids = np.ones((2, T), np.int32)
    segment_ids[1, -3:] = 0  # padding
    targets = np.full((2, T), -1, np.int32)
    targets[:, :2] = tokens[:, 1:3]
    batch = Batch(tokens[:, :-1], targets, segment_ids)
    assert (int(num_tokens(batch)), int(num_targets(batch))) == (2 * T - 3, 4)
    assert int(num_tokens(dataclasses.replace(batch, segment_ids=None))) == 2 * T


@pytest.mark.slow
def test_it_learns_in_bfloat16_with_parameters_in_float32():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    model = RWKV7(config, rngs=nnx.Rngs(0))
    recipe = dataclasses.replace(RECIPE, learning_rate=1e-2)
    train_step = make_train_step(model, recipe)
    state = init_train_state(model, recipe)
    batch = next_token_batch(some_tokens(4, T + 1))
    losses = []
    for _ in range(40):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics.loss))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert 2.6 < losses[0] < 3.0  # log(16) = 2.8
    assert losses[-1] < 0.5
    trained = float(mean_loss(with_params(model, state.params), batch))
    assert trained < losses[-1] * 1.1


def test_parameters_in_bfloat16_are_refused():
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"param_dtype='float32', got .*'bfloat16'"):
        init_train_state(model, RECIPE)


def test_depth_does_not_enlarge_the_program():
    def lines(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
        state = jax.eval_shape(lambda model: init_train_state(model, RECIPE), model)
        tokens = jax.ShapeDtypeStruct((2, 33), jnp.int32)  # enough for the operator in chunks
        program = make_train_step(model, RECIPE).lower(state, Batch(tokens, tokens))
        return program.as_text().count("\n")

    assert lines(24) == lines(6)


def test_bits_per_byte(model):
    """Of a model that knows nothing: each of 16 tokens costs four bits."""

    class Halves:  # two tokens per byte
        vocab_size = 16
        end_of_document = 0

        def encode(self, text):
            return [half for byte in text.encode() for half in divmod(byte, 16)]

    params = nnx.to_pure_dict(nnx.state(model))
    params = params | {"head": jnp.zeros_like(params["head"])}
    documents = [Document("a", "text" * 5), Document("b", "ä" * 3)]
    evaluate = make_evaluation(model, documents, Halves(), batch_size=2, sequence_length=T)
    # 2 * 26 tokens, two ends of documents; 26 bytes
    assert evaluate(params) == pytest.approx(4 * (52 + 2) / 26, rel=1e-5)


def stub_step(bad_step, **bad):
    def step(state, batch):
        values = {"loss": 1.0, "gradient_norm": 2.0} | (bad if state.step == bad_step else {})
        metrics = Metrics(**values, learning_rate=0.1, tokens=8, targets=8)
        return dataclasses.replace(state, step=state.step + 1), metrics

    return step


@dataclasses.dataclass(frozen=True)
class Count:
    step: int


def batches(step):
    return random_batch(np.arange(100), step, batch_size=2, sequence_length=4, seed=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss": np.nan}, "step 4: the loss is nan"),
        ({"loss": np.inf}, "step 4: the loss is inf"),
        ({"gradient_norm": np.inf}, r"step 4: .* gradient's norm inf"),
    ],
)
def test_what_is_not_finite_stops_the_steps(bad, message):
    reports = []
    steps = train_steps(stub_step(3, **bad), Count(0), batches, steps=9, on_report=reports.append)
    with pytest.raises(NonFiniteError, match=message):
        list(steps)
    assert [report.step for report in reports] == [1, 2, 3]


def test_steps_that_are_not_finite_can_be_passed_over():
    reports, bad = [], []
    steps = train_steps(
        *(stub_step(3, loss=np.nan), Count(0), batches),
        steps=9,
        on_report=reports.append,
        on_non_finite=lambda *args: bad.append(args),
    )
    assert [step for step, _ in steps] == [*range(1, 10)]
    assert [report.step for report in reports if report.is_finite] == [1, 2, 3, *range(5, 10)]
    ((report, batch),) = bad
    assert report is reports[3]
    np.testing.assert_array_equal(batch.inputs, batches(3).inputs)


def test_steps_are_dispatched_ahead_of_their_reports():
    """Only where the caller waits, and at the end, do all reports come in."""
    reports, made = [], []
    steps = train_steps(
        *(stub_step(-1), Count(5), batches),
        steps=18,
        on_report=lambda report: reports.append(report.step),
        wait_after=lambda step: step == 14,
    )
    for step, state in steps:
        assert state.step == step
        made.append((step, len(reports)))
    late = [(step, max(0, step - 5 - STEPS_AHEAD)) for step in range(6, 14)]
    assert made == [*late, (14, 9), (15, 9), (16, 9), (17, 9), (18, 13)]
    assert reports == [*range(6, 19)]


def test_of_long_steps_only_one_is_dispatched_ahead(monkeypatch):
    monkeypatch.setattr(training_loop, "_LONG_STEP", 0.0)
    reports = []
    steps = train_steps(stub_step(-1), Count(0), batches, steps=9, on_report=reports.append)
    late = [step - len(reports) for step, _ in steps]
    assert late == [1, 2, 3, 4, 4, 1, 1, 1, 0]


def test_steps_take_their_own_time_however_long_their_dispatch_waits():
    """A full queue of the device makes the host wait: that time is not that of older steps."""
    reports, step = [], stub_step(-1)

    def slow_to_dispatch(state, batch):
        time.sleep(0.02)
        return step(state, batch)

    steps = train_steps(
        *(slow_to_dispatch, Count(0), batches),
        steps=9,
        on_report=reports.append,
        wait_after=lambda step: step == 6,
    )
    list(steps)
    assert len(reports) == 9
    assert min(report.seconds for report in reports) > 0.015


def test_steps_go_on_from_the_state():
    reports = []
    steps = train_steps(stub_step(-1), Count(5), batches, steps=8, on_report=reports.append)
    assert [step for step, _ in steps] == [6, 7, 8]
    assert reports[0].tokens == 8
    assert reports[0].tokens_per_second == pytest.approx(8 / reports[0].seconds)
    none = train_steps(stub_step(-1), Count(8), batches, steps=8, on_report=reports.append)
    assert list(none) == []


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_but_counts(model, train_step, bad):
    """Also the schedule counts the step, so later steps have the rate that they always have."""
    state = init_train_state(model, RECIPE)
    batch = next_token_batch(some_tokens(2, T + 1))
    state, _ = train_step(state, batch)
    broken = state.params | {"head": state.params["head"].at[0, 0].set(bad)}
    before = dataclasses.replace(state, params=broken)
    expected = jax.tree.map(np.asarray, before)  # the step uses up its arrays
    after, metrics = train_step(before, batch)
    assert not np.isfinite(metrics.loss + metrics.gradient_norm)
    assert after.step == 2
    chex.assert_trees_all_equal(after.params, expected.params)
    counts = [int(leaf) for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim == 0]
    assert sorted(counts) == [1, 2]  # of Adam, and of the schedule
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    kept = [leaf for leaf in jax.tree.leaves(expected.opt_state) if leaf.ndim]
    chex.assert_trees_all_equal(moments, kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_request_and_the_second_is_not(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append("outer"))
    try:
        with StopRequest(on_request=lambda _: seen.append("request")) as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert stop.exit_status == 128 + number
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
    assert seen == ["request", "outer", "outer"]


def test_signals_that_are_ignored_stay_so():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
