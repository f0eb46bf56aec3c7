"""One token of each row through the model: by its modules, and by `decode_layers`."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config, SamplingConfig, init_state
from goose_jax.generation import decoding
from goose_jax.nn import DecodingWeights, abstract_model, prepare_decoding
from tests.goose_jax.decoding import CONFIG, random_model
from tests.goose_jax.official_weights import GOLDEN, GOLDEN_CONFIG, golden_model
from tests.helpers import count_kernels, in_mesh_of, relative_rms

IMPLEMENTATIONS = ("xla", "reference")

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


def read(model, tokens, state, active=None, *, implementation):
    """Returns logits `[B, T, vocab]` and the state after tokens `[B, T]`; `active` is `[B, T]`."""
    weights = prepare_decoding(model)
    return read_prepared(weights, tokens, state, active, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def read_prepared(weights, tokens, state, active=None, *, implementation):
    model = weights.model()

    def step(state, inputs):
        hidden, state = model.decode(inputs[0], state, inputs[1], implementation=implementation)
        return state, model.logits(hidden[:, None])[:, 0]

    active = None if active is None else active.T
    state, logits = jax.lax.scan(step, state, (tokens.T, active))
    return jnp.swapaxes(logits, 0, 1), state


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_official_logits_and_states(implementation):
    with np.load(GOLDEN / "logits_17_tokens.npz") as arrays:
        official = dict(arrays)
    tokens = jnp.asarray(official["tokens"], jnp.int32)[None]
    state = init_state(GOLDEN_CONFIG, 1)
    logits, state = read(golden_model(), tokens, state, implementation=implementation)
    assert np.abs(logits[0] - official["logits_np64"]).max() < 1e-4  # measured: 2.6e-6
    wkv = jnp.swapaxes(state.wkv[:, 0], -1, -2)
    assert relative_rms(wkv, official["state_wkv_np64"]) < 1e-5
    assert relative_rms(state.time_shift[:, 0], official["state_att_x_np64"]) < 1e-5
    assert relative_rms(state.channel_shift[:, 0], official["state_ffn_x_np64"]) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_rest_keep_their_state(implementation):
    model = golden_model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 320, (2, 6)))
    active = jnp.array([[True] * 6, [True, False, False, True, True, False]])
    state = init_state(GOLDEN_CONFIG, 2)
    logits, state = read(model, tokens, state, active, implementation=implementation)
    kept = tokens[1:, np.array([0, 3, 4])]
    alone = init_state(GOLDEN_CONFIG, 1)
    expected, alone = read(model, kept, alone, implementation=implementation)
    assert relative_rms(logits[1, np.array([0, 3, 4])], expected[0]) < 1e-5
    for field in dataclasses.fields(alone):
        found = getattr(state, field.name)[:, 1:]
        assert relative_rms(found, getattr(alone, field.name)) < 1e-5


@pytest.mark.slow
def test_ranks_are_padded_and_matrices_have_the_compute_dtype():
    config = RWKV7Config(vocab_size=5, hidden_size=64, num_layers=2)
    weights = RWKV7(config, rngs=nnx.Rngs(0)).layer_weights()
    assert config.decay_rank == 32
    assert weights.decay_down.shape == (2, 64, 64)
    assert (weights.decay_down[:, :, 32:] == 0).all()
    assert (weights.decay_up[:, 32:] == 0).all()
    assert weights.decay_up.dtype == weights.channel_key.dtype == jnp.bfloat16
    assert weights.decay_base.dtype == jnp.float32


def abstract_weights(config):
    return jax.eval_shape(lambda: prepare_decoding(RWKV7(config, rngs=nnx.Rngs(0))))


def changed_matrices(program, weights):
    """Returns the shapes of the matrices that a lowered program casts or pads, as in "64x256"."""
    shapes = set()
    for array in jax.tree.leaves(weights):
        if array.ndim >= 2 and min(array.shape[-2:]) >= 16:
            matrix = "x".join(map(str, array.shape[-2:]))
            shapes |= {"x".join(map(str, array.shape)), matrix, f"1x{matrix}"}
    changed = re.findall(r"stablehlo\.(?:convert|pad) [^\n]*?: \(tensor<([\dx]+)x\w+>", program)
    return sorted(shapes & set(changed))


@pytest.mark.parametrize(
    "implementation", [None, "xla", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_a_block_of_tokens_casts_no_matrix(implementation):
    config = RWKV7Config(vocab_size=48, hidden_size=128, num_layers=2, compute_dtype="bfloat16")
    settings = decoding.row_settings(
        seeds=[(0, 0)], sampling=[SamplingConfig()], stop_tokens=[np.arange(1)], limits=[8]
    )

    def matrices(weights):
        traced = decoding.trace_decode_block(
            weights, settings, block_size=4, implementation=implementation
        )
        return changed_matrices(traced.lower().as_text(), weights)

    assert matrices(abstract_weights(config)) == []
    # The model itself has matrices to cast, which `changed_matrices` finds.
    unprepared = matrices(DecodingWeights(config, *nnx.split(abstract_model(config))))
    assert {"128x48", "128x128"} <= {shape.removeprefix("2x") for shape in unprepared}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have no such option")
def test_a_cpu_decodes_in_the_order_that_needs_least_memory():
    settings = decoding.row_settings(
        seeds=[(0, 0)],
        sampling=[SamplingConfig(temperature=0)],
        stop_tokens=[np.arange(1)],
        limits=[2],
    )
    weights = prepare_decoding(random_model(0))
    lowered = decoding.trace_decode_block(weights, settings, block_size=1).lower()
    order = lowered.compile().as_text()

    def in_order(name):
        option = f"CPU_SCHEDULER_TYPE_{name}_OPTIMIZED"
        return lowered.compile({"xla_cpu_scheduler_type": option}).as_text()

    assert order == in_order("MEMORY") != in_order("CONCURRENCY")


def test_a_block_of_other_values_traces_nothing(monkeypatch):
    def run(seed, rows=1):
        settings = decoding.row_settings(
            seeds=[(seed, 0)] * rows,
            sampling=[SamplingConfig(temperature=1 + seed)] * rows,
            stop_tokens=[np.arange(1)] * rows,
            limits=[8] * rows,
        )
        weights, progress = (
            prepare_decoding(random_model(seed)),
            decoding.init_progress(CONFIG, rows),
        )
        decoding.decode_block(weights, settings, progress, block_size=4)

    run(seed=0)
    monkeypatch.setattr(RWKV7, "decode", chex.assert_max_traces(RWKV7.decode, n=0))
    run(seed=1)
    with pytest.raises(AssertionError, match="traced > 0 times"):
        run(seed=1, rows=11)


@pytest.mark.slow
def test_prepared_weights_share_what_needs_no_change():
    config = RWKV7Config(
        vocab_size=48, hidden_size=64, num_layers=2, value_rank=64, alpha_rank=64, decay_rank=64,
        gate_rank=64, param_dtype="bfloat16",
    )  # fmt: skip
    model = RWKV7(config, rngs=nnx.Rngs(0))
    weights = prepare_decoding(model)
    assert prepare_decoding(weights) is weights
    shared = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    for mine, theirs in zip(jax.tree.leaves(weights.params), shared, strict=True):
        assert mine is theirs

    padded = RWKV7(dataclasses.replace(config, value_rank=40), rngs=nnx.Rngs(0))
    theirs = nnx.to_pure_dict(nnx.state(padded))
    mine = prepare_decoding(padded).params
    different = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, array in jax.tree.leaves_with_path(mine)
        if array is not functools.reduce(lambda tree, key: tree[key.key], path, theirs)
    ]
    assert different == [f"blocks.time_mix.value_residual_{half}" for half in ("down", "up")]


@pytest.mark.usefixtures("only_own_checks")
def test_wrong_arguments_are_named():
    model, state = golden_model(), init_state(GOLDEN_CONFIG, 2)
    with pytest.raises(ValueError, match=r"tokens must have 1 axes \[B\], got shape=\(2, 1\)"):
        model.decode(jnp.ones((2, 1), int), state)
    for implementation in IMPLEMENTATIONS:
        decode = functools.partial(model.decode, implementation=implementation)
        with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.319, got 1\.\.320"):
            decode(jnp.array([1, 320]), state)
        with pytest.raises(ValueError, match=r"state\.time_shift must have shape .*B=3"):
            decode(jnp.ones(3, int), state)
    with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
        model.decode(jnp.ones(2, int), state, implementation="cuda")


@pytest.mark.parametrize(("dtype", "kernels"), [("bfloat16", 18), ("float32", 0)])
def test_none_takes_the_kernels_that_serve(dtype, kernels):  # eight of each layer, two norms
    config = RWKV7Config(vocab_size=5, hidden_size=256, num_layers=2, compute_dtype=dtype)
    weights = abstract_weights(config)
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    state = jax.eval_shape(lambda: init_state(config, 2))
    with in_mesh_of("NVIDIA H100 80GB HBM3", 132):
        traced = read_prepared.trace(weights, tokens, state, implementation=None)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert not changed_matrices(program, weights)
    of_layers = "heads" in program and "norm_mix" in program
    assert of_layers == (kernels > 0)
    assert count_kernels(program) == (kernels or 1)  # or the recurrence alone


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 5, 150])
def test_kernels_on_the_gpu_agree_with_the_modules(B):
    config = RWKV7Config(
        vocab_size=320, hidden_size=256, num_layers=3, param_dtype="bfloat16", remat="none"
    )
    graphdef, params = nnx.split(RWKV7(config, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        (x + 0.05 * jax.random.normal(key, x.shape)).astype(x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    model = nnx.merge(graphdef, jax.tree.unflatten(structure, noisy))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 320, (B, 40)))
    active = jnp.asarray(rng.random((B, 40)) < 0.8)
    results = {
        name: read(model, tokens, init_state(config, B), active, implementation=name)
        for name in ("xla", "mosaic_gpu")
    }
    chosen = read(model, tokens, init_state(config, B), active, implementation=None)
    chex.assert_trees_all_equal(chosen, results["mosaic_gpu"])
    (logits, state), (expected, expected_state) = results["mosaic_gpu"], results["xla"]
    rows = np.asarray(active)
    # Two ways of rounding: the definition in bfloat16 differs from the modules by 9.1e-3 in logits,
    # 6.6e-3 in states, and in 3 % of the most probable tokens of this random model.
    assert relative_rms(logits[rows], expected[rows]) < 2e-2
    for field in dataclasses.fields(state):
        found, reference = (getattr(s, field.name) for s in (state, expected_state))
        assert relative_rms(found, reference) < 2e-2, field.name
    same = logits[rows].argmax(axis=-1) == expected[rows].argmax(axis=-1)
    assert same.mean() > 0.9
