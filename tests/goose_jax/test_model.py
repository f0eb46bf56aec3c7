"""The whole model: against the official one, and against itself by other routes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from goose_jax import RWKV7, Block, RWKV7Config, init_state
from goose_jax.nn import abstract_model
from pallas_kernels import cross_entropy
from tests.goose_jax.official_weights import GOLDEN, GOLDEN_CONFIG, golden_model, to_official
from tests.helpers import relative_rms

forward = jax.jit(lambda model, tokens, state, ids: model(tokens, state, ids))


@jax.jit
def token_by_token(model, tokens, state):
    graphdef, params = nnx.split(model)

    def step(state, token):
        logits, state = nnx.merge(graphdef, params)(token[:, None], state)
        return state, logits[:, 0]

    state, logits = jax.lax.scan(step, state, tokens.T)
    return jnp.swapaxes(logits, 0, 1), state


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def official():
    with np.load(GOLDEN / "logits_17_tokens.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 320, (2, 40)))


def assert_states_close(state, expected, limit):
    for field in dataclasses.fields(expected):
        error = relative_rms(getattr(state, field.name), getattr(expected, field.name))
        assert error < limit, (field.name, error)


def assert_official(logits, state, official, limit):
    assert relative_rms(logits[0], official["logits_np64"]) < limit
    assert relative_rms(jnp.swapaxes(state.wkv[:, 0], -1, -2), official["state_wkv_np64"]) < limit
    assert relative_rms(state.time_shift[:, 0], official["state_att_x_np64"]) < limit
    assert relative_rms(state.channel_shift[:, 0], official["state_ffn_x_np64"]) < limit


def test_official_logits_and_states(model, official):
    tokens = jnp.asarray(official["tokens"], jnp.int32)[None]
    logits, state = forward(model, tokens, None, None)
    assert np.abs(logits[0] - official["logits_np64"]).max() < 1e-4  # measured: 2.6e-6
    assert_official(logits, state, official, 1e-5)  # measured: 3.7e-7


@pytest.mark.slow
def test_official_logits_in_float64(official):
    with jax.enable_x64(True):
        config = dataclasses.replace(GOLDEN_CONFIG, compute_dtype="float64", param_dtype="float64")
        model = golden_model(config)
        logits, state = forward(model, jnp.asarray(official["tokens"])[None], None, None)
        assert logits.dtype == state.wkv.dtype == jnp.float64
        assert_official(logits, state, official, 1e-12)  # measured: 7.8e-16


@pytest.mark.usefixtures("quick_to_compile")
def test_in_pieces_and_token_by_token_as_at_once(model, tokens):
    expected, expected_state = forward(model, tokens, None, None)
    pieces, state = [], init_state(GOLDEN_CONFIG, 2)
    for piece in jnp.split(tokens, [17, 20, 37], axis=1):  # in chunks and token by token
        logits, state = forward(model, piece, state, None)
        pieces.append(logits)
    assert relative_rms(jnp.concatenate(pieces, axis=1), expected) < 1e-5  # measured: 4.3e-7
    assert_states_close(state, expected_state, 1e-5)
    logits, state = token_by_token(model, tokens, init_state(GOLDEN_CONFIG, 2))
    assert relative_rms(logits, expected) < 1e-5  # measured: 4.8e-7
    assert_states_close(state, expected_state, 1e-5)


def random_state(batch_size):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
        init_state(GOLDEN_CONFIG, batch_size),
    )


@pytest.mark.usefixtures("quick_to_compile")
def test_packed_rows_equal_separate_texts(model, tokens):
    """Row 0: a carried-on text, two whole ones and padding between; row 1: one text, no padding."""
    start = random_state(2)
    packed = tokens[:, :35]
    ids = np.array([[0] * 2 + [7] * 9 + [0] * 3 + [2] + [5] * 18 + [0] * 2, [1] * 35])
    logits, state = forward(model, packed, start, jnp.asarray(ids))

    # The same texts as rows of their own, followed by tokens that they do not see.
    separate = jnp.stack([jnp.roll(packed[0], -begin) for begin in (2, 14, 15)] + [packed[1]])
    starts = jax.tree.map(
        lambda x: jnp.stack([x[:, 0], 0 * x[:, 0], 0 * x[:, 0], x[:, 1]], axis=1), start
    )
    expected, ends = forward(model, separate, starts, None)
    # Measured: at most 8.8e-7.
    assert relative_rms(logits[0, 2:11], expected[0, :9]) < 1e-5
    assert relative_rms(logits[0, 14:15], expected[1, :1]) < 1e-5
    assert relative_rms(logits[0, 15:33], expected[2, :18]) < 1e-5
    assert relative_rms(logits[1], expected[3]) < 1e-5
    _, last_end = forward(model, packed[:1, 15:33], None, None)
    assert_states_close(jax.tree.map(lambda x: x[:, :1], state), last_end, 1e-5)
    row_1, end_1 = (jax.tree.map(lambda x: x[:, -1], s) for s in (state, ends))
    assert_states_close(row_1, end_1, 1e-5)


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.slow
def test_left_padding_changes_nothing(model, tokens):
    padded = jnp.pad(tokens[:, :20], ((0, 0), (12, 0)), constant_values=3)
    ids = jnp.pad(jnp.ones((2, 20), jnp.int32), ((0, 0), (12, 0)))
    logits, state = forward(model, padded, None, ids)
    expected, expected_state = forward(model, tokens[:, :20], None, None)
    assert relative_rms(logits[:, 12:], expected) < 1e-5  # measured: 4.1e-7
    assert_states_close(state, expected_state, 1e-5)
    # A row that is all padding leaves the state as it was.
    _, untouched = forward(model, padded, expected_state, jnp.zeros_like(ids))
    assert_states_close(untouched, expected_state, 1e-12)


def mean_loss(model, tokens, targets):
    hidden, _ = model.hidden(tokens)
    return cross_entropy(hidden, model.head[...].astype(hidden.dtype), targets).mean()


@functools.cache
def compiled_gradient(remat, unroll_layers=False):
    """The gradient of the golden model's loss, for tokens and targets `[2, 39]`."""
    tokens = jax.ShapeDtypeStruct((2, 39), jnp.int32)
    model = relabel(golden_model(), remat=remat, unroll_layers=unroll_layers)
    return jax.jit(jax.value_and_grad(mean_loss)).lower(model, tokens, tokens).compile()


