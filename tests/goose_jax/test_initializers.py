"""Initial values against the official formulas, written out channel by channel in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from goose_jax import RWKV7, Block, RWKV7Config
from goose_jax.nn import initializers
from tests.goose_jax.official_weights import to_official

CONFIG = RWKV7Config(vocab_size=300, hidden_size=128, num_layers=3)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


def official_vectors(i, n, C, head_size):
    """The vectors of layer i by official name, in plain Python."""
    r01 = i / (n - 1) if n > 1 else 0.0
    r10 = 1 - i / n
    half = (head_size - 1) / 2
    vectors = {}
    powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    for name, power in powers.items():
        vectors[f"att.{name}"] = [1 - (c / C) ** (power * r10) for c in range(C)]
    vectors["ffn.x_k"] = [1 - (c / C) ** (r10**4) for c in range(C)]
    w0, a0, v0, k_k = [], [], [], []
    for c in range(C):
        linear = c / (C - 1) - 0.5
        z = (c % head_size - half) / half
        zigzag = z * abs(z)
        www = -6 + 6 * (c / (C - 1)) ** (1 + r01**0.3)
        w0.append(www + 0.5 + zigzag * 2.5)
        a0.append(-0.19 + zigzag * 0.3 + linear * 0.4)
        v0.append(0.73 - linear * 0.4)
        k_k.append(0.71 - linear * 0.1)
    vectors |= {"att.w0": w0, "att.a0": a0, "att.v0": v0, "att.k_k": k_k}
    vectors["att.k_a"] = [1.02] * C
    vectors["att.r_k"] = [-0.04] * C
    vectors["att.ln_x.weight"] = [((1 + i) / n) ** 0.7] * C
    vectors["att.ln_x.bias"] = vectors["ln1.bias"] = vectors["ln2.bias"] = [0.0] * C
    vectors["ln1.weight"] = vectors["ln2.weight"] = [1.0] * C
    return {name: np.array(values) for name, values in vectors.items()}


@pytest.fixture(scope="module")
def weights():
    model = RWKV7(CONFIG, rngs=nnx.Rngs(0))
    return to_official(nnx.state(model))


def test_vectors_of_every_layer(weights):
    for i in range(3):
        for name, expected in official_vectors(i, 3, 128, 64).items():
            actual = weights[f"blocks.{i}.{name}"].ravel()
            # Measured: at most 7.9e-7 (of w0, which reaches 8).
            np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6, err_msg=name)


def test_vectors_of_a_single_layer_with_small_heads():
    config = RWKV7Config(vocab_size=1, hidden_size=96, num_layers=1, head_size=32)
    block = jax.jit(lambda: nnx.state(Block(config, layer=0, rngs=nnx.Rngs(0))))()
    time_mix = nnx.to_pure_dict(block)["time_mix"]
    expected = official_vectors(0, 1, 96, 32)
    for name, ours in {"att.w0": "decay_base", "att.a0": "alpha_base"}.items():
        np.testing.assert_allclose(time_mix[ours], expected[name], rtol=0, atol=2e-6)
    assert time_mix["removal_scale"].shape == (3, 32)


def test_zero_matrices(weights):
    for i in range(3):
        for name in ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1"):
            assert not weights[f"blocks.{i}.{name}"].any(), name
        assert not weights[f"blocks.{i}.att.g1"].any()


def assert_orthogonal(matrix, gain):
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    # Measured: at most 1.1e-6, relative to gain^2.
    np.testing.assert_allclose(gram / gain**2, np.eye(min(rows, columns)), rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(8, 8), (8, 16), (8, 64), (64, 8), (16, 300)])
def test_orthogonal_is_what_a_qr_decomposition_makes(shape):
    key = jax.random.key(1)
    matrix = initializers.orthogonal(key, shape, 0.5)
    expected = jax.nn.initializers.orthogonal(0.5)(key, shape, jnp.float32)
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_orthogonal_matrices(weights):
    for i in range(3):
        block = f"blocks.{i}"
        assert_orthogonal(weights[f"{block}.att.receptance.weight"], 1.0)
        assert_orthogonal(weights[f"{block}.att.value.weight"], 1.0)
        assert_orthogonal(weights[f"{block}.att.key.weight"], 0.1)
        assert_orthogonal(weights[f"{block}.ffn.key.weight"], 1.0)  # [4C, C]
        for name in ("w2", "a2", "v2", "g2"):
            assert_orthogonal(weights[f"{block}.att.{name}"], 0.1)
    assert_orthogonal(weights["head.weight"], 0.5 * math.sqrt(300 / 128))


def test_gains_of_unusual_shapes():
    key = jax.random.key(0)
    assert_orthogonal(initializers.low_rank_up(key, 8, 4), 0.1 * math.sqrt(2))  # rank above C
    narrow = RWKV7Config(vocab_size=65, hidden_size=128, num_layers=1)
    assert_orthogonal(initializers.head(key, narrow), 0.5)  # vocabulary below C


def test_embedding_is_uniform(weights):
    embedding = weights["emb.weight"]
    assert np.abs(embedding).max() <= 1e-4
    assert np.abs(embedding).max() > 0.999e-4
    # Of 38,400 samples: the standard error of the mean is 2.9e-7.
    assert abs(embedding.mean()) < 1.5e-6
    assert embedding.std() == pytest.approx(1e-4 / math.sqrt(3), rel=0.02)
    assert (weights["blocks.0.ln0.weight"] == 1).all()
    assert not weights["blocks.0.ln0.bias"].any()


def test_random_matrices_differ_by_layer_by_name_and_by_seed(weights):
    matrices = [
        weights[f"blocks.{i}.att.{name}.weight"]
        for i in range(3)
        for name in ("receptance", "value")
    ]
    other = to_official(nnx.state(RWKV7(CONFIG, rngs=nnx.Rngs(1))))
    matrices.append(other["blocks.0.att.receptance.weight"])
    for j, first in enumerate(matrices):
        for second in matrices[:j]:
            cosine = np.sum(first * second) / 128  # each has norm sqrt(128)
            assert abs(cosine) < 0.05  # standard deviation 1 / 128


def test_parameters_have_the_parameter_dtype():
    config = RWKV7Config(vocab_size=9, hidden_size=64, num_layers=2, param_dtype="bfloat16")
    state = nnx.eval_shape(lambda: nnx.state(RWKV7(config, rngs=nnx.Rngs(0))))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
