"""Batches from tokens on disk."""

import collections
import math

import numpy as np
import pytest

from goose_jax.data import (
    NOT_COUNTED,
    Binidx,
    MagicPrimeWindows,
    PackedDocuments,
    RandomBinidxWindows,
    magic_prime,
    random_batch,
)
from tests.goose_jax.binidx_by_hand import write_by_hand

T = 8


def make_data(folder, sizes=(37, 1, 64, 5, 5, 120, 2, 66), **options):
    """Documents of distinct tokens from 1 on, each with 0 at its end."""
    tokens = iter(range(1, 60000))
    items = [[next(tokens) for _ in range(size - 1)] + [0] for size in sizes]
    return Binidx(write_by_hand(folder / "data", items, **options)), items


def sizes_of(**options):
    return {"vocab_size": 2**16, "batch_size": 4, "sequence_length": T} | options


def official_windows(tokens, ctx_len, prime, first, count):
    """The rows that the official `MyDataset` gives, numbered as its `idx`, on one device.

    Written after `__getitem__` in RWKV-v7/train_temp/src/dataset.py: epoch e has 40320 rows.
    """
    rows = []
    for number in range(first, first + count):
        epoch, idx = divmod(number, 40320)
        ii = 1 + epoch * 40320 + idx * 1 + 0
        factor = int(prime * ((math.sqrt(5) - 1) / 2))
        start = ((factor * ii * ii * ii) % prime) * ctx_len
        rows.append(tokens[start : start + ctx_len + 1])
    return np.array(rows)


def primes_below(limit):
    sieve = np.ones(limit, bool)
    sieve[:2] = False
    for i in range(2, math.isqrt(limit) + 1):
        sieve[i * i :: i] &= not sieve[i]
    return set(np.flatnonzero(sieve).tolist())