def relabel(model, **changes):
    """The same parameters under a changed configuration."""
    config = dataclasses.replace(model.config, **changes)
    abstract = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), nnx.state(model))


UNTRAINED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


@pytest.mark.usefixtures("quick_to_compile")
def test_every_parameter_is_trained_but_the_first_value_residual(model, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss, gradients = compiled_gradient(model.config.remat)(model, inputs, targets)
    logits, _ = forward(model, tokens, None, None)
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    expected = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)  # measured: below 1e-6
    for name, gradient in to_official(nnx.state(gradients)).items():
        assert np.isfinite(gradient).all(), name
        assert gradient.any() == (name not in UNTRAINED), name


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.slow
def test_rematerialisation_saves_memory_and_changes_nothing(model, tokens):
    memory, gradients = {}, {}
    for remat in ("none", "dots", "projections", "full"):
        compiled = compiled_gradient(remat)
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        _, gradient = compiled(relabel(model, remat=remat), tokens[:, :-1], tokens[:, 1:])
        gradients[remat] = to_official(nnx.state(gradient))
    for name in gradients["none"].keys() - UNTRAINED:
        for remat in ("dots", "projections", "full"):
            error = relative_rms(gradients[remat][name], gradients["none"][name])
            assert error < 3e-5, (name, error)  # measured: at most 4.4e-6
    # Measured: 9.1 MB, 6.5 MB, 5.0 MB.
    assert memory["none"] > 1.1 * memory["dots"] > 1.1 * 1.1 * memory["full"]
    assert memory["dots"] > memory["projections"] > memory["full"]


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.slow
def test_unrolled_layers_compute_the_same(model, tokens):
    (loss, gradient), (expected_loss, expected) = (
        compiled_gradient("dots", unroll)(
            relabel(model, remat="dots", unroll_layers=unroll), tokens[:, :-1], tokens[:, 1:]
        )
        for unroll in (True, False)
    )
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    gradients, expected = (to_official(nnx.state(x)) for x in (gradient, expected))
    for name in expected.keys() - UNTRAINED:
        error = relative_rms(gradients[name], expected[name])
        assert error < 3e-5, (name, error)  # measured: at most 4e-6


@pytest.mark.slow
def test_two_of_the_unrolled_layers_are_traced_and_none_selects_values(monkeypatch):
    config = RWKV7Config(vocab_size=7, hidden_size=64, num_layers=4, compute_dtype="bfloat16")
    tokens = jnp.zeros((2, 32), jnp.int32)
    traced, call = [], Block.__call__

    def program(unroll_layers):
        model = abstract_model(dataclasses.replace(config, unroll_layers=unroll_layers))
        return jax.jit(jax.grad(mean_loss)).lower(model, tokens, tokens).as_text()

    def counted(block, *args, **kwargs):
        traced.append(kwargs["is_first"])
        return call(block, *args, **kwargs)

    monkeypatch.setattr(Block, "__call__", counted)
    unrolled = program(True)
    assert traced == [True, False]
    selects = r"stablehlo\.select .*tensor<2x32x1x64xbf16>"
    assert not re.search(selects, unrolled)
    assert re.search(selects, program(False))
    # The gradients of the layers are joined in the compute dtype, before the optimizer's passes.
    assert re.search(r"optimization_barrier .*tensor<4x64x256xbf16>", unrolled)


