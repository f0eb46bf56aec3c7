"""Parts that kernels for Hopper GPUs are built from, interpreted and on such a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.registers import (
    STRIP,
    TILE_LAYOUT,
    Strip,
    are_between,
    first_zeros,
    halves_of,
    keep_triangle,
    largest_exponent,
    load,
    narrow,
    narrow_pairs,
    power_of_two,
    store,
    store_exp2_of_row,
    store_strips,
    widen,
    with_diagonal,
)
from pallas_kernels.hopper.ring import Ring, slots_that_fit
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import (
    TILE_BYTES,
    choose,
    column_sums,
    products,
    spread_rows,
    store_halves,
    tiles_smem,
    transposed,
)
from tests.pallas_kernels.tile_kernels import apply, on_each_device


def in_shared_memory(function, tiles, interpret: bool) -> np.ndarray:
    """Calls a function of tiles `[n, 64, 64]` bfloat16 in shared memory, which returns one."""

    def body(tiles_gmem, result_gmem, smem, result_smem, loaded):
        plgpu.copy_gmem_to_smem(tiles_gmem, smem, loaded)
        plgpu.barrier_wait(loaded)
        store((result_smem, function(*(smem.at[i] for i in range(len(tiles))))))
        plgpu.copy_smem_to_gmem(result_smem, result_gmem)
        plgpu.wait_smem_to_gmem(0)

    kernel = Target(interpret=interpret).kernel(
        body,
        name="shared_memory",
        out_type=jax.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16),
        grid={"block": 1},
        scratch_types=[tiles_smem(len(tiles)), tiles_smem(), plgpu.Barrier()],
    )
    return np.asarray(kernel(tiles), np.float64)


def small_integers(count: int) -> jax.Array:
    """Small integers, of which also sums of products are exact in bfloat16."""
    x = np.random.default_rng(0).integers(-1, 2, (count, TILE, TILE))
    x[:, :, ::3] = 0  # asymmetric, and sums stay below 256
    return jnp.asarray(x, jnp.bfloat16)


@on_each_device
def test_conversions_round_to_nearest(interpret):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TILE, TILE)), jnp.float32)
    x *= 2.0 ** jnp.arange(-40, 24)[None]  # also numbers that tell neighbours from each other

    def halves_by_conversions(x):
        high = narrow(x)
        return high, narrow(x - widen(high))

    high = x.astype(jnp.bfloat16)
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    for halves in (halves_of, halves_by_conversions):
        for half, expected in zip(apply(halves, x, 2, interpret), (high, low), strict=True):
            np.testing.assert_array_equal(half, np.asarray(expected, np.float64))


@on_each_device
@pytest.mark.parametrize("keep_zeros", [True, False])
def test_pairs_are_rounded_together(interpret, keep_zeros):
    x = np.random.default_rng(0).normal(size=(TILE, TILE)).astype(np.float32)
    x[:, ::8] = 0
    round_pairs = functools.partial(narrow_pairs, keep_zeros=keep_zeros)
    (actual,) = apply(lambda x: [round_pairs(x)], jnp.asarray(x), 1, interpret)
    first, second = x[:, ::2], x[:, 1::2]
    rounded = np.asarray(second.astype(jnp.bfloat16), np.float32)
    expected = first + (second - rounded)
    if keep_zeros:
        expected[first == 0] = 0
    expected = expected.astype(jnp.bfloat16)
    np.testing.assert_array_equal(actual[:, ::2], np.asarray(expected, np.float64))
    np.testing.assert_array_equal(actual[:, 1::2], rounded)
    # The error of a sum is that of one rounding, not of two.
    errors = (actual[:, ::2] + actual[:, 1::2] - first - second)[first != 0]
    alone = np.asarray(x.astype(jnp.bfloat16), np.float64) - x
    errors_alone = (alone[:, ::2] + alone[:, 1::2])[first != 0]
    assert errors.std() < 0.8 * errors_alone.std()


def bits_of(x: jax.Array) -> jax.Array:
    """Float16 numbers, as tiles hold them."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.bfloat16)