@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_magic_prime_gives_the_official_order(tmp_path, microbatches):
    data, items = make_data(tmp_path)
    tokens = [token for item in items for token in item]  # 300
    windows = MagicPrimeWindows(data=data, **sizes_of(microbatches=microbatches))
    assert windows.magic_prime == 29  # there are 37 slots
    rows = 4 * microbatches
    for step in (0, 1, 2, 7, 40320 // rows, 3 * 40320 // rows + 5):
        batch = windows(step)
        assert batch.inputs.shape == ((3,) if microbatches > 1 else ()) + (4, T)
        expected = official_windows(tokens, T, 29, step * rows, rows)
        np.testing.assert_array_equal(batch.inputs.reshape(rows, T), expected[:, :-1])
        np.testing.assert_array_equal(batch.targets.reshape(rows, T), expected[:, 1:])
        assert batch.segment_ids is None


def test_the_default_prime_is_that_of_the_official_tool():
    primes = primes_below(60_000)
    for num_tokens, length in [(300, 8), (9, 3), (10**6, 17), (12345, 100), (59_000 * 512, 512)]:
        slots = num_tokens // length - 1
        expected = max(p for p in primes if p % 3 == 2 and p <= slots)
        assert magic_prime(num_tokens, length) == expected
    # MiniPile at 512 tokens, as demo-training-run.sh of RWKV-LM names it.
    assert magic_prime(1498226207, 512) == 2926181
    with pytest.raises(ValueError, match=r"23 tokens are too few .*8: at least 24 are"):
        magic_prime(23, 8)


def test_the_official_order_visits_every_slot_once(tmp_path):
    data, _ = make_data(tmp_path)
    windows = MagicPrimeWindows(data=data, **sizes_of(batch_size=1), magic_prime=29)
    starts = [int(windows(step).inputs[0, 0]) for step in range(29)]
    tokens = data.tokens.tolist()
    assert sorted(starts) == sorted(tokens[slot * T] for slot in range(29))


@pytest.mark.parametrize(
    ("prime", "message"),
    [
        (31, "must be a prime of the form 3 k [+] 2, got 31"),
        (35, "must be a prime of the form 3 k [+] 2, got 35"),
        (-1, "must be a prime of the form 3 k [+] 2, got -1"),
        (17, "must be above 0.9 of the 37 slots of 8 tokens in .*data, .*; got 17"),
        (41, "must be above 0.9 of the 37 slots"),
        (2**63 - 3, "must be above 0.9 of the 37 slots"),
    ],
)
def test_a_wrong_prime_is_refused(tmp_path, prime, message):
    data, _ = make_data(tmp_path)
    with pytest.raises(ValueError, match=message):
        MagicPrimeWindows(data=data, **sizes_of(), magic_prime=prime)


def test_random_windows_are_those_of_tokens_in_memory(tmp_path):
    data, items = make_data(tmp_path)
    tokens = np.array([token for item in items for token in item])
    windows = RandomBinidxWindows(data=data, **sizes_of(microbatches=2), seed=3)
    for step in (0, 5):
        expected = random_batch(
            tokens, step, batch_size=4, sequence_length=T, seed=3, microbatches=2
        )
        np.testing.assert_array_equal(windows(step).inputs, expected.inputs)
        np.testing.assert_array_equal(windows(step).targets, expected.targets)
    assert windows.checksum == data.checksum
    assert windows.source == str(tmp_path / "data")


def documents_in(batches, start_token):
    """Returns pairs (input, target) of neighbours in a segment, as often as they occur."""
    pairs = collections.Counter()
    for batch in batches:
        for inputs, targets in zip(
            batch.inputs.reshape(-1, T), batch.targets.reshape(-1, T), strict=True
        ):
            pairs.update(zip(inputs.tolist(), targets.tolist(), strict=True))
    return pairs


def test_packing_wastes_no_token(tmp_path):
    """In an epoch each token is predicted from the one before it in its document."""
    data, items = make_data(tmp_path, sizes=(37, 1, 64, 5, 5, 120, 2, 70))  # 304: 38 rows
    packed = PackedDocuments(data=data, **sizes_of(batch_size=2), seed=0, start_token=0)
    assert packed.rows_per_epoch == 38
    expected = collections.Counter()
    for item in items:
        expected.update(zip([0, *item[:-1]], item, strict=True))
    epochs = [[packed(step) for step in range(19 * e, 19 * (e + 1))] for e in range(3)]
    for epoch in epochs:
        assert documents_in(epoch, 0) == expected
    first = [np.concatenate([b.inputs for b in epoch]).tolist() for epoch in epochs]
    assert first[0] != first[1] != first[2]


def test_the_last_row_begins_again_where_tokens_do_not_fill_it(tmp_path):
    data, items = make_data(tmp_path)  # 300
    packed = PackedDocuments(data=data, **sizes_of(batch_size=1), seed=1, start_token=0)
    assert packed.rows_per_epoch == 38
    pairs = documents_in([packed(step) for step in range(38)], 0)
    expected = collections.Counter()
    for item in items:
        expected.update(zip([0, *item[:-1]], item, strict=True))
    assert pairs >= expected
    assert sum((pairs - expected).values()) == 4


@pytest.mark.parametrize("start_token", [0, None])
def test_segments_are_documents(tmp_path, start_token):
    data, items = make_data(tmp_path)
    of_token = {token: i for i, item in enumerate(items) for token in item if token}
    packed = PackedDocuments(data=data, **sizes_of(), seed=2, start_token=start_token)
    for step in range(8):
        batch = packed(step)
        for inputs, targets, ids in zip(
            batch.inputs, batch.targets, batch.segment_ids, strict=True
        ):
            assert ids[0] == 1
            assert set(np.diff(ids)) <= {0, 1}
            for segment in range(1, ids[-1] + 1):
                inside = inputs[ids == segment].tolist()
                outside = targets[ids == segment].tolist()
                documents = {of_token[t] for t in inside + outside if t > 0}
                assert len(documents) <= 1
                if start_token is None:
                    assert 0 not in inside[:-1]
                    both = zip(inside, outside, strict=True)
                    assert all((t == NOT_COUNTED) == (i == 0) for i, t in both)
                else:
                    assert 0 not in inside[1:]
                    assert 0 not in outside[:-1]
                assert inside[1:] == outside[:-1]


@pytest.mark.slow
def test_what_is_not_counted_is_no_target(tmp_path):
    data, _ = make_data(tmp_path)
    counted = np.arange(300) % 3 != 0
    (tmp_path / "data.counted").write_bytes(counted.tobytes())
    plain, masked = data, Binidx(tmp_path / "data")
    place = {int(token): i for i, token in enumerate(data.tokens) if token}
    sources = (
        (RandomBinidxWindows, {"seed": 0}),
        (MagicPrimeWindows, {}),
        (PackedDocuments, {"seed": 0, "start_token": 0}),
        (PackedDocuments, {"seed": 0, "start_token": None}),
    )
    for kind, options in sources:
        for step in range(5):
            batch = kind(data=masked, **sizes_of(), **options)(step)
            all_targets = kind(data=plain, **sizes_of(), **options)(step).targets
            assert (batch.targets == NOT_COUNTED).mean() > 0.2
            kept = batch.targets != NOT_COUNTED
            np.testing.assert_array_equal(batch.targets[kept], all_targets[kept])
            for target, was in zip(batch.targets.ravel(), all_targets.ravel(), strict=True):
                if was > 0:
                    assert (target == NOT_COUNTED) == (place[int(was)] % 3 == 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RandomBinidxWindows, {"seed": 0}),
        (MagicPrimeWindows, {}),
        (PackedDocuments, {"seed": 0, "start_token": 0}),
    ],
)
def test_batches_are_divided_over_processes(tmp_path, kind, options):
    data, _ = make_data(tmp_path)
    for microbatches in (1, 2):
        whole = kind(data=data, **sizes_of(microbatches=microbatches), **options)
        for step in (0, 3):
            expected = whole(step)
            for count in (2, 4):
                parts = [whole.for_process(i, count)(step) for i in range(count)]
                for name in ("inputs", "targets", "segment_ids"):
                    if getattr(expected, name) is not None:
                        together = np.concatenate([getattr(p, name) for p in parts], axis=-2)
                        np.testing.assert_array_equal(together, getattr(expected, name))
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of the 3 processes"):
        whole.for_process(0, 3)


