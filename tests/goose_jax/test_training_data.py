"""Tokens and held-out documents of a training run, which stay on disk."""

import fcntl
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from goose_jax.chat import render_conversation
from goose_jax.data import (
    Binidx,
    Document,
    encode_document,
    open_documents,
    open_tokens,
    prepare_documents,
    read_documents,
    split_documents,
    text_files,
    tokenize,
    training_data,
)
from goose_jax.text import ByteTokenizer
from tests.goose_jax.binidx_by_hand import write_by_hand

TOKENIZER = ByteTokenizer()
SIZES = {"vocab_size": 257, "batch_size": 4, "sequence_length": 8, "seed": 0}


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(path, folder, held_out_bytes=200, **options):
    source = open_documents(path, render=render_conversation)
    return prepare_documents(source, TOKENIZER, folder, held_out_bytes=held_out_bytes, **options)


def by_bytes(text):
    return [byte + 1 for byte in text.encode()] + [0]


def tokens_of(documents):
    return [t for d in documents for t in encode_document(d, TOKENIZER)[0].tolist()]


@pytest.mark.parametrize("piece_bytes", [2**20, 16])
def test_a_stream_is_divided_as_a_list_is(tmp_path, monkeypatch, piece_bytes):
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        size = int(rng.integers(1, 60))
        (folder / f"{i:02d}.txt").write_text("".join(rng.choice(list("aé鹅\nZ "), size)))
    expected, held_out = split_documents(read_documents(folder), held_out_bytes=200)
    assert len(held_out) > 3
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    data = prepare(folder, tmp_path / "kept")
    assert data.tokens.tolist() == tokens_of(expected)
    assert data.held_out == held_out
    assert isinstance(data.data.tokens, np.memmap)


@pytest.mark.slow
@pytest.mark.parametrize("piece_bytes", [2**20, 64, 50])
@pytest.mark.parametrize("held_out_bytes", [50, 51, 99, 100, 10**6])
def test_the_end_of_the_longest_is_held_out_where_none_fits(
    tmp_path, monkeypatch, piece_bytes, held_out_bytes
):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a" * 500)
    (folder / "b.txt").write_text("ü" * 300)
    expected, held_out = split_documents(read_documents(folder), held_out_bytes=held_out_bytes)
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    data = prepare(folder, tmp_path / "kept", held_out_bytes)
    assert data.tokens.tolist() == tokens_of(expected)
    assert data.held_out == held_out


