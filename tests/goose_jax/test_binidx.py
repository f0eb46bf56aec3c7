"""Tokens in `.bin` and `.idx`: read, written, and damaged."""

import pickle
import struct

import numpy as np
import pytest

from goose_jax.data import Binidx, BinidxWriter
from goose_jax.data.binidx import is_binidx
from tests.goose_jax.binidx_by_hand import index_bytes, write_by_hand

ITEMS = [[5, 6, 7, 0], [0], [65535, 1, 0]]


def contents(prefix):
    return [prefix.with_suffix(end).read_bytes() for end in (".bin", ".idx")]


@pytest.mark.parametrize(
    ("letter", "code"), [("B", 1), ("b", 2), ("h", 3), ("i", 4), ("q", 5), ("H", 8)]
)
def test_every_dtype_is_read(tmp_path, letter, code):
    items = [[5, 6, 7, 0], [100], [1, 0]]
    prefix = write_by_hand(tmp_path / "a", items, letter=letter, code=code)
    data = Binidx(prefix)
    assert data.tokens.tolist() == [5, 6, 7, 0, 100, 1, 0]
    assert data.tokens.dtype == np.dtype(letter)
    assert [data[i].tolist() for i in range(len(data))] == items
    assert data.begins(0, 7) == [0, 4, 5]
    assert data.begins(1, 5) == [4]
    assert data.counted is None
    assert data[-1].tolist() == [1, 0]
    with pytest.raises(IndexError, match=r"item must be in 0\.\.2, got 3"):
        data[3]


def test_tokens_are_mapped_and_not_read(tmp_path):
    prefix = write_by_hand(tmp_path / "a", ITEMS)
    data = Binidx(prefix)
    assert isinstance(data.tokens, np.memmap)
    assert isinstance(data.sizes, np.memmap)
    assert len(pickle.dumps(data)) < 500
    copy = pickle.loads(pickle.dumps(data))
    assert isinstance(copy.tokens, np.memmap)
    assert copy.tokens.tolist() == data.tokens.tolist()


@pytest.mark.parametrize("name", ["a", "a.bin", "a.idx"])
def test_any_of_its_names_is_taken(tmp_path, name):
    write_by_hand(tmp_path / "a", ITEMS)
    assert is_binidx(tmp_path / name)
    assert len(Binidx(tmp_path / name)) == 3
    assert not is_binidx(tmp_path)
    assert not is_binidx(tmp_path / "b.txt")


@pytest.mark.parametrize(("vocab_size", "letter", "code"), [(2**16, "H", 8), (2**16 + 1, "i", 4)])
def test_what_is_written_equals_a_file_by_hand(tmp_path, vocab_size, letter, code):
    expected = write_by_hand(tmp_path / "expected", ITEMS, letter=letter, code=code)
    with BinidxWriter(tmp_path / "a", vocab_size) as writer:
        for item in ITEMS:
            for token in item[:-1]:  # in pieces
                writer.write(np.array([token]), ends_item=False)
            writer.write(np.array(item[-1:]), ends_item=True)
        writer.finish()
    assert contents(tmp_path / "a") == contents(expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.bin",
        "a.idx",
        "expected.bin",
        "expected.idx",
    ]


def test_a_writer_goes_on_from_its_last_sync(tmp_path):
    writer = BinidxWriter(tmp_path / "a", 300)
    writer.write(np.array([1, 2, 0]), ends_item=True)
    writer.write(np.array([3]), np.array([False]), ends_item=False)
    written = writer.sync()
    writer.write(np.array([9, 9, 9]), ends_item=True)  # is lost
    writer.close()
    with BinidxWriter(tmp_path / "a", 300, written) as writer:
        writer.write(np.array([4, 0]), ends_item=True)
        writer.finish()
    assert contents(tmp_path / "a") == contents(
        write_by_hand(tmp_path / "b", [[1, 2, 0], [3, 4, 0]])
    )
    assert Binidx(tmp_path / "a").counted.tolist() == [True] * 3 + [False] + [True] * 2