@pytest.mark.parametrize("kind", [RandomBinidxWindows, MagicPrimeWindows, PackedDocuments])
def test_a_token_beyond_the_vocabulary_is_named(tmp_path, kind):
    data = Binidx(write_by_hand(tmp_path / "a", [[1] * 10 + [300, 0], [1] * 30]))
    options = {} if kind is MagicPrimeWindows else {"seed": 0}
    options |= {"start_token": 0} if kind is PackedDocuments else {}
    source = kind(data=data, **sizes_of(batch_size=8, vocab_size=300), **options)
    with pytest.raises(
        ValueError, match=r"a\.bin: token number 10 is 300, not below the vocabulary's size of 300"
    ):
        [source(step) for step in range(20)]


@pytest.mark.parametrize("start_token", [0, None])
def test_packing_reads_only_its_first_tokens(tmp_path, start_token):
    """Also where a row begins with the first token, which has none before it."""
    data = Binidx(write_by_hand(tmp_path / "a", [[1] * 15 + [0], [2] * 15 + [0], [300, 300]]))
    packed = PackedDocuments(
        data=data,
        **sizes_of(batch_size=1, vocab_size=300),
        num_tokens=32,
        seed=0,
        start_token=start_token,
    )
    for step in range(3 * packed.rows_per_epoch):
        assert set(packed(step).inputs.ravel().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("kind", [RandomBinidxWindows, MagicPrimeWindows, PackedDocuments])
def test_tokens_that_are_cut_off_meanwhile_are_an_error(tmp_path, kind):
    """Else a mapped page that is gone would end the process by a signal."""
    data, _ = make_data(tmp_path)
    options = {} if kind is MagicPrimeWindows else {"seed": 0}
    options |= {"start_token": 0} if kind is PackedDocuments else {}
    source = kind(data=data, **sizes_of(), **options)
    source(0)
    with (tmp_path / "data.bin").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(ValueError, match=r"data\.bin has been cut to 100 bytes since .* with 600"):
        source(1)


def test_tokens_that_are_replaced_or_removed_meanwhile_stay(tmp_path):
    data, _ = make_data(tmp_path)
    source = RandomBinidxWindows(data=data, **sizes_of(), seed=0)
    expected = source(3)
    write_by_hand(tmp_path / "new", [[1]])
    (tmp_path / "new.bin").rename(tmp_path / "data.bin")
    np.testing.assert_array_equal(source(3).inputs, expected.inputs)
    (tmp_path / "data.bin").unlink()
    np.testing.assert_array_equal(source(3).inputs, expected.inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"sequence_length": 300}, "data is too short: 300 tokens to train on, but sequence_len"),
        ({"microbatches": -1}, "microbatches"),
        ({"process_index": 1}, r"process_index must be in 0\.\.0, got 1"),
    ],
)
def test_wrong_sizes_are_refused(tmp_path, change, message):
    data, _ = make_data(tmp_path)
    with pytest.raises(ValueError, match=message):
        RandomBinidxWindows(data=data, **sizes_of(**change), seed=0)
