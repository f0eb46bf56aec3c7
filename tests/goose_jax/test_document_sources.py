"""Files, folders and JSONL as documents, and what is said of damaged ones."""

import gzip
import json
import re

import pytest

from goose_jax.chat import render_conversation
from goose_jax.data import Document, Position, open_documents, read_documents
from goose_jax.data import json_lines as json_lines_module
from goose_jax.data import text_files as text_files_module
from goose_jax.text import ByteTokenizer

CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path, **options):
    return [document.text for document in open_documents(path, **options)]


def test_lines_of_json_are_documents(tmp_path):
    lines = [
        json.dumps({"text": 'a "quoted" line\n\tand {braces}', "other": 1}),
        "",
        "   ",
        json.dumps({"text": "鹅 🦢"}, ensure_ascii=True),
        json.dumps({"text": ""}),
    ]
    for end, name in (("\n", "a.jsonl"), ("\r\n", "b.ndjson"), ("\n", "c.jsonl.gz")):
        data = end.join(lines).encode()
        if name == "b.ndjson":
            data = b"\xef\xbb\xbf" + data  # a byte order mark
        file = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
        documents = list(open_documents(file))
        assert [document.text for document in documents] == [
            'a "quoted" line\n\tand {braces}',
            "鹅 🦢",
            "",
        ]
        assert [document.name for document in documents] == [
            f"{file}, line {number}" for number in (1, 4, 5)
        ]
    assert len(read_documents(tmp_path)) == 6  # without the empty ones


def test_another_field_is_read_by_its_name(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps({"text": "a", "body": "b", "chat": CHAT}))
    assert texts(file) == ["a"]
    assert texts(file, field="body") == ["b"]
    assert texts(file, field="chat", render=render_conversation) == ["User: 2 + 2?\n\nAssistant: 4"]


def test_conversations_are_rendered(tmp_path):
    shared = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    lines = [json.dumps({"messages": CHAT}), json.dumps({"conversations": shared})]
    first, second = open_documents(
        write(tmp_path / "a.jsonl", "\n".join(lines)), render=render_conversation
    )
    assert first.text == second.text == "User: 2 + 2?\n\nAssistant: 4"
    assert [first.text[a:b] for a, b in first.counted] == [" 4"]
    assert second.counted == first.counted


def test_reading_goes_on_from_any_position(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files_module, "PIECE_BYTES", 16)
    write(tmp_path / "a.txt", "The first line\nand a second line\nß" + "ü" * 30)
    write(tmp_path / "b.jsonl", "\n".join(json.dumps({"text": str(i)}) for i in range(3)))
    write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "x"}\n\n{"text": "y"}\n'))
    write(tmp_path / "d.txt", "end")
    source = open_documents(tmp_path)
    whole = list(source.read())
    assert len(whole) > 10
    for i, (_, position) in enumerate(whole):
        assert list(source.read(position)) == whole[i + 1 :]
    assert list(source.read(Position())) == whole