@pytest.mark.slow
def test_bfloat16_computation_keeps_float32_where_it_matters(model, tokens):
    low = relabel(model, compute_dtype="bfloat16")
    logits, state = forward(low, tokens, None, None)
    assert logits.dtype == state.wkv.dtype == jnp.float32
    assert state.time_shift.dtype == state.channel_shift.dtype == jnp.bfloat16
    expected, _ = forward(model, tokens, None, None)
    assert relative_rms(logits, expected) < 2e-2  # measured: 8.1e-3


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.slow
def test_gradients_in_bfloat16_of_packed_texts(model):
    """The loss of one text does not depend on the embeddings of the text packed before it."""
    ids = jnp.asarray([[1] * 20 + [2] * 20])
    row = jnp.concatenate([jnp.arange(20), jnp.arange(100, 120)])[None]

    @jax.jit
    @jax.grad
    def gradient(model):
        hidden, _ = model.hidden(row, None, ids)
        return jnp.square(model.logits(hidden[:, 20:])).sum()

    gradients = gradient(relabel(model, compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    size = np.abs(gradients.embedding[...]).max(axis=-1)
    assert (size[100:120] > 0).all()
    # Not zero: the gradient of the decay is a sum that runs over the boundary and cancels there.
    assert size[:20].max() < 1e-7 * size[100:120].max()  # measured: 2.9e-9
    by_name = to_official(nnx.state(gradients))
    assert not any(by_name[name].any() for name in UNTRAINED)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_other_head_sizes(tokens):
    """The golden weights with four heads of 32 instead of two of 64."""
    config = dataclasses.replace(GOLDEN_CONFIG, head_size=32)
    model = golden_model(config)
    expected, expected_state = forward(model, tokens, None, None)
    logits, state = token_by_token(model, tokens, init_state(config, 2))
    assert state.wkv.shape == (3, 2, 4, 32, 32)
    assert relative_rms(logits, expected) < 1e-5  # measured: 4.4e-7
    assert_states_close(state, expected_state, 1e-5)


def test_ids_out_of_range_give_nan_under_jit(model):
    logits, _ = forward(model, jnp.array([[1, 320, 2], [1, 2, 3]]), None, None)
    assert np.isfinite(logits[0, 0]).all()
    assert np.isnan(logits[0, 1:]).all()
    assert np.isfinite(logits[1]).all()
    logits, _ = forward(model, jnp.array([[-1, 4, 5], [1, 2, 3]]), None, None)
    assert np.isnan(logits[0]).all()


STATE = init_state(GOLDEN_CONFIG, 2)
replace = functools.partial(dataclasses.replace, STATE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": jnp.zeros((2, 3))}, TypeError, "tokens must have an integer dtype"),
        ({"tokens": [[1, 2]]}, TypeError, "tokens must be an array, got list"),
        ({"tokens": jnp.zeros(3, int)}, ValueError, r"tokens must have 2 axes \[B, T\]"),
        ({"tokens": jnp.zeros((2, 0), int)}, ValueError, "tokens must not be empty along T"),
        ({"tokens": jnp.full((1, 2), 320)}, ValueError, r"tokens must lie in 0\.\.319, got 320"),
        ({"tokens": jnp.full((1, 2), -1)}, ValueError, r"tokens must lie in 0\.\.319, got -1"),
        ({"state": 3}, TypeError, "state must be None or an RWKV7State, got int"),
        ({"state": init_state(GOLDEN_CONFIG, 1)}, ValueError, "state.time_shift .* with B=2"),
        ({"state": replace(wkv=STATE.wkv[:2])}, ValueError, "state.wkv .* with layers=3"),
        ({"state": replace(wkv=STATE.wkv[..., :9])}, ValueError, "state.wkv .* with V=64"),
        (
            {"state": replace(channel_shift=jnp.zeros((3, 2, 128), "bfloat16"))},
            TypeError,
            "state.channel_shift must have dtype float32, got bfloat16",
        ),
        ({"segment_ids": jnp.zeros((2, 4), int)}, ValueError, "segment_ids .* with T=3"),
        ({"segment_ids": jnp.zeros(3, int)}, ValueError, "segment_ids must have 2 axes"),
        ({"segment_ids": jnp.full((2, 3), -2)}, ValueError, "segment_ids must be >= 0 .*got -2"),
        ({"segment_ids": jnp.ones((2, 3))}, TypeError, "segment_ids must have an integer dtype"),
    ],
)
@pytest.mark.usefixtures("only_own_checks")
def test_wrong_calls(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model(**({"tokens": jnp.ones((2, 3), int)} | arguments))


@pytest.mark.usefixtures("only_own_checks")
def test_wrong_construction(model):
    with pytest.raises(TypeError, match=r"rngs must be an nnx.Rngs, got int: 0"):
        RWKV7(GOLDEN_CONFIG, rngs=0)
    with pytest.raises(TypeError, match="config must be an RWKV7Config, got dict"):
        RWKV7(GOLDEN_CONFIG.to_dict(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"batch_size must be an integer >= 1, got 0"):
        init_state(GOLDEN_CONFIG, 0)
    with pytest.raises(ValueError, match=r"hidden must have shape .* with C=128"):
        model.logits(jnp.zeros((1, 1, 64)))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_one_program_reads_any_number_of_rows_and_tokens(model, tokens):
    graphdef, params = nnx.split(model)
    rows, length = jax.export.symbolic_shape("rows, length")

    def run(params, tokens, state, ids):
        return nnx.merge(graphdef, params)(tokens, state, ids)

    def loss(params, *arguments):
        return jax.nn.logsumexp(run(params, *arguments)[0], axis=-1).mean()

    def symbolic(x):
        sizes = {2: rows, 40: length}
        return jax.ShapeDtypeStruct(tuple(sizes.get(n, n) for n in x.shape), x.dtype)

    ids = jnp.where(jnp.arange(40)[None] < 25, 1, 2) * jnp.ones_like(tokens)
    state = init_state(model.config, 2)
    of_rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0], rows, *x.shape[2:]), x.dtype), state
    )
    arguments = (params, symbolic(tokens), of_rows, symbolic(ids))
    actual = jax.export.export(jax.jit(run))(*arguments).call(params, tokens, state, ids)
    expected = forward(model, tokens, state, ids)
    for x, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, reference, rtol=1e-4, atol=1e-5)
    gradient = jax.export.export(jax.jit(jax.grad(loss)))(*arguments)
    assert [x.shape for x in gradient.out_avals] == [x.shape for x in jax.tree.leaves(params)]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_explicit_axes_divide_rows_and_vocabulary(model, tokens):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"))  # axes are explicit
    graphdef, params = nnx.split(model)

    def on_mesh(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    with jax.set_mesh(mesh):
        divided = jax.tree.map(on_mesh, params)
        divided["head"] = jax.tree.map(lambda x: on_mesh(x, None, "columns"), params["head"])
        model_on_mesh, tokens_on_mesh = nnx.merge(graphdef, divided), on_mesh(tokens, "rows")
        logits, state = forward(model_on_mesh, tokens_on_mesh, None, None)
        hidden, _ = jax.jit(RWKV7.decode)(model_on_mesh, tokens_on_mesh[:, 0], state)
        shapes = jax.eval_shape(
            jax.grad(lambda params: nnx.merge(graphdef, params)(tokens_on_mesh)[0].sum()), divided
        )
    assert logits.sharding.spec == PartitionSpec("rows", None, "columns")
    assert state.wkv.sharding.spec[1] == hidden.sharding.spec[0] == "rows"
    assert shapes["head"].get_value().sharding.spec == PartitionSpec(None, "columns")
    expected, expected_state = forward(model, tokens, None, None)
    assert relative_rms(logits, expected) < 1e-5
    assert_states_close(state, expected_state, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_explicit_axes_divide_rows_and_tokens(model, tokens):
    mesh = jax.make_mesh((2, 2), ("rows", "context"))  # axes are explicit
    spec = PartitionSpec("rows", "context")
    ids = jnp.where(jnp.arange(40)[None] < 25, 1, 2) * jnp.ones_like(tokens)
    with jax.set_mesh(mesh):
        divided = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (tokens, ids)]
        graphdef, params = nnx.split(model)
        everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        on_mesh = nnx.merge(graphdef, everywhere)
        logits, state = forward(on_mesh, divided[0], None, divided[1])
    assert logits.sharding.spec[:2] == ("rows", "context")
    expected, expected_state = forward(model, tokens, None, ids)
    assert relative_rms(logits, expected) < 1e-5
    assert_states_close(state, expected_state, 1e-5)
