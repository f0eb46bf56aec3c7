import numpy as np
import pytest

from goose_jax.data import (
    NOT_COUNTED,
    Document,
    RandomWindows,
    TrainingText,
    encode_counted,
    encode_documents,
    evaluation_batches,
    next_token_batch,
    pack_documents,
    random_batch,
    read_documents,
    split_documents,
    standard_library,
)
from goose_jax.text import ByteTokenizer


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def names(documents, folder):
    return [document.name.removeprefix(f"{folder}/") for document in documents]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b/z.txt", "a.txt", "b/a.md", "b-c.txt", ".git/config", "empty.txt"):
        write(tmp_path / name, "" if name == "empty.txt" else f"text of {name} äöü\r\n")
    documents = read_documents(tmp_path)
    assert names(documents, tmp_path) == ["a.txt", "b/a.md", "b/z.txt", "b-c.txt"]
    assert documents[0].text == "text of a.txt äöü\r\n"
    assert names(read_documents(tmp_path, patterns=["*.md"]), tmp_path) == ["b/a.md"]


def test_a_file_is_one_document(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    assert read_documents(path) == [Document(str(path), "text")]


def test_the_standard_library():
    documents = standard_library()
    files = [document.name for document in documents]
    assert len(set(files)) == len(files) > 200
    assert sum(document.num_bytes for document in documents) > 3_000_000
    assert any(name.endswith("/dataclasses.py") for name in files)
    assert not any("/site-packages/" in name or "/test/" in name for name in files)
    assert documents == standard_library()


def test_whole_files_are_held_out():
    documents = [Document(str(i), f"{i:03d} " * (5 + i % 7)) for i in range(200)]
    training, held_out = split_documents(documents, held_out_bytes=400)
    assert sorted(training + held_out, key=lambda d: int(d.name)) == documents
    assert 300 < sum(document.num_bytes for document in held_out) <= 400
    assert split_documents(documents, held_out_bytes=400) == (training, held_out)
    assert split_documents(documents, held_out_bytes=400, seed=1)[1] != held_out


def test_at_most_a_tenth_is_held_out():
    documents = [Document(str(i), f"{i:010d}") for i in range(50)]
    _, held_out = split_documents(documents, held_out_bytes=10**9)
    assert len(held_out) == 5


def test_the_end_of_the_longest_document_is_held_out_where_no_whole_one_fits():
    text = "".join(chr(0xC0 + i % 60) for i in range(500))  # two bytes each
    documents = [Document("a", "x" * 900), Document("b", text)]
    training, held_out = split_documents(documents, held_out_bytes=101)
    assert [document.name for document in training] == ["a", "b"]
    assert [document.name for document in held_out] == ["b"]
    assert training[1].text + held_out[0].text == text
    assert 101 <= held_out[0].num_bytes <= 104


def test_what_is_held_out_is_not_trained_on():
    documents = [Document(str(i), f"{i // 2:04d}") for i in range(100)]  # every text twice
    training, held_out = split_documents(documents, held_out_bytes=50)
    assert held_out
    assert not {d.text for d in training} & {d.text for d in held_out}
    assert len(training) + len(held_out) == 50


@pytest.mark.parametrize(("length", "held_out_bytes"), [(9, 5), (100, 0), (100, -1)])
def test_a_wrong_split_is_refused(length, held_out_bytes):
    with pytest.raises(ValueError, match="too short" if length < 10 else "held_out_bytes"):
        split_documents([Document("a", "x" * length)], held_out_bytes=held_out_bytes)


def test_documents_are_separated():
    tokens = encode_documents([Document("a", "AB"), Document("b", "é")], ByteTokenizer())
    assert tokens.tolist() == [0, 66, 67, 0, 0xC3 + 1, 0xA9 + 1, 0]
    assert tokens.dtype == np.int32


def test_ids_outside_the_vocabulary_are_refused():
    class Wrong(ByteTokenizer):
        vocab_size = 60

    with pytest.raises(ValueError, match="a: the tokenizer gave id 66, outside its vocabulary"):
        encode_documents([Document("a", "A")], Wrong())


def test_every_token_predicts_the_next():
    batch = next_token_batch(np.arange(10).reshape(2, 5))
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.segment_ids is None


def test_targets_stay_within_a_segment():
    tokens = np.array([[10, 11, 12, 13, 14, 15, 16, 17, 18]])
    ids = np.array([[0, 1, 1, 0, 1, 2, 0, 3, 3]])  # padding counts as absent, wherever it stands
    batch = next_token_batch(tokens, ids)
    no = NOT_COUNTED
    assert batch.targets.tolist() == [[no, 12, 14, no, no, no, no, 18]]
    assert batch.segment_ids.tolist() == ids[:, :-1].tolist()
    assert next_token_batch(tokens, np.zeros_like(ids)).targets.tolist() == [[no] * 8]


@pytest.mark.parametrize("shape", [(5,), (2, 1), (1, 1, 1, 4)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"tokens must have shape"):
        next_token_batch(np.zeros(shape, int))


def test_segment_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"segment_ids must have tokens.shape=\(2, 5\)"):
        next_token_batch(np.zeros((2, 5), int), np.zeros((2, 4), int))


def test_random_batches_are_a_function_of_seed_and_step():
    tokens = np.arange(1000)

    def draw(step=3, seed=7, **more):
        arguments = {"batch_size": 4, "sequence_length": 8} | more
        return random_batch(tokens, step, seed=seed, **arguments).inputs

    assert (draw() == draw()).all()
    assert (draw(step=4) != draw()).any()
    assert (draw(seed=8) != draw()).any()
    assert draw(microbatches=3).shape == (3, 4, 8)
    assert (np.diff(draw(), axis=-1) == 1).all()


@pytest.mark.parametrize("microbatches", [1, 3])
def test_processes_divide_the_rows_of_a_batch(microbatches):
    whole = RandomWindows(
        np.arange(1000), batch_size=6, sequence_length=8, seed=7, microbatches=microbatches
    )
    for count in (1, 2, 3, 6):
        parts = [whole.for_process(index, count)(5).inputs for index in range(count)]
        assert {part.shape[-2] for part in parts} == {6 // count}
        np.testing.assert_array_equal(np.concatenate(parts, axis=-2), whole(5).inputs)


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (2, 2, "process_index must be in 0..1, got 2"),
        (-1, 2, "process_index must be in 0..1, got -1"),
        (0, 4, "batch_size=6 must be a multiple of the 4 processes"),
        (0, 0, "process_count"),
    ],
)
def test_processes_that_cannot_divide_a_batch_are_refused(index, count, message):
    whole = RandomWindows(np.arange(1000), batch_size=6, sequence_length=8, seed=7)
    with pytest.raises(ValueError, match=message):
        whole.for_process(index, count)