def test_a_long_file_is_read_in_pieces(tmp_path, monkeypatch):
    text = "".join(f"Line {i} of a text, täglich.\n\n    indented\n" for i in range(40)) + "鹅" * 50
    file = write(tmp_path / "a.txt", text)
    assert texts(file) == [text]
    monkeypatch.setattr(text_files_module, "PIECE_BYTES", 100)
    pieces = list(open_documents(file))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text.encode()) for piece in pieces) <= 100
    assert [piece.continues for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    of_lines = [piece for piece in pieces[1:] if not piece.text.startswith("鹅")]
    assert len(of_lines) > 10
    assert all(piece.text.startswith("Line ") for piece in of_lines)
    assert read_documents(file) == [Document(str(file), text)]


def test_files_that_are_not_text_are_left_out_of_a_folder(tmp_path):
    for name, content in {
        "a.txt": b"text",
        "binary": b"\x7fELF\0\0",
        "latin": "Gänse".encode("latin-1"),
        "cut": "鹅".encode()[:2],
        "damaged.gz": gzip.compress(b"text" * 1000)[:30],
        "tar.gz": gzip.compress(b"\0" * 10),
        "z.txt.gz": gzip.compress("Gänse".encode()),
    }.items():
        write(tmp_path / name, content)
    skipped = {}
    source = open_documents(tmp_path)
    read = source.read(on_skipped=lambda file, why: skipped.update({file.name: why}))
    assert [document.text for document, _ in read] == ["text", "Gänse"]
    assert skipped == {
        "binary": "is not a text file: byte 4 is zero",
        "latin": "is not a UTF-8 text file: byte 1 is 0xe4",
        "cut": "is not a UTF-8 text file: byte 0 is 0xe9",
        "damaged.gz": "cannot be unpacked: Compressed file ended before the end-of-stream marker "
        "was reached",
        "tar.gz": "is not a text file: byte 0 is zero",
    }
    with pytest.raises(ValueError, match=r"binary is not a text file: byte 4"):
        texts(tmp_path, strict=True)


def test_several_patterns(tmp_path):
    for name in ("a.txt", "b.md", "c.py", "d/e.txt"):
        write(tmp_path / name, name)
    assert texts(tmp_path, patterns=["*.txt", "*.py", "a*"]) == ["a.txt", "c.py", "d/e.txt"]


@pytest.mark.parametrize("pattern", ["/tmp/*", ""])
def test_what_is_no_pattern_is_named(tmp_path, pattern):
    write(tmp_path / "a.txt", "text")
    with pytest.raises(ValueError, match=f"pattern='{re.escape(pattern)}' must fit names in a fol"):
        open_documents(tmp_path, patterns=["*", pattern])
    with pytest.raises(ValueError, match="patterns must hold at least one pattern"):
        open_documents(tmp_path, patterns=[])


def test_what_a_pattern_finds_nothing_for_is_named(tmp_path):
    write(tmp_path / "a.txt", "text")
    with pytest.raises(
        ValueError, match=r"does not hold a file with text whose name fits '\*.py' or 'b'"
    ):
        open_documents(tmp_path, patterns=["*.py", "b"])
    with pytest.raises(FileNotFoundError, match=r"no file or folder at .*nowhere"):
        open_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="null is neither a file nor a folder"):
        open_documents("/dev/null")


def test_the_fingerprint_follows_the_files(tmp_path):
    file = write(tmp_path / "a.txt", "text")
    source = open_documents(tmp_path)
    before = source.fingerprint
    assert open_documents(tmp_path).fingerprint == before
    write(file, "texts")
    assert source.fingerprint != before
    write(tmp_path / "b.txt", "")
    assert open_documents(tmp_path).fingerprint != source.fingerprint
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.txt"):
        _ = source.fingerprint


