"""The code of docs/operators.md runs, and its table lists all operators."""

import dataclasses
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import pallas_kernels
from goose_jax import RWKV7, RWKV7Config, init_state
from tests.helpers import relative_rms
from tests.pallas_kernels.operator_checks import draw

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "operators.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CONVERSION, LAYER, DECODING, SHARDED, PIECES = BLOCKS
INPUTS = ("r", "log_decay", "k", "v", "a", "b")


@pytest.mark.slow
def test_conversion_from_cu_seqlens_equals_sequences_on_their_own():
    keys, values = (1, 7, 2, 4), (1, 7, 2, 3)
    drawn = draw(0, r=keys, log_decay=keys, k=keys, v=values, a=keys, b=keys, h0=(3, 2, 4, 3))
    names = {name: jnp.asarray(x, jnp.float32) for name, x in drawn.items()}
    names["log_decay"] = -jnp.abs(names["log_decay"])
    cu_seqlens = np.array([0, 2, 3, 7])
    exec(CONVERSION, names, result := {"cu_seqlens": jnp.asarray(cu_seqlens)})
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        o, state = pallas_kernels.wkv7(
            *(names[name][:, start:stop] for name in INPUTS),
            initial_state=names["h0"][n : n + 1],
            implementation="reference",
        )
        assert relative_rms(result["o"][:, start:stop], o) < 1e-6
        assert relative_rms(result["ht"][n], state[0]) < 1e-6


@pytest.mark.slow
def test_layer_runs():
    shape = (2, 5, 2, 4)
    vectors = dict.fromkeys(("removal_scale", "replacement_mix", "bonus"), shape[2:])
    vectors |= dict.fromkeys(("norm_scale", "norm_bias"), shape[2:])
    drawn = draw(0, x=(2, 5, 8), mixes=(6, 8), v_first=shape, **vectors)
    names = {name: jnp.asarray(x, jnp.float32) for name, x in drawn.items()}
    names["wkv7"] = pallas_kernels.wkv7
    names["segment_ids"] = jnp.array([[1, 1, 2, 2, 2], [0, 1, 1, 0, 2]])

    def project(xr, xw, xk, xv, xa, xg):
        r, decay, k, v, alpha, gate = (x.reshape(shape) for x in (xr, xw, xk, xv, xa, xg))
        return r, k, v, -jnp.abs(decay), 1 / (1 + jnp.exp(-alpha)), v, gate

    names["project"] = project
    exec(LAYER, names)
    assert names["y"].shape == shape
    assert jnp.isfinite(names["y"]).all()


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("code", "spec"), [(SHARDED, ("rows", None, "heads", None)), (PIECES, (None, "context"))]
)
def test_sharded_runs(code, spec):
    drawn = draw(0, **dict.fromkeys(INPUTS, (2, 8, 4, 4)))
    names = {name: jnp.asarray(x, jnp.float32) for name, x in drawn.items()}
    names["log_decay"] = -0.5 * jax.nn.sigmoid(names["log_decay"])
    direct = pallas_kernels.wkv7(*(names[name] for name in INPUTS))
    exec(code, names)
    assert names["o"].sharding.spec == PartitionSpec(*spec)
    assert relative_rms(names["o"], direct[0]) < 1e-6
    assert relative_rms(names["final_state"], direct[1]) < 1e-6


@pytest.mark.slow
def test_decoding_runs():
    config = RWKV7Config(vocab_size=5, hidden_size=64, num_layers=2, compute_dtype="float32")
    model, state = RWKV7(config, rngs=nnx.Rngs(0)), init_state(config, 3)
    names = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    exec(DECODING, names | {"model": model, "x": jnp.ones((3, 64))}, result := {})
    assert result["x"].shape == (3, 64)
    assert [x.shape for x in result["states"]] == [x.shape for x in jax.tree.leaves(state)]


def test_every_operator_is_listed():
    for name in pallas_kernels.__all__:
        assert f"| `{name}`" in PAGE
