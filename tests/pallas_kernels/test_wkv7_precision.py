"""`wkv7(precision="high")`: which implementation runs, and what its products keep."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from goose_jax import RWKV7, RWKV7Config
from pallas_kernels import wkv7
from pallas_kernels.dispatch import NotServed
from tests.helpers import in_mesh_of
from tests.pallas_kernels.wkv7_cases import NAMES, RWKV7_BOUND

H100 = ("NVIDIA H100 80GB HBM3", 132)
HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)

bounded = functools.partial(wkv7, min_log_decay=RWKV7_BOUND)
arguments = dict.fromkeys(NAMES, jax.ShapeDtypeStruct((1, 70, 1, 64), jnp.bfloat16))


def gradient(function):
    def loss(arguments):
        o, final_state = function(**arguments)
        return o.astype(jnp.float32).sum() + final_state.sum()

    return jax.grad(loss)


def products(jaxpr: Jaxpr) -> list[tuple]:
    """The precision of every product of a program, in loops and branches, too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(inner, ClosedJaxpr):
                found += products(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                found += products(inner)
    return found


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_products_lose_no_digits(implementation):
    function = functools.partial(bounded, implementation=implementation)

    def precisions(function):
        with jax.default_matmul_precision("bfloat16"):
            return products(jax.make_jaxpr(gradient(function))(arguments).jaxpr)

    found = precisions(functools.partial(function, precision="high"))
    assert len(found) > 5
    assert set(found) == {HIGHEST}
    assert set(precisions(function)) != {HIGHEST}


def kernels(function, *arguments) -> int:
    """How many kernels there are in a program that is made for an H100."""
    with in_mesh_of(*H100):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments)
    return exported.mlir_module().count("custom_call @mosaic_gpu")


def test_kernels_leave_high_precision_to_xla():
    assert kernels(lambda x: bounded(**x), arguments) == 1
    assert kernels(lambda x: bounded(**x, precision="high"), arguments) == 0
    with pytest.raises(NotServed, match="mosaic_gpu rounds operands to 16 bits, got precision='hi"):
        bounded(**arguments, precision="high", implementation="mosaic_gpu")


@pytest.mark.slow
def test_the_model_hands_its_precision_on():
    def wkv_kernels(precision):
        config = RWKV7Config(vocab_size=8, hidden_size=64, num_layers=1, precision=precision)
        model = RWKV7(config, rngs=nnx.Rngs(0))
        tokens = jax.ShapeDtypeStruct((1, 70), jnp.int32)
        with in_mesh_of(*H100):
            hidden = jax.jit(lambda tokens: model.hidden(tokens)[0])
            program = jax.export.export(hidden, platforms=["cuda"])(tokens).mlir_module()
        return program.count("wkv7_outputs")

    assert wkv_kernels(None) > 0
    assert wkv_kernels("high") == 0
