"""The forward and the backward of an operator, chosen separately."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    channel_mix,
    cross_entropy,
    key_update,
    output_correction,
    token_shift_mix,
    value_residual,
    wkv7,
    wkv7_recurrent,
)
from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import NotServed
from pallas_kernels.sharding import Layout
from tests.pallas_kernels.operator_checks import assert_close, draw, evaluate, saved_for_backward

TOKENS, HEAD = (2, 3, 2, 8), (2, 8)
SEGMENT_IDS = np.array([[1, 1, 2], [0, 1, 0]], np.int32)

OPERATORS = {
    "token_shift_mix": (
        functools.partial(token_shift_mix, segment_ids=SEGMENT_IDS),
        draw(0, x=(2, 3, 4), mixes=(2, 4), state=(2, 4)),
    ),
    "key_update": (
        key_update,
        draw(1, k=TOKENS, alpha=TOKENS, removal_scale=HEAD, replacement_mix=HEAD),
    ),
    "value_residual": (value_residual, draw(2, v=TOKENS, v_first=TOKENS, logits=TOKENS)),
    "output_correction": (
        functools.partial(output_correction, eps=0.1),
        draw(
            3,
            **dict.fromkeys(("o", "r", "k", "v", "gate"), TOKENS),
            **dict.fromkeys(("bonus", "norm_scale", "norm_bias"), HEAD),
        ),
    ),
}
"""The operators whose backward needs only their inputs, with arguments."""

PAIRS = [("reference", "xla"), ("xla", "reference"), ("reference", "reference"), (None, "xla")]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", OPERATORS)
def test_pairs_agree(name, pair):
    operator, inputs = OPERATORS[name]
    inputs = {n: jnp.asarray(x, jnp.float32) for n, x in inputs.items()}
    found, expected = (
        evaluate(functools.partial(operator, implementation=implementation), inputs)
        for implementation in (pair, "reference")
    )
    for x, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(x, reference, 2e-6, str(pair))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_backward_that_jax_derives_keeps_only_the_inputs(name):
    operator, inputs = OPERATORS[name]
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs.values()]

    def call(*arrays):
        named = dict(zip(inputs, arrays, strict=True))
        return operator(**named, implementation=("xla", "reference"))

    assert saved_for_backward(call, *arrays) == sorted(x.shape for x in arrays)


@pytest.mark.parametrize("implementation", ["reference", ("reference", "reference")])
def test_jax_knows_the_derivatives_of_the_reference(implementation):
    operator, inputs = OPERATORS["value_residual"]
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in inputs.values())
    function = functools.partial(operator, implementation=implementation)
    _, tangents = jax.jvp(function, arrays, tuple(map(jnp.ones_like, arrays)))
    assert np.isfinite(tangents).all()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        (("cuda", "xla"), r"implementation=\('cuda', 'xla'\) is unknown for the forward"),
        (("xla", "cuda"), r"implementation=\('xla', 'cuda'\) is unknown for the backward"),
        (("xla",), r"implementation=\('xla',\) must have a forward and a backward"),
        (["xla", "xla"], r"implementation=\['xla', 'xla'\] is unknown"),
    ],
)
def test_unknown_names(name, implementation, message):
    operator, inputs = OPERATORS[name]
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        operator(**inputs, implementation=implementation)


WKV = dict.fromkeys(("r", "log_decay", "k", "v", "a", "b"), jnp.zeros(TOKENS))
HIDDEN, WEIGHT = jnp.ones((1, 2, 3)), jnp.ones((3, 5))


@pytest.mark.parametrize(
    "call",
    [
        functools.partial(wkv7, **WKV),
        functools.partial(wkv7_recurrent, **WKV),
        functools.partial(cross_entropy, HIDDEN, WEIGHT, jnp.zeros((1, 2), int)),
        functools.partial(channel_mix, HIDDEN, jnp.ones(3), WEIGHT, WEIGHT.T),
    ],
    ids=["wkv7", "wkv7_recurrent", "cross_entropy", "channel_mix"],
)
def test_operators_that_keep_more_take_no_pair(call):
    with pytest.raises(ValueError, match=r"implementation=\('reference', 'xla'\) is a pair, but"):
        call(implementation=("reference", "xla"))


def double(x):
    return 2 * x


def never(*_, **__):
    raise NotServed("never")


def minus_one(x, *, cotangents):
    return (-cotangents,)


def test_none_moves_on_in_each_direction():
    def run(x, backward, implementation=None):
        forward = {"kernel": never, "reference": double}
        return run_from_inputs("op", forward, backward, Layout(("",), ""), implementation, x)

    slope = jax.grad(lambda x: run(x, {"kernel": minus_one, "reference": differentiate(double)}))
    assert slope(1.0) == -1
    slope = jax.grad(lambda x: run(x, {"kernel": never, "reference": differentiate(double)}))
    assert slope(1.0) == 2
    with pytest.raises(ExceptionGroup, match="op: no implementation serves this call"):
        jax.grad(lambda x: run(x, {"kernel": never}))(1.0)
    backward = {"kernel": never, "reference": differentiate(double)}
    with pytest.raises(NotServed, match="never"):
        run(1.0, backward, ("kernel", "reference"))
    assert run(1.0, backward, ("reference", "kernel")) == 2
    with pytest.raises(NotServed, match="never"):
        jax.grad(lambda x: run(x, backward, ("reference", "kernel")))(1.0)