def test_a_writer_refuses_what_is_not_whole(tmp_path):
    with BinidxWriter(tmp_path / "a", 300) as writer:
        with pytest.raises(ValueError, match=r"no token to write to .*a\.bin"):
            writer.finish()
        writer.write(np.array([1, 2]), ends_item=False)
        with pytest.raises(ValueError, match="the last item is not complete"):
            writer.finish()
        written = writer.sync()
    (tmp_path / "a.bin.partial").write_bytes(b"a")
    with pytest.raises(ValueError, match=r"a\.bin\.partial has 1 bytes, and 4 had been written"):
        BinidxWriter(tmp_path / "a", 300, written)


def test_the_checksum_follows_tokens_items_and_what_is_counted(tmp_path):
    checksums = set()
    for i, items in enumerate([ITEMS, [[5, 6, 7, 0, 0], *ITEMS[2:]], [[5, 6, 7, 1], *ITEMS[1:]]]):
        prefix = write_by_hand(tmp_path / str(i), items)
        checksums.add(Binidx(prefix).checksum)
        assert Binidx(prefix).checksum in checksums
    (tmp_path / "0.counted").write_bytes(b"\1\1\0\1\1\1\1\1")
    checksums.add(Binidx(tmp_path / "0").checksum)
    assert len(checksums) == 4