@on_each_device
def test_conversions_to_float16(interpret):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TILE, TILE)), jnp.float32)
    x *= 2.0 ** (jnp.arange(TILE) % 24 - 10)[None]  # high halves are normal numbers

    def halves_by_conversions(x):
        high = narrow(x, jnp.float16)
        return high, narrow(x - widen(high, jnp.float16), jnp.float16)

    high = x.astype(jnp.float16)
    low = x - high.astype(jnp.float32)
    for halves in (lambda x: halves_of(x, jnp.float16), halves_by_conversions):
        for half, expected in zip(apply(halves, x, 2, interpret), (high, low), strict=True):
            np.testing.assert_array_equal(half, np.asarray(bits_of(expected), np.float64))


@on_each_device
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("number", "at", "within"),
    [
        (1.0, (0, 0), True),
        (-8.0, (63, 63), True),
        (8.25, (20, 7), False),
        (-1e30, (40, 33), False),
        (np.nan, (1, 62), False),
        (0.0, (16, 0), True),
        (0.25, (16, 5), False),
        (-0.5, (47, 60), True),
    ],
)
def test_bounds_of_tiles(number, at, within, dtype, interpret):
    """Rows 0 to 15 hold 1, the others 0, and one number more."""
    x = jnp.where(jnp.arange(TILE)[:, None] < 16, jnp.ones((TILE, TILE)), 0).at[at].set(number)

    def indicate(x):
        ones = plgpu.layout_cast(jnp.ones((TILE, TILE), jnp.bfloat16), plgpu.Layout.WGMMA)
        wide = x.astype(jnp.float32)
        both = are_between(
            (narrow(wide) if dtype == jnp.bfloat16 else wide, 0.5, 8.0), (ones, 0, 1)
        )
        return (choose(both, ones, jnp.zeros_like(ones)),)

    (result,) = apply(indicate, x.astype(jnp.float32), 1, interpret)
    np.testing.assert_array_equal(result, np.full_like(result, within))


@on_each_device
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("strictly", [True, False])
def test_triangles(lower, strictly, interpret):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(TILE, TILE)), jnp.bfloat16)
    # What is masked can be anything.
    x = x.at[0, -1].set(jnp.nan) if lower else x.at[-1, 0].set(jnp.inf)
    kept = apply(lambda x: keep_triangle(x, -x, lower=lower, strictly=strictly), x, 2, interpret)
    triangle = np.tril if lower else np.triu
    expected = triangle(np.asarray(x, np.float64), (-1 if lower else 1) * strictly)
    np.testing.assert_array_equal(kept[0], expected)
    np.testing.assert_array_equal(kept[1], -expected)


@on_each_device
@pytest.mark.parametrize("negated", [False, True])
def test_diagonals(negated, interpret):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TILE, TILE)), jnp.bfloat16)
    (replaced,) = apply(lambda x: [with_diagonal(x, 2.0, negated=negated)], x, 1, interpret)
    expected = np.asarray(-x if negated else x, np.float64)
    np.fill_diagonal(expected, 2)
    np.testing.assert_array_equal(replaced, expected)


@on_each_device
@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (1.0, 0),
        (-1.9921875, 0),
        (2.0, 1),
        (-(2.0**-126), -126),
        (2.0**-127, -127),
        (0.0, -127),
        (3e38, 127),
        (-np.inf, 128),
        (np.nan, 128),
    ],
)
def test_exponent_of_the_largest_number(largest, exponent, interpret):
    small = np.nan_to_num(0.9 * largest, posinf=1, neginf=1)
    tile = small * np.random.default_rng(0).uniform(-1, 1, size=(TILE, TILE))
    tile[37, 21] = largest

    def body(x_gmem, power_gmem, vector):
        x = plgpu.load(x_gmem, layout=TILE_LAYOUT, optimized=False)
        found = largest_exponent(x, vector, jnp.int32(4))
        vector[16] = found.astype(jnp.float32)
        # The exponents of powers that float32 has.
        vector[17] = power_of_two(jnp.clip(found, -126, 127))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(vector, power_gmem)
        plgpu.wait_smem_to_gmem(0)

    kernel = Target(interpret=interpret).kernel(
        body,
        name="exponent",
        out_type=jax.ShapeDtypeStruct((64,), jnp.float32),
        grid={"block": 1},
        scratch_types=[plgpu.SMEM((64,), jnp.float32)],
    )
    found = np.asarray(kernel(jnp.asarray(tile, jnp.bfloat16)))
    assert found[16] == exponent
    assert found[17] == 2.0 ** np.clip(exponent, -126, 127)