def test_files_that_are_not_text_are_counted(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in {"a.txt": b"A text of a goose.", "b": b"\0", "c": b"\xff"}.items():
        (folder / name).write_bytes(content)
    for _ in range(2):  # also where the tokens have been kept
        assert prepare(folder, tmp_path / "kept").num_skipped == 2


def test_a_text_that_occurs_twice_is_used_once(tmp_path):
    texts = [f"{i // 2:04d}" for i in range(100)]
    data = prepare(write_lines(tmp_path / "a.jsonl", texts), tmp_path / "kept", 50)
    trained = [TOKENIZER.decode(data.data[i]) for i in range(len(data.data))]
    held_out = [document.text for document in data.held_out]
    assert held_out
    assert sorted(trained + held_out) == sorted(set(texts))


def test_texts_are_encoded_once(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", [f"Goose {i}" for i in range(50)])
    first = prepare(file, tmp_path / "kept")

    def fail(*arguments, **options):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(training_data, "encode_stream", fail)
        second = prepare(file, tmp_path / "kept")
    assert second.data.checksum == first.data.checksum
    assert second.held_out == first.held_out
    assert prepare(file, tmp_path / "kept", 20).data.checksum != first.data.checksum
    write_lines(file, [f"Goose {i}" for i in range(51)])
    assert prepare(file, tmp_path / "kept").data.checksum != first.data.checksum
    assert len(list((tmp_path / "kept").iterdir())) == 3


@pytest.mark.parametrize("first_fails", [False, True])
def test_of_several_processes_one_encodes_while_the_others_wait(tmp_path, monkeypatch, first_fails):
    file = write_lines(tmp_path / "a.jsonl", [f"Goose {i}" for i in range(50)])
    encode, lock, calls, is_waiting = (
        training_data.encode_stream,
        fcntl.flock,
        [],
        threading.Event(),
    )

    def encode_slowly(*arguments, **options):
        calls.append(None)
        if len(calls) == 1:
            assert is_waiting.wait(60)
            if first_fails:
                raise OSError("full")
        return encode(*arguments, **options)

    def tell(stream, operation):
        if calls:
            is_waiting.set()
        lock(stream, operation)

    monkeypatch.setattr(training_data, "encode_stream", encode_slowly)
    monkeypatch.setattr(fcntl, "flock", tell)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(prepare, file, tmp_path / "new" / "kept")
        while not calls and not first.done():
            time.sleep(0.001)
        second = pool.submit(prepare, file, tmp_path / "new" / "kept").result()
    if first_fails:
        assert isinstance(first.exception(), OSError)
        assert len(calls) == 2
    else:
        assert first.result().data.checksum == second.data.checksum
        assert len(calls) == 1
    assert second.tokens.size > 0
    assert [folder.name[0] != "." for folder in (tmp_path / "new" / "kept").iterdir()] == [True]


def test_what_a_killed_process_left_is_removed(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [f"Goose {i}" for i in range(50)])
    expected = prepare(file, tmp_path / "kept").tokens.tolist()
    (folder,) = (tmp_path / "kept").iterdir()
    (folder / "tokens.idx").rename(folder / "tokens.idx.partial")
    folder.rename(folder.with_name(f".{folder.name}"))
    folder.with_name(f".{folder.name}.lock").touch()
    assert prepare(file, tmp_path / "kept").tokens.tolist() == expected
    assert list((tmp_path / "kept").iterdir()) == [folder]
    assert not (folder / "tokens.idx.partial").exists()


def test_nothing_stays_of_a_source_that_fails(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a good line of text"}\nbad\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        prepare(file, tmp_path / "new" / "kept")
    assert not (tmp_path / "new").exists()


def test_a_source_that_changes_meanwhile_is_named(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", [f"Goose {i}" for i in range(50)])
    choose = training_data.choose_in_stream

    def change(*arguments, **options):
        choice = choose(*arguments, **options)
        write_lines(file, [f"Goose {i}" for i in range(60)])
        return choice

    monkeypatch.setattr(training_data, "choose_in_stream", change)
    with pytest.raises(ValueError, match=r"a\.jsonl has changed while it was read"):
        prepare(file, tmp_path / "kept")


def test_text_of_its_own_may_be_held_out(tmp_path):
    texts = [f"Goose {i}" for i in range(50)]
    file = write_lines(tmp_path / "a.jsonl", texts)
    own = [Document("own", "Honk")]
    data = prepare(file, tmp_path / "kept", held_out=own)
    assert data.held_out == own
    assert data.tokens.tolist() == [token for text in texts for token in by_bytes(text)]
    assert data.batches("magic-prime", **SIZES)(0).inputs.shape == (4, 8)


def test_the_last_items_of_tokens_are_held_out(tmp_path):
    texts = [f"Goose number {i}." for i in range(50)]
    prefix = write_by_hand(tmp_path / "a", [by_bytes(text) for text in texts])
    data = open_tokens(prefix, TOKENIZER, held_out_bytes=40)
    assert [document.text for document in data.held_out] == texts[48:]
    assert data.tokens.tolist() == [token for text in texts[:48] for token in by_bytes(text)]
    assert data.held_out[0].name == f"{prefix}, token {len(data.tokens)}"
    assert len(open_tokens(prefix, TOKENIZER, held_out_bytes=10**6).held_out) == 4  # a tenth
    for sampling in ("windows", "packed"):
        batches = data.batches(sampling, **SIZES)
        seen = {t for step in range(40) for t in batches(step).targets.ravel().tolist()}
        assert seen == set(data.tokens.tolist())
        assert batches.checksum != Binidx(prefix).checksum
    with pytest.raises(ValueError, match=r"reads every token of .*a, so that none can be held out"):
        data.batches("magic-prime", **SIZES)


@pytest.mark.parametrize("wrong", [257, 60000])
def test_tokens_of_another_tokenizer_are_named(tmp_path, wrong):
    prefix = write_by_hand(tmp_path / "a", [by_bytes("geese"), [1, wrong]])
    message = rf"--data .*a.bin: token number 7 is {wrong}, but the tokenizer has the ids 0\.\.256"
    with pytest.raises(ValueError, match=f"{message}; give the --tokenizer that"):
        open_tokens(prefix, TOKENIZER, held_out_bytes=40)


@pytest.mark.parametrize("held_out_bytes", [1, 7, 8, 30, 1000])
def test_the_last_tokens_are_held_out_where_no_item_fits(tmp_path, held_out_bytes):
    text = "Gänse 鹅🦢 " * 40
    prefix = write_by_hand(tmp_path / "a", [by_bytes(text)])
    if held_out_bytes == 1:  # the end of a document alone has no text
        with pytest.raises(ValueError, match=r"a is too short to hold a tenth of it out"):
            open_tokens(prefix, TOKENIZER, held_out_bytes=held_out_bytes)
        return
    data = open_tokens(prefix, TOKENIZER, held_out_bytes=held_out_bytes)
    (document,) = data.held_out
    assert "\ufffd" not in document.text
    assert text.endswith(document.text)
    assert 0 < document.num_bytes <= min(held_out_bytes, len(by_bytes(text)) // 10)
    assert data.tokens.tolist() == by_bytes(text)[: -document.num_bytes - 1]


@pytest.mark.parametrize("tokenized", [False, True])
def test_conversations_are_counted_as_far_as_the_assistant_speaks(tmp_path, tokenized):
    lines = []
    for i in range(40):
        chat = [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": f"Answer {i}!"},
        ]
        lines.append(json.dumps({"messages": chat}))
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    if tokenized:
        source = open_documents(file, render=render_conversation)
        tokenize(source, TOKENIZER, tmp_path / "tokens")
        data = open_tokens(tmp_path / "tokens", TOKENIZER, held_out_bytes=200)
    else:
        data = prepare(file, tmp_path / "kept")
    assert len(data.held_out) >= 3
    for document in data.held_out:
        assert document.text.startswith("User: ")
        (answer,) = [document.text[start:stop] for start, stop in document.counted]
        assert document.text.endswith(f"Assistant:{answer}")
        assert answer.startswith(" Answer ")
    batch = data.batches("packed", **SIZES | {"batch_size": 40})(0)
    counted = batch.targets >= 0
    assert 0.2 < counted.mean() < 0.6
    text = TOKENIZER.decode(batch.targets[counted].tolist())
    assert "Answer" in text
    assert "User" not in text


KEPT = {"name": "a", "text": "geese", "counted": None, "continues": False}
ONE = [KEPT]
BAD_RECORDS = {
    b"": "Expecting value: line 1 column 1",
    b"{": "line 1 column 2",
    b"\0": "Expecting value",
    b"\xff": "byte 0xff in position 0",
    b"[" * 10**5: "nested too deeply",
    b"[1]": r"it must hold a JSON object, got \[1\]",
    b"null": "it must hold a JSON object, got None",
    b"{}": "it must have the fields held_out, num_skipped",
    b'{"held_out": []}': "it must have the fields held_out, num_skipped",
    **{
        json.dumps({"held_out": held_out, "num_skipped": skipped}).encode(): message
        for held_out, skipped, message in [
            ([], 0, "held_out is empty"),
            ({}, 0, "held_out must be a list of documents, got {}"),
            ("geese", 0, "held_out must be a list of documents, got 'geese'"),
            (ONE, -1, "num_skipped must be an integer from 0 .* got -1"),
            (ONE, "0", "num_skipped must be an integer from 0 .* got '0'"),
            (ONE, 1.0, "num_skipped must be an integer from 0 .* got 1.0"),
            (ONE, 10**30, "num_skipped must be an integer from 0"),
            (["geese"], 0, r"held_out\[0\] must be an object, got 'geese'"),
            ([KEPT, {}], 0, r"held_out\[1\] must have the fields name, text, counted, continues"),
            ([KEPT | {"more": 1}], 0, r"held_out\[0\] must have the fields .*'more'"),
            ([KEPT | {"name": 3}], 0, r"held_out\[0\]\.name must be a text, got 3"),
            ([KEPT | {"text": None}], 0, r"held_out\[0\]\.text must be a text, got None"),
            ([KEPT | {"text": ["x" * 1000]}], 0, r"held_out\[0\]\.text must be a text, got \['xx"),
            ([KEPT | {"text": "a\ud800"}], 0, "half of a surrogate pair at character 1"),
            ([KEPT | {"continues": 1}], 0, "continues must be true or false, got 1"),
            ([KEPT | {"counted": True}], 0, "counted must be null or a list of ranges, got True"),
            ([KEPT | {"counted": [3]}], 0, r"counted\[0\] must be a range .* 0 to 5, got 3"),
            ([KEPT | {"counted": [[1]]}], 0, r"counted\[0\] must be a range .* got \[1\]"),
            ([KEPT | {"counted": [[0, 6]]}], 0, r"counted\[0\] must be a range .* got \[0, 6\]"),
            ([KEPT | {"counted": [[-1, 2]]}], 0, r"counted\[0\] must be a range .* got \[-1, 2\]"),
            ([KEPT | {"counted": [[2, 1]]}], 0, r"counted\[0\] must be a range .* got \[2, 1\]"),
            ([KEPT | {"counted": [[0, 2], [1, 3]]}], 0, r"counted\[1\] must be .* from 2 to 5"),
            (
                [KEPT | {"counted": [[0, 1.5]]}],
                0,
                r"counted\[0\] must be a range .* got \[0, 1.5\]",
            ),
        ]
    },
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A text, and the folder in which its tokens are kept."""
    folder = tmp_path_factory.mktemp("kept")
    file = write_lines(folder / "a.jsonl", [f"Goose {i}" for i in range(50)])
    prepare(file, folder / "kept")
    (kept,) = (folder / "kept").iterdir()
    return file, kept


@pytest.mark.parametrize("content", BAD_RECORDS, ids=lambda content: repr(content[:60]))
def test_damaged_held_out_text_is_named(kept, content):
    file, folder = kept
    (folder / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=BAD_RECORDS[content]) as error:
        prepare(file, folder.parent)
    assert str(error.value).startswith(f"{folder / 'record.json'} is damaged: ")
    assert str(error.value).endswith(f"; remove {folder}")
    assert len(str(error.value)) < 300 + 2 * len(str(folder))
