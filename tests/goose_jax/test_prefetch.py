"""Batches that are made before they are asked for."""

import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from goose_jax.data import Binidx, PackedDocuments, PrefetchedBatches, RandomBinidxWindows
from tests.goose_jax.binidx_by_hand import write_by_hand

STEPS = (0, 1, 2, 3, 7, 8, 9, 3, 4)  # with jumps, as of runs that are resumed


@pytest.fixture
def data(tmp_path):
    items = [[1 + i % 290 for i in range(start, start + 50)] + [0] for start in range(0, 2000, 50)]
    return Binidx(write_by_hand(tmp_path / "data", items))


def windows(data, vocab_size=300):
    return RandomBinidxWindows(
        data=data, vocab_size=vocab_size, batch_size=4, sequence_length=8, seed=1
    )


def packed(data):
    return PackedDocuments(
        data=data, vocab_size=300, batch_size=4, sequence_length=8, seed=1, start_token=0
    )


def assert_same(batch, expected):
    np.testing.assert_array_equal(batch.inputs, expected.inputs)
    np.testing.assert_array_equal(batch.targets, expected.targets)
    if expected.segment_ids is None:
        assert batch.segment_ids is None
    else:
        np.testing.assert_array_equal(batch.segment_ids, expected.segment_ids)


@pytest.mark.parametrize("make", [windows, packed])
def test_they_are_those_of_the_source(data, make):
    source = make(data)
    with PrefetchedBatches(source) as prefetched:
        for step in STEPS:
            assert_same(prefetched(step), source(step))
        assert prefetched.checksum == source.checksum
        assert prefetched.source == source.source
    with prefetched.for_process(1, 2) as second:
        assert_same(second(5), source.for_process(1, 2)(5))


def test_they_are_made_ahead():
    made, enough = [], threading.Event()

    class Source:
        source = checksum = "numbers"

        def __call__(self, step):
            made.append(step)
            if len(made) >= 4:
                enough.set()
            return step

    with PrefetchedBatches(Source(), ahead=3) as prefetched:
        assert prefetched(5) == 5
        assert enough.wait(300)
    assert made[:4] == [5, 6, 7, 8]
    assert len(made) < 10


def test_errors_of_the_source_arrive(data):
    with (
        PrefetchedBatches(windows(data, vocab_size=290)) as prefetched,
        pytest.raises(ValueError, match=r"^.*data\.bin: token number .* is 290, not below"),
    ):
        [prefetched(step) for step in range(200)]


@pytest.mark.parametrize(
    ("options", "message"), [({"ahead": 0}, "ahead"), ({"workers": -1}, "wor")]
)
def test_wrong_numbers_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        PrefetchedBatches(windows(data), **options)


@pytest.mark.slow
def test_processes_make_the_same_batches_and_a_killed_one_is_an_error(data):
    source = packed(data)
    with PrefetchedBatches(source, workers=2, ahead=1) as prefetched:
        for step in (3, 4, 5, 6):
            assert_same(prefetched(step), source(step))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(OSError, match=r"a process that makes batches has ended: .* code -9"):
            [prefetched(step) for step in range(7, 100)]