@on_each_device
def test_first_zeros_of_rows(interpret):
    is_zero = np.random.default_rng(0).random((TILE, TILE)) < 0.05
    is_zero[::9] = False
    tiles = jnp.asarray(~is_zero, jnp.bfloat16)[None]

    def find(x):
        return narrow(spread_rows(first_zeros(widen(load(x))).min(1)))

    expected = np.where(is_zero.any(1), is_zero.argmax(1), np.inf)
    found = in_shared_memory(find, tiles, interpret)
    np.testing.assert_array_equal(found, np.broadcast_to(expected[:, None], found.shape))


@on_each_device
def test_tiles_are_loaded_and_stored_whole_and_in_strips(interpret):
    tiles = small_integers(2).at[0].set(jnp.arange(TILE * TILE).reshape(TILE, TILE) % 251)

    def change(x, y):
        store((y, load(x)))  # whole
        number = jnp.int32(1)
        plgpu.commit_smem()
        store_strips(number, (y, narrow(widen(load(Strip(x, number))) * 0.5)))
        plgpu.commit_smem()
        return load(y)

    expected = np.asarray(tiles[0], np.float64)
    expected[:, STRIP:] *= 0.5
    expected = np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float64)
    np.testing.assert_array_equal(in_shared_memory(change, tiles, interpret), expected)


