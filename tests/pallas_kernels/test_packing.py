import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import find_segments, segment_ids_from_cu_seqlens


def test_find_segments():
    ids = jnp.array([[0, 4, 4, 0, 4, 2, 0, 7], [1, 1, 2, 2, 1, 0, 0, 0]])
    segments = find_segments(ids)
    T, F = True, False
    np.testing.assert_array_equal(segments.valid, ids != 0)
    np.testing.assert_array_equal(
        segments.index, [[0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2, 2, 2]]
    )
    np.testing.assert_array_equal(
        segments.start, [[F, T, F, F, F, T, F, T], [T, F, T, F, T, F, F, F]]
    )
    np.testing.assert_array_equal(
        segments.end, [[F, F, F, F, T, T, F, T], [F, T, F, T, T, F, F, F]]
    )
    np.testing.assert_array_equal(
        segments.previous, [[-1, -1, 1, -1, 2, -1, -1, -1], [-1, 0, -1, 2, -1, -1, -1, -1]]
    )


@pytest.mark.slow
def test_taking_padding_out_changes_nothing():
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 6, size=40))
    padded = np.where(rng.random(40) < 0.3, 0, ids)
    tokens = np.flatnonzero(padded)
    with_padding = find_segments(jnp.asarray(padded[None]))
    without = find_segments(jnp.asarray(padded[None, tokens]))
    for field in ("index", "start", "end"):
        np.testing.assert_array_equal(
            getattr(with_padding, field)[:, tokens], getattr(without, field)
        )


@pytest.mark.parametrize("jit", [False, True])
def test_segment_ids_from_cu_seqlens(jit):
    function = (
        jax.jit(segment_ids_from_cu_seqlens, static_argnums=1)
        if jit
        else (segment_ids_from_cu_seqlens)
    )
    ids = function(np.array([0, 3, 3, 5]), 7)
    np.testing.assert_array_equal(ids, [[1, 1, 1, 3, 3, 0, 0]])
    assert ids.dtype == jnp.int32


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (
            [0, 5, 3],
            ValueError,
            r"cu_seqlens must rise from 0 to at most length=8, got \[0, 5, 3\]",
        ),
        ([1, 5], ValueError, "cu_seqlens must rise from 0"),
        ([0, 9], ValueError, "cu_seqlens must rise from 0 to at most length=8"),
        ([[0, 8]], ValueError, "cu_seqlens must have 1 axes"),
        ([0.0, 8.0], TypeError, "cu_seqlens must have an integer dtype"),
    ],
)
def test_wrong_cu_seqlens(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        segment_ids_from_cu_seqlens(cu_seqlens, 8)