def test_random_batches_reach_every_token():
    batches = [
        random_batch(np.arange(6), step, batch_size=4, sequence_length=4, seed=0)
        for step in range(20)
    ]
    assert {token for b in batches for token in b.inputs.ravel().tolist()} == {0, 1, 2, 3, 4}
    assert {token for b in batches for token in b.targets.ravel().tolist()} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 10}, "10 tokens do not fill a window of sequence_length=10"),
        ({"batch_size": 0}, "batch_size"),
        ({"microbatches": 0}, "microbatches"),
        ({"sequence_length": 2.0}, "sequence_length"),
    ],
)
def test_wrong_batch_sizes_are_refused(change, message):
    arguments = {"batch_size": 2, "sequence_length": 4, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        random_batch(np.arange(10), 0, **arguments)


@pytest.mark.parametrize("count", [2, 12, 13, 14, 25])
def test_evaluation_asks_for_every_token_once(count):
    tokens = np.arange(100, 100 + count)
    batches = list(evaluation_batches(tokens, batch_size=3, sequence_length=4))
    inputs, targets = (
        np.concatenate([np.ravel(getattr(b, name)) for b in batches])
        for name in ("inputs", "targets")
    )
    counted = targets != NOT_COUNTED
    assert targets[counted].tolist() == tokens[1:].tolist()
    assert (inputs[counted] == targets[counted] - 1).all()
    assert {b.inputs.shape for b in batches} == {(3, 4)}


def test_evaluation_asks_only_for_what_is_counted():
    chat = Document("chat", "Q: ü\nA: é", ((8, 9),))
    tokens, counted = encode_counted([Document("a", "AB"), chat], ByteTokenizer())
    assert (
        tokens.tolist() == encode_documents([Document("a", "AB"), chat], ByteTokenizer()).tolist()
    )
    batches = evaluation_batches(tokens, batch_size=2, sequence_length=3, counted=counted)
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert ByteTokenizer().decode(targets[targets >= 0].tolist()) == "ABé"
    assert np.sum(targets >= 0) == 2 + 1 + 2 + 1  # with the end of each
    assert chat.num_counted_bytes == 2


def test_packing_keeps_every_document():
    documents = [[1, 2, 3], [4] * 11, [], [5, 6], [7, 7, 7, 7], [8]]
    tokens, ids = pack_documents(documents, length=5)
    assert tokens.shape == ids.shape
    assert tokens.shape[1] == 5
    found = [
        tokens[row, ids[row] == i].tolist()
        for row in range(len(ids))
        for i in range(1, ids[row].max() + 1)
    ]
    assert sorted(found) == sorted([[1, 2, 3], [4] * 5, [4] * 5, [4], [5, 6], [7] * 4, [8]])
    assert len(ids) == 5  # 21 tokens do not fit into fewer
    assert (tokens[ids == 0] == 0).all()


def test_packing_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        pack_documents([[]], length=4)


def test_a_training_text_of_conversations_counts_the_replies():
    documents = [
        Document(str(i), f"Q{i} Answer {i}", ((len(f"Q{i}"), len(f"Q{i} Answer {i}")),))
        for i in range(40)
    ]
    text = TrainingText.from_documents(
        documents, ByteTokenizer(), source="chats", held_out_bytes=40
    )
    windows = text.windows(batch_size=50, sequence_length=8, seed=3, microbatches=2)
    batch = windows(0)
    spoken = ByteTokenizer().decode(batch.targets[batch.targets >= 0].tolist())
    assert "Answer" in spoken
    assert "Q" not in spoken
    assert "Q" in ByteTokenizer().decode(batch.inputs.ravel().tolist())
    plain = RandomWindows(text.tokens, batch_size=50, sequence_length=8, seed=3, microbatches=2)
    assert windows.checksum != plain.checksum
    np.testing.assert_array_equal(batch.inputs, plain(0).inputs)


def test_a_training_text_gives_batches_of_what_is_not_held_out():
    documents = [Document("a", "Honk! said the goose. " * 20)]
    text = TrainingText.from_documents(
        documents, ByteTokenizer(), source="geese", held_out_bytes=22
    )
    assert [document.text for document in text.held_out] == ["Honk! said the goose. "]
    assert len(text.tokens) == 22 * 19 + 2  # a separator at each end
    windows = text.windows(batch_size=2, sequence_length=8, seed=3, microbatches=4)
    sizes = {"batch_size": 2, "sequence_length": 8, "seed": 3, "microbatches": 4}
    for step in (0, 7):
        expected = random_batch(text.tokens, step, **sizes)
        np.testing.assert_array_equal(windows(step).inputs, expected.inputs)
        np.testing.assert_array_equal(windows(step).targets, expected.targets)
    assert windows.checksum == RandomWindows(text.tokens.copy(), **sizes).checksum
    assert windows.checksum != RandomWindows(text.tokens[:-1], **sizes).checksum
    with pytest.raises(ValueError, match="geese is too short: 420 tokens to train on, but"):
        text.windows(batch_size=2, sequence_length=420, seed=0)