LONG = "a" * 60
BAD_TEXTS = {
    "empty": (b"", "does not hold any text"),
    "zero first": (b"\0", "byte 0 is zero"),
    "zero last": (b"text\0", "byte 4 is zero"),
    "zero in the second block": (LONG.encode() + b"\0", "byte 60 is zero"),
    "zero before what is not UTF-8": (b"a\0\xff", "byte 1 is zero"),
    "UTF-16": ("text".encode("utf-16"), "byte 3 is zero"),
    "UTF-32": ("text".encode("utf-32-be"), "byte 0 is zero"),
    "Latin-1": ("Gänse".encode("latin-1"), "byte 1 is 0xe4"),
    "0xff": (b"text \xff\xfe", "byte 5 is 0xff"),
    "a continuation alone": (b"ab\x80", "byte 2 is 0x80"),
    "cut after one byte of two": (b"ab\xc3", "byte 2 is 0xc3"),
    "cut after three bytes of four": ("a🦢".encode()[:-1], "byte 1 is 0xf0"),
    "cut at the end of a block": (LONG[:31].encode() + b"\xc3", "byte 31 is 0xc3"),
    "wrong after the end of a block": (LONG[:31].encode() + b"\xc3a", "byte 31 is 0xc3"),
    "in the third block": (LONG.encode() + b"abcdefgh\xfe", "byte 68 is 0xfe"),
    "overlong": (b"a\xc0\xaf", "byte 1 is 0xc0"),
    "a surrogate": (b"a\xed\xa0\x80", "byte 1 is 0xed"),
    "beyond Unicode": (b"a\xf4\x90\x80\x80", "byte 1 is 0xf4"),
    "five bytes": (b"\xf8\x88\x80\x80\x80", "byte 0 is 0xf8"),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "byte 8 is zero"),
}
BAD_ARCHIVES = {
    "no archive": (b"text", "cannot be unpacked: Not a gzipped file"),
    "the archive is empty": (gzip.compress(b""), "does not hold any text"),
    "the archive is of zeros": (gzip.compress(b"a\0"), "byte 1 is zero"),
    "the archive is of Latin-1": (gzip.compress(b"a\xe4b"), "byte 1 is 0xe4"),
    "the archive is cut": (gzip.compress(b"text")[:-9], "cannot be unpacked"),
    "the archive has a wrong sum": (
        gzip.compress(b"text")[:-8] + b"\0" * 8,
        "cannot be unpacked: CRC check failed",
    ),
    "the header is cut": (gzip.compress(b"text")[:5], "cannot be unpacked"),
    "the blocks are wrong": (
        gzip.compress(b"text")[:10] + b"\xff" * 20,
        "cannot be unpacked: Error -3",
    ),
}


@pytest.mark.parametrize("name", BAD_TEXTS | BAD_ARCHIVES)
def test_a_bad_text_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files_module, "PIECE_BYTES", 32)
    content, message = (BAD_TEXTS | BAD_ARCHIVES)[name]
    file = write(tmp_path / ("bad.txt.gz" if name in BAD_ARCHIVES else "bad.txt"), content)
    with pytest.raises(ValueError, match=message) as error:
        read_documents(file)
    assert str(file) in str(error.value)
    with pytest.raises(ValueError, match="does not hold any text") as error:
        read_documents(tmp_path)
    if "does not hold any text" not in message:
        assert f"1 files were left out: {file}" in str(error.value)