def test_large_indices_are_checked_in_blocks(tmp_path, monkeypatch):
    from goose_jax.data import binidx, binidx_writer

    for module in (binidx, binidx_writer):
        monkeypatch.setattr(module, "_BLOCK", 3)
    items = [[i] * (i % 4) for i in range(1, 12)]
    prefix = write_by_hand(tmp_path / "a", items)
    data = Binidx(prefix)
    assert [data[i].tolist() for i in range(11)] == items
    with BinidxWriter(tmp_path / "b", 300) as writer:
        for item in items:
            writer.write(np.array(item, int), ends_item=True)
        writer.finish()
    assert contents(tmp_path / "b") == contents(prefix)
    index = bytearray(prefix.with_suffix(".idx").read_bytes())
    index[34 + 44 + 8 * 7] ^= 4  # where item 7 begins
    prefix.with_suffix(".idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"byte 134: item 7 begins at byte 28 .* end at 24"):
        Binidx(prefix)


GOOD = index_bytes([4, 1, 3])
SIZES, POINTERS, BOUNDS = 34, 34 + 12, 34 + 36


def changed(place, form, value):
    return GOOD[:place] + struct.pack(form, value) + GOOD[place + struct.calcsize(form) :]


BAD_INDICES = {
    "empty": (b"", "is not the index of a binidx: it begins with b''"),
    "text": (
        b"The quick brown fox jumps",
        "is not the index of a binidx: it begins with b'The",
    ),
    "the tokens": (b"\5\0\6\0\7\0\0\0\0\0" * 5, "is not the index of a binidx"),
    "an older format": (b"TNTIDX\0\0" + GOOD[8:], "is not the index of a binidx"),
    "cut in the magic": (GOOD[:5], "is truncated: 5 bytes, and the header alone has 34"),
    "cut in the header": (GOOD[:33], "is truncated: 33 bytes"),
    "cut after the header": (GOOD[:34], "is truncated: 34 bytes, and 3 items .* need 102"),
    "cut in the sizes": (GOOD[:40], "is truncated: 40 bytes"),
    "cut in the pointers": (GOOD[:60], "is truncated: 60 bytes"),
    "cut in the bounds": (GOOD[:-1], "is truncated: 101 bytes, and 3 items and 4 bounds"),
    "too long": (GOOD + b"\0", "is too long: 103 bytes"),
    "version 2": (changed(9, "<Q", 2), "byte 9: version 2, and only 1 is read"),
    "big endian": (changed(9, ">Q", 1), "byte 9: version 72057594037927936"),
    "floats": (changed(17, "<B", 6), "byte 17: the dtype 6 is of floating-point numbers"),
    "an unknown dtype": (changed(17, "<B", 9), "byte 17: the dtype 9 is none of 1, 2, 3, 4, 5, 8"),
    "another dtype": (changed(17, "<B", 4), "byte 54: item 1 begins at byte 8 .* end at 16"),
    "no items": (index_bytes([]), "has no items"),
    "more items than there are": (changed(18, "<Q", 4), "is truncated: 102 bytes, and 4 items"),
    "very many items": (changed(18, "<Q", 2**63), "is truncated"),
    "more bounds than there are": (changed(26, "<Q", 2**64 - 1), "is truncated"),
    "a negative size": (changed(SIZES + 4, "<i", -1), "item 1: the number of tokens is -1"),
    "a larger size": (
        changed(SIZES, "<i", 5),
        "byte 54: item 1 begins at byte 8 of .*, and the items before it end at 10",
    ),
    "past the end": (changed(SIZES + 8, "<i", 4), "item 2: points past the end .* byte 18 of 16"),
    "far past the end": (index_bytes([4, 1, 2**31 - 1]), "item 2: points past the end"),
    "before the end": (changed(SIZES + 8, "<i", 2), r"bad\.bin has 16 bytes, and .* end at 14"),
    "a negative pointer": (changed(POINTERS, "<q", -2), "byte 46: item 0 begins at byte -2"),
    "a pointer past the end": (changed(POINTERS + 8, "<q", 10**9), "item 1 begins at byte 1000000"),
    "a bound past the end": (changed(BOUNDS + 24, "<q", 4), "byte 94: bound 3 of .* is item 4, af"),
    "a bound backwards": (changed(BOUNDS + 8, "<q", 3), "byte 86: bound 2 .* is item 2, after 3"),
    "a negative bound": (changed(BOUNDS, "<q", -1), "byte 70: bound 0 of a document is item -1"),
}
BAD_TOKENS = {
    "no tokens": (b"", "item 0: points past the end of .*, to byte 8 of 0"),
    "half a token": (b"\0" * 15, "has 15 bytes, not a multiple of the 2 bytes of a token"),
    "too few tokens": (b"\0" * 14, "item 2: points past the end of .*, to byte 16 of 14"),
    "too many tokens": (b"\0" * 18, r"bad\.bin has 18 bytes, and the items of .* end at 16"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_a_bad_index_is_named(tmp_path, name):
    content, message = BAD_INDICES[name]
    prefix = write_by_hand(tmp_path / "bad", ITEMS)
    prefix.with_suffix(".idx").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Binidx(prefix)
    assert f"{prefix}." in str(error.value)
    assert len(str(error.value)) < 300 + 2 * len(str(prefix))


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_named(tmp_path, name):
    content, message = BAD_TOKENS[name]
    prefix = write_by_hand(tmp_path / "bad", ITEMS)
    prefix.with_suffix(".bin").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Binidx(prefix)
    assert f"{prefix}." in str(error.value)


def test_items_without_any_token_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bin is empty"):
        Binidx(write_by_hand(tmp_path / "a", [[], []]))


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_half_is_named(tmp_path, missing):
    prefix = write_by_hand(tmp_path / "a", ITEMS)
    prefix.with_suffix(missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"a\{missing}"):
        Binidx(prefix)


BAD_COUNTED = {
    **{
        f"{size} bytes": (b"\1" * size, rf"a\.counted has {size} bytes, but .*a\.bin has 8 tokens")
        for size in (0, 1, 4, 7, 9, 16, 8000)
    },
    **{
        f"byte {at} is {value}": (
            b"\0" * at + bytes([value]) + b"\1" * (7 - at),
            rf"a\.counted, byte {at}: must be 0 or 1, got {value}",
        )
        for at in (0, 3, 7)
        for value in (2, 48, 128, 255)
    },
    "text": (b"11110000", r"a\.counted, byte 0: must be 0 or 1, got 49"),
    "two that are wrong": (b"\1\1\5\6\1\1\1\1", "byte 2: must be 0 or 1, got 5"),
}


@pytest.mark.parametrize("name", BAD_COUNTED)
def test_what_is_counted_must_fit(tmp_path, name):
    content, message = BAD_COUNTED[name]
    prefix = write_by_hand(tmp_path / "a", ITEMS)
    (tmp_path / "a.counted").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Binidx(prefix)


def test_what_is_counted_is_checked_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("goose_jax.data.binidx._BLOCK", 3)
    prefix = write_by_hand(tmp_path / "a", ITEMS)
    (tmp_path / "a.counted").write_bytes(b"\1" * 7 + b"\2")
    with pytest.raises(ValueError, match=r"a\.counted, byte 7: must be 0 or 1, got 2"):
        Binidx(prefix)
    (tmp_path / "a.counted").unlink()
    (tmp_path / "a.counted").mkdir()
    with pytest.raises((OSError, ValueError), match=r"a\.counted"):
        Binidx(prefix)
