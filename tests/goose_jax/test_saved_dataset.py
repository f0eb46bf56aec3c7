"""Data sets that Hugging Face's package `datasets` saved."""

import json
import re
import shutil

import pytest

from goose_jax.chat import render_conversation
from goose_jax.data import open_documents, saved_dataset, tokenize
from goose_jax.text import ByteTokenizer

datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:multiprocess.*"),
]

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
TEXTS = [f"Goose {i} 鹅" for i in range(10)]


def save(folder, **columns):
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(tmp_path_factory.mktemp("good") / "set", text=TEXTS)


def test_rows_are_documents(good, tmp_path):
    source = open_documents(good)
    whole = list(source.read())
    assert [document.text for document, _ in whole] == TEXTS
    assert whole[3][0].name == f"{good}, row 3"
    for i, (_, position) in enumerate(whole):
        assert list(source.read(position)) == whole[i + 1 :]
        assert source.bytes_before(position) == source.num_bytes * (i + 1) // len(TEXTS)
    data = tokenize(source, ByteTokenizer(), tmp_path / "a")
    assert [ByteTokenizer().decode(data[i]) for i in range(len(data))] == TEXTS


def test_conversations(tmp_path):
    folder = save(tmp_path / "set", messages=[CHAT, CHAT], id=[1, 2])
    first, second = open_documents(folder, render=render_conversation)
    assert first.text == second.text == "User: 2 + 2?\n\nAssistant: 4"
    assert first.counted == ((len(first.text) - 2, len(first.text)),)
    with pytest.raises(ValueError, match="row 0: messages holds a conversation, and only text"):
        list(open_documents(folder))


def test_a_split_is_chosen(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    assert [d.text for d in open_documents(tmp_path / "set" / "test")] == ["test"]
    choices = f"{tmp_path}/set/train, {tmp_path}/set/test"
    with pytest.raises(ValueError, match=f"is divided into splits: give one of {choices}"):
        list(open_documents(tmp_path / "set"))


def test_without_the_package_the_extra_is_named(good, monkeypatch):
    monkeypatch.setattr(saved_dataset.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'goose-jax\[datasets\]'"):
        list(open_documents(good))


def change(name, content):
    """Returns a function that changes a file of a data set."""

    def apply(folder):
        (file,) = folder.glob(name)
        data = file.read_bytes()
        file.write_bytes(content(data) if callable(content) else content)

    return apply


def without(name):
    def apply(folder):
        (file,) = folder.glob(name)
        file.unlink()

    return apply


def change_state(**values):
    def apply(folder):
        file = folder / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply


DAMAGED = {
    "no arrow file": without("*.arrow"),
    "an empty arrow file": change("*.arrow", b""),
    "an arrow file of text": change("*.arrow", b"The quick brown fox"),
    "an arrow file of zeros": change("*.arrow", lambda data: bytes(len(data))),
    "an arrow file cut at the start": change("*.arrow", lambda data: data[:10]),
    "an arrow file cut in the middle": change("*.arrow", lambda data: data[: len(data) // 2]),
    "an arrow file without its beginning": change("*.arrow", lambda data: data[64:]),
    "no state": without("state.json"),
    "no description": without("dataset_info.json"),
    "an empty state": change("state.json", b""),
    "a state of text": change("state.json", b"The quick brown fox"),
    "a state cut": change("state.json", lambda data: data[:30]),
    "a state that is a list": change("state.json", b"[]"),
    "a state without files": change("state.json", b"{}"),
    "a state of another file": change_state(_data_files=[{"filename": "other.arrow"}]),
    "a state that is not UTF-8": change("state.json", b'{"\xff": 1}'),
    "an empty description": change("dataset_info.json", b""),
    "a description cut": change("dataset_info.json", lambda data: data[:-5]),
    "a description that is a list": change("dataset_info.json", b"[]"),
    "a description of other columns": change(
        "dataset_info.json", lambda data: data.replace(b'"text"', b'"body"')
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_data_set_is_named(good, tmp_path, name):
    folder = tmp_path / "set"
    shutil.copytree(good, folder)
    DAMAGED[name](folder)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}.* cannot be read") as error:
        list(open_documents(folder))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


BAD_ROWS = {
    "no column": ({"body": ["a", "b"]}, r"row 0: needs one of the fields .* only \['body'\]"),
    "two columns": (
        {"text": ["a"], "messages": [CHAT]},
        "row 0: needs one of the fields .* has text and messages",
    ),
    "a null": ({"text": ["a", None]}, "row 1: needs one of the fields text, messages, conv"),
    "numbers": ({"text": [1, 2]}, "row 0: text must be a text or a list of messages, got 1"),
    "bytes": ({"text": [b"a", b"b"]}, "row 0: text must be a text or a list of messages, got b'a'"),
    "objects": ({"text": [{"a": 1}]}, "row 0: text must be a text or a list of messages, got {"),
    "texts in lists": (
        {"messages": [["a", "b"]]},
        r"row 0: messages: messages\[0\] must be an object, got 'a'",
    ),
    "an unknown role": (
        {"messages": [CHAT, [{"role": "goose", "content": "a"}]]},
        r"row 1: messages: messages\[0\]: the role must be one of .*, got 'goose'",
    ),
    "no messages": (
        {"messages": [CHAT, []]},
        "row 1: messages: messages must hold a reply of the assistant",
    ),
    "a message without content": (
        {"conversations": [[{"from": "human", "value": None}]]},
        r"row 0: conversations: messages\[0\] must have a 'content' \(or 'value'\)",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, name):
    columns, message = BAD_ROWS[name]
    folder = save(tmp_path / "set", **columns)
    with pytest.raises(ValueError, match=message) as error:
        list(open_documents(folder, render=render_conversation))
    assert str(error.value).startswith(f"{folder}, row ")


def test_a_data_set_without_rows(tmp_path):
    folder = save(tmp_path / "set", text=[])
    with pytest.raises(ValueError, match="set cannot be read as a data set"):
        tokenize(open_documents(folder), ByteTokenizer(), tmp_path / "a")