BAD_LINES = {
    "text": (b"The quick brown fox", "line 3: not JSON: Expecting value"),
    "cut": (b'{"text": "a', "line 3: not JSON: Unterminated string"),
    "cut between": (b'{"text": "a"', "line 3: not JSON: Expecting ',' delimiter"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "line 3: not JSON: Extra data"),
    "a list": (b'["text"]', r"line 3: must be a JSON object, got \['text'\]"),
    "a number": (b"3", "line 3: must be a JSON object, got 3"),
    "null": (b"null", "line 3: must be a JSON object, got None"),
    "single quotes": (b"{'text': 'a'}", "line 3: not JSON: Expecting property name"),
    "a raw control character": (b'{"text": "a\tb"}', "line 3: not JSON: Invalid control char"),
    "NUL": (b'{"text": "a\0b"}', "line 3: not JSON: Invalid control character"),
    "only NUL": (b"\0\0\0", "line 3: not JSON"),
    "not UTF-8": (b'{"text": "a\xff"}', "line 3: not UTF-8: byte 41 of the file is 0xff"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "line 3: not JSON"),
    "no field": (b'{"body": "a"}', r"line 3: needs one of .*has only \['body'\]; name the field"),
    "an empty object": (b"{}", r"line 3: needs one of the fields text, messages, conversations"),
    "two fields": (b'{"text": "a", "messages": []}', "line 3: needs .* has text and messages"),
    "a null text": (b'{"text": null}', "line 3: needs one of the fields"),
    "a number as text": (b'{"text": 3}', "line 3: text must be a text or a list of messages, got"),
    "an object as text": (b'{"text": {"a": 1}}', "line 3: text must be a text or a list"),
    "half a surrogate pair": (b'{"text": "a\\ud83e"}', "line 3: text holds half of a surrogate"),
    "too long": (b'{"text": "' + b"a" * 300 + b'"}', "line 3: longer than 200 bytes"),
    "nested too deep": (b'{"text": ' + b"[" * 150, "line 3: not JSON"),
    "no message": (b'{"messages": []}', "line 3: messages: messages must hold a reply"),
    "a message of text": (
        b'{"messages": ["hi"]}',
        r"line 3: messages: messages\[0\] must be an object, got 'hi'",
    ),
    "an unknown role": (
        b'{"messages": [{"role": "goose", "content": "a"}]}',
        r"line 3: messages: messages\[0\]: the role must be one of system, .*, got 'goose'",
    ),
    "a message without content": (
        b'{"messages": [{"role": "user"}]}',
        r"line 3: messages: messages\[0\] must have a 'content' \(or 'value'\)",
    ),
    "a message without role": (
        b'{"messages": [{"content": "a"}]}',
        r"line 3: messages: messages\[0\] must have a 'role' \(or 'from'\)",
    ),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]}',
        r"line 3: messages: messages\[0\]: the content must be text",
    ),
    "an empty reply": (
        b'{"messages": [{"role": "assistant", "content": " "}]}',
        r"line 3: messages: messages\[0\]: the message of the assistant is empty",
    ),
    "nobody answers": (
        b'{"conversations": [{"from": "human", "value": "a"}]}',
        r"line 3: conversations: messages must hold a reply of the assistant",
    ),
    "a call": (
        b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}',
        r"line 3: messages: messages\[0\]: tool_calls are not read",
    ),
}


@pytest.mark.parametrize("archive", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, monkeypatch, name, archive):
    """Also in a folder: nothing of a JSONL file is left out."""
    monkeypatch.setattr(json_lines_module, "MAX_LINE_BYTES", 200)
    line, message = BAD_LINES[name]
    content = b'{"text": "good, a b c"}\n     \n' + line + b'\n{"text": "more"}\n'
    if archive:
        content = gzip.compress(content)
    file = write(tmp_path / ("bad.jsonl.gz" if archive else "bad.jsonl"), content)
    for path in (file, tmp_path):
        reading = iter(open_documents(path, render=render_conversation))
        assert next(reading).text == "good, a b c"
        with pytest.raises(ValueError, match=f"^{file}, {message[: message.find(':')]}") as error:
            next(reading)
        assert error.match(message)
        assert len(str(error.value)) < 400 + len(str(file))


def test_a_damaged_archive_of_lines_is_named(tmp_path):
    content = gzip.compress(b'{"text": "good"}\n' * 1000, compresslevel=0)
    file = write(tmp_path / "a.jsonl.gz", content[:-1000])
    with pytest.raises(ValueError, match=rf"^{file} cannot be unpacked: Compressed file ended"):
        texts(file)


def test_conversations_need_a_form(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}))
    with pytest.raises(ValueError, match="line 1: messages holds a conversation, and only text"):
        texts(file)
    with pytest.raises(ValueError, match=r"line 1: has no field 'body', only \['messages'\]"):
        texts(file, field="body")


def test_the_tokens_of_pieces_are_those_of_the_whole(tmp_path, monkeypatch):
    from goose_jax.data import encode_documents

    file = write(tmp_path / "a.txt", "Line 1\nLine 2\n" * 20)
    whole = encode_documents(list(open_documents(file)), ByteTokenizer())
    monkeypatch.setattr(text_files_module, "PIECE_BYTES", 50)
    pieces = list(open_documents(file))
    assert len(pieces) > 5
    assert encode_documents(pieces, ByteTokenizer()).tolist() == whole.tolist()