@on_each_device
@pytest.mark.parametrize("first", ["shared", "transposed", "registers"])
@pytest.mark.parametrize("second", ["shared", "transposed", "strip"])
def test_sums_of_products(first, second, interpret):
    tiles = small_integers(4)

    def multiply(x, y, z, result):
        x = {"shared": x, "transposed": transposed(x), "registers": load(x)}[first]
        if second == "strip":
            for i in range(TILE // STRIP):
                index = jnp.int32(i)
                begin = widen(load(Strip(z, index)))
                (strip,) = products([(x, Strip(y, index))], start=[begin])
                store_strips(index, (result, narrow(strip)))
            plgpu.commit_smem()
            return load(result)
        y = transposed(y) if second == "transposed" else y
        sums = [(x, z)], [(x, y), (load(z), y)]
        from_zero, from_z = products(*sums, start=[None, widen(load(z))])
        return narrow(from_zero + from_z)

    x, y, z, _ = np.asarray(tiles, np.float64)
    x = x.T if first == "transposed" else x
    y = y.T if second == "transposed" else y
    expected = z + x @ y if second == "strip" else x @ z + z + (x + z) @ y
    assert np.abs(expected).max() < 256
    np.testing.assert_array_equal(in_shared_memory(multiply, tiles, interpret), expected)


@on_each_device
def test_products_of_float16(interpret):
    tiles = bits_of(small_integers(3) + 2.0**-9)  # bfloat16 would round them

    def multiply(x, y, z):
        first, second = products([(x, y)], [(load(z), transposed(y))], dtype=jnp.float16)
        return narrow(first + second)

    x, y, z = np.asarray(jax.lax.bitcast_convert_type(tiles, jnp.float16), np.float64)
    expected = jnp.asarray(x @ y + z @ y.T, jnp.float32).astype(jnp.bfloat16)
    result = in_shared_memory(multiply, tiles, interpret)
    np.testing.assert_array_equal(result, np.asarray(expected, np.float64))


@on_each_device
@pytest.mark.parametrize("row", [0, 25, 63])
def test_rows_are_stored_as_powers_of_two(row, interpret):
    powers = jnp.asarray(np.random.default_rng(0).integers(-8, 9, (TILE, TILE)), jnp.float32)

    def body(x_gmem, result_gmem, vector):
        for i in range(TILE // STRIP):
            x = plgpu.load(
                x_gmem.at[:, pl.ds(i * STRIP, STRIP)], layout=TILE_LAYOUT, optimized=False
            )
            store_exp2_of_row(vector, x, row, jnp.int32(i))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(vector, result_gmem)
        plgpu.wait_smem_to_gmem(0)

    kernel = Target(interpret=interpret).kernel(
        body,
        name="rows",
        out_type=jax.ShapeDtypeStruct((TILE,), jnp.float32),
        grid={"block": 1},
        scratch_types=[plgpu.SMEM((TILE,), jnp.float32)],
    )
    np.testing.assert_allclose(kernel(powers), 2.0 ** np.asarray(powers[row]), rtol=1e-6)


@on_each_device
def test_column_sums(interpret):
    tiles = small_integers(2)

    def add_up(x, scratch):
        start = widen(load(x))
        halves = store_halves(start + 2.0**-10, x, scratch)
        return narrow(column_sums(lambda ones: keep_triangle(ones, lower=True), halves, start))

    x = np.asarray(tiles[0], np.float64)
    expected = np.tril(np.ones((TILE, TILE))) @ (x + 2.0**-10) + x
    expected = np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float64)
    np.testing.assert_array_equal(in_shared_memory(add_up, tiles, interpret), expected)


@on_each_device
@pytest.mark.parametrize(("slots", "steps"), [(1, 3), (2, 1), (3, 8)])
def test_steps_through_a_ring(slots, steps, interpret):
    """Two warpgroups double the tiles in turn, a third one fetches them."""
    ring = Ring(slots, in_turn=2)

    def body(x_gmem, y_gmem, x_smem, y_smem, loaded, done):
        warpgroup = jax.lax.axis_index("warpgroup")

        def fetch(step):
            ring.copy(step, loaded, [(x_gmem.at[step], x_smem)])

        def double(step):
            slot = ring.slot(step)
            plgpu.barrier_wait(ring.loaded(loaded, step))
            tile = y_smem.at[warpgroup]
            store((tile, narrow(2 * widen(load(x_smem.at[slot])))))
            plgpu.barrier_arrive(done.at[slot])
            plgpu.copy_smem_to_gmem(tile, y_gmem.at[step])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < 2)
        def _():
            ring.for_each_in_turn(warpgroup, steps, double)

        @pl.when(warpgroup == 2)
        def _():
            def free(step, _):
                plgpu.barrier_wait(done.at[ring.slot(step)])
                ring.refill(fetch, step, steps)

            ring.fill(fetch, steps)
            jax.lax.fori_loop(0, steps, free, None)

    kernel = Target(interpret=interpret).kernel(
        body,
        name="ring",
        out_type=jax.ShapeDtypeStruct((steps, TILE, TILE), jnp.bfloat16),
        grid={"block": 1},
        warpgroups=3,
        scratch_types=[
            tiles_smem(ring.slots),
            tiles_smem(2),
            ring.loaded_type(copies=1),
            ring.barrier_type(),
        ],
    )
    x = small_integers(steps) + jnp.arange(steps, dtype=jnp.bfloat16)[:, None, None]
    np.testing.assert_array_equal(kernel(x), 2 * x)


def test_slots_that_fit():
    assert slots_that_fit(TILE_BYTES, most=100) == 28
    assert slots_that_fit(TILE_BYTES, most=3) == 3
    assert slots_that_fit(6 * TILE_BYTES, others=7 * TILE_BYTES, most=8) == 3
    assert slots_that_fit(5, others=1, most=8, room=10) == 1
    with pytest.raises(NotServed, match="11 bytes of shared memory, there are 10"):
        slots_that_fit(10, others=1, most=8, room=10)
