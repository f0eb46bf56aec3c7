"""WKV7 on inputs where rounding operands of products costs much more than rounding the results.

`wkv7_cases.HARD` lists them. The kernels round operands; XLA in high precision does not.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import wkv7, wkv7_recurrent
from pallas_kernels.hopper.target import Target
from pallas_kernels.operators.wkv7.call import WKVCall, WKVInputs
from pallas_kernels.operators.wkv7.mosaic_gpu.differentiable import wkv7_in_chunks
from tests.helpers import relative_rms
from tests.pallas_kernels.wkv7_cases import HARD, RWKV7_BOUND, Case, expected
from tests.pallas_kernels.wkv7_checks import run

pytestmark = pytest.mark.usefixtures("module_quick_to_compile", "no_races_and_no_hanging")
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")

OF_KERNELS = {
    "nearly parallel keys": {"o": 1.2e-2, "final_state": 6e-3, "d_initial_state": 6e-3, "d_": 2e-2},
    "three tokens in turn": {"o": 4e-3, "final_state": 4e-3, "d_b": 5e-2, "d_": 2e-2},
    "one token repeated": {"o": 4e-3, "final_state": 4e-3, "d_b": 2e-2, "d_": 1e-2},
}
"""Limits of relative RMS errors of the kernels, by result; "d_" for all other gradients."""
IN_BFLOAT16 = {
    "nearly parallel keys": {"o": 2.5e-2, "final_state": 3.5e-2, "d_v": 4e-2, "d_": 2.5e-2},
    "three tokens in turn": {"o": 4e-3, "final_state": 4e-3, "d_b": 2.5e-1, "d_": 2e-2},
    "one token repeated": {"o": 4e-3, "final_state": 4e-3, "d_b": 2.5e-2, "d_": 1e-2},
}
"""The same for 128 keys, whose products are all of bfloat16."""
HIGH = {"o": 3e-3, "final_state": 1e-3, "d_": 3e-3}
"""Limits of high precision. Measured were 1.7e-3, what rounding exact results to bfloat16 costs."""


def assert_within(limits: Mapping[str, float], results, reference) -> None:
    errors = {name: relative_rms(x, reference[name]) for name, x in results.items()}
    wrong = {n: e for n, e in errors.items() if not e <= limits.get(n, limits["d_"])}  # or NaN
    assert not wrong, (wrong, errors)


def case_of(kind: str, *shape: int, **settings) -> Case:
    return Case(shape, **{"dtype": "bfloat16"} | HARD[kind] | settings)


def interpreted(r, log_decay, k, v, a, b, *, initial_state, segment_ids, num_segments, scale):
    call = WKVCall(
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    return wkv7_in_chunks(Target(interpret=True), WKVInputs(r, log_decay, k, v, a, b), call)


on_gpu = functools.partial(wkv7, implementation="mosaic_gpu", min_log_decay=RWKV7_BOUND)
high = functools.partial(wkv7, precision="high", min_log_decay=RWKV7_BOUND)
recurrent = functools.partial(wkv7_recurrent, implementation="mosaic_gpu")
exact = functools.partial(wkv7_recurrent, implementation="xla")


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", HARD)
def test_interpreted_kernels(kind):
    case = case_of(kind, 1, 640, 1, 64, 64)
    assert_within(OF_KERNELS[kind], run(interpreted, case, jnp.bfloat16), expected(case))


@on_cpu
def test_interpreted_kernels_where_every_other_chunk_forgets_much():
    kind = "nearly parallel keys"
    case = case_of(kind, 1, 256, 1, 64, 64, decay="by chunks")
    # If k were split in the wrong chunks, d_v would err by 1.5e-2.
    limits = OF_KERNELS[kind] | {"d_v": 1e-2}
    assert_within(limits, run(interpreted, case, jnp.bfloat16), expected(case))


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", HARD)
def test_high_precision(kind):
    case = case_of(kind, 1, 130, 1, 64, 64)
    assert_within(HIGH, run(high, case, jnp.bfloat16), expected(case))


# On a Hopper GPU. The definition is evaluated there in float64, by a scan.


def assert_on_gpu(limits: Mapping[str, float], function, case: Case) -> None:
    results = run(function, case, jnp.dtype(case.dtype))
    with jax.enable_x64():
        reference = jax.device_get(run(exact, case, jnp.float64))
    assert_within(limits, results, reference)


PACKED = (((1, 300), (0, 7), (2, 201), (3, 1), (4, 268)),)
AT_SIZE = {
    "in pieces": ((1, 2500, 4, 64, 64), None),
    "whole chunks": ((2, 512, 67, 64, 64), None),
    "packed": ((1, 777, 4, 64, 64), PACKED),
    "K 128": ((1, 700, 2, 128, 64), None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", AT_SIZE)
@pytest.mark.parametrize("kind", HARD)
def test_kernels_at_size(kind, name):
    shape, lengths = AT_SIZE[name]
    limits = OF_KERNELS if shape[-2] == 64 else IN_BFLOAT16
    assert_on_gpu(limits[kind], on_gpu, case_of(kind, *shape, lengths=lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HARD)
def test_high_precision_at_size(kind):
    assert_on_gpu(HIGH, high, case_of(kind, 1, 2500, 4, 64, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HARD)
def test_recurrent_kernels_at_size(kind):
    limits = {"o": 4e-3, "final_state": 4e-3, "d_": 1e-2}
    assert_on_gpu(limits, recurrent, case_of(kind, 1, 500, 4, 64, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", HARD)
def test_long_rows_are_finite(kind, dtype):
    # With larger values exact results are out of the range of float16.
    factors = (("v", 5e-4),) if dtype == "float16" else ()
    case = case_of(kind, 1, 65536, 1, 64, 64, dtype=dtype, factors=factors)
    results = run(on_gpu, case, jnp.dtype(dtype))
    assert all(np.isfinite(x).all() for x in jax.device_get(results).values())
