"""From documents to `.bin` and `.idx`, also where it is interrupted."""

import contextlib
import errno
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from goose_jax.chat import render_conversation
from goose_jax.cli.main import main
from goose_jax.data import Binidx, encoding, open_documents, text_files, tokenization, tokenize
from goose_jax.text import ByteTokenizer, world_tokenizer
from tests.goose_jax.binidx_by_hand import write_by_hand

ROOT = Path(__file__).parents[2]
TEXTS = [f"Goose {i} said: «{'Honk! ' * (i % 7)}»\n\n鹅 🦢 {i * 37}" for i in range(40)] + [""]


def by_bytes(text):
    """The ids of the byte tokenizer, and the end of a document."""
    return [byte + 1 for byte in text.encode()] + [0]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(prefix):
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(encoding, "_TASK_DOCUMENTS", 3)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 64)


@pytest.fixture
def mixed(tmp_path):
    """A folder of JSONL and text, and the documents that it holds."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write_lines(folder / "a.jsonl", TEXTS[:20])
    long = "Line of a long text\nand another line\n" * 20
    (folder / "b.txt").write_text(long)
    (folder / "c.bin").write_bytes(b"\0\1")
    write_lines(folder / "d.jsonl", TEXTS[20:])
    (folder / "e.bin").write_bytes(b"\0\1")
    return folder, [*TEXTS[:20], long, *TEXTS[20:]]


def test_the_files_equal_those_of_an_independent_tool(tmp_path):
    source = open_documents(write_lines(tmp_path / "a.jsonl", TEXTS))
    data = tokenize(source, ByteTokenizer(), tmp_path / "a")
    expected = write_by_hand(tmp_path / "expected", [by_bytes(text) for text in TEXTS])
    assert contents(tmp_path / "a") == contents(expected)
    assert data.tokens.tolist() == [token for text in TEXTS for token in by_bytes(text)]
    assert not list(tmp_path.glob("a.*.partial"))
    assert not (tmp_path / "a.progress.json").exists()


@pytest.mark.slow
def test_with_the_world_vocabulary_they_are_those_of_the_official_tokenizer(tmp_path):
    package = Path(importlib.util.find_spec("rwkv").origin).parent
    spec = importlib.util.spec_from_file_location("official", package / "rwkv_tokenizer.py")
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    encode = official.TRIE_TOKENIZER(str(package / "rwkv_vocab_v20230424.txt")).encode
    texts = [*TEXTS, (ROOT / "README.md").read_text(), Path(__file__).read_text()]
    source = open_documents(write_lines(tmp_path / "a.jsonl", texts))
    tokenize(source, world_tokenizer(), tmp_path / "a")
    expected = write_by_hand(tmp_path / "expected", [[*encode(text), 0] for text in texts])
    assert contents(tmp_path / "a") == contents(expected)


@pytest.mark.slow
def test_a_long_file_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 4000)
    tokenizer = world_tokenizer()
    for number, file in enumerate([ROOT / "README.md", Path(__file__)]):
        data = tokenize(open_documents(file), tokenizer, tmp_path / str(number))
        assert len(data) == 1
        assert data.tokens.tolist() == [*tokenizer.encode(file.read_text()), 0]


def test_a_folder_of_everything(mixed, tmp_path, small_tasks):
    folder, documents = mixed
    skipped, seen = [], []
    data = tokenize(
        open_documents(folder),
        ByteTokenizer(),
        tmp_path / "new" / "a",
        on_progress=seen.append,
        on_skipped=lambda file, why: skipped.append(file.name),
    )
    assert [data[i].tolist() for i in range(len(data))] == [by_bytes(text) for text in documents]
    assert skipped == ["c.bin", "e.bin"]
    assert len(seen) > 10
    assert seen[0].tokens == 0
    last = seen[-1]
    assert (last.documents, last.tokens, last.skipped) == (42, len(data.tokens), 2)
    assert last.num_bytes == sum(len(text.encode()) for text in documents)
    done = [open_documents(folder).bytes_before(progress.position) for progress in seen]
    assert done == sorted(done)
    assert done[-1] <= open_documents(folder).num_bytes


def test_conversations_say_what_is_counted(tmp_path):
    chat = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    lines = [{"conversations": chat}, {"text": "all"}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    data = tokenize(
        open_documents(file, render=render_conversation), ByteTokenizer(), tmp_path / "a"
    )
    assert ByteTokenizer().decode(data[0]) == "User: a?\n\nAssistant: b"
    counted = np.array(data.counted)
    assert ByteTokenizer().decode(data.tokens[counted]) == " ball"
    assert counted.sum() == len(" b") + 1 + len("all") + 1
    write_lines(tmp_path / "b.jsonl", ["all"])
    assert (
        tokenize(open_documents(tmp_path / "b.jsonl"), ByteTokenizer(), tmp_path / "b").counted
        is None
    )


class Killed(BaseException):
    """Ends a call as a signal would that cannot be caught."""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["saved always", "saved never"])
def test_it_goes_on_from_any_moment(mixed, tmp_path, small_tasks, monkeypatch, seconds):
    folder, documents = mixed
    monkeypatch.setattr(tokenization, "_SAVE_SECONDS", seconds)
    source = open_documents(folder)
    expected = write_by_hand(tmp_path / "expected", [by_bytes(text) for text in documents])
    out = tmp_path / "a"
    positions, last = [], []
    for moment in (1, 2, 3, 4, 6, 1000) if seconds == 0.0 else (1, 5, 9, 12, 1000):
        calls = iter(range(moment))

        def on_progress(progress, calls=calls):
            last.append(progress)
            if next(calls, None) is None:
                raise Killed

        try:
            tokenize(source, ByteTokenizer(), out, on_progress=on_progress)
        except Killed:
            positions.append(last[-1].position)
            assert not Path(f"{out}.idx").exists()
    assert contents(out) == contents(expected)
    assert last[-1].skipped == 2
    if seconds == 0.0:
        assert len(set(positions)) == 5


def test_ctrl_c_saves_what_is_done(mixed, tmp_path, small_tasks):
    folder, documents = mixed
    out = tmp_path / "a"

    def interrupt(progress):
        if progress.documents > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(open_documents(folder), ByteTokenizer(), out, on_progress=interrupt)
    seen = []
    data = tokenize(open_documents(folder), ByteTokenizer(), out, on_progress=seen.append)
    assert seen[0].documents == 15
    assert [data[i].tolist() for i in range(len(data))] == [by_bytes(text) for text in documents]


def test_it_goes_on_after_a_file_that_cannot_be_read(mixed, tmp_path, small_tasks):
    folder, documents = mixed
    source = open_documents(folder)
    away = tmp_path / "away"

    def unmount(progress):
        if progress.documents > 12 and not away.exists():
            (folder / "d.jsonl").rename(away)

    with pytest.raises(FileNotFoundError, match=r"d\.jsonl"):
        tokenize(source, ByteTokenizer(), tmp_path / "a", on_progress=unmount)
    away.rename(folder / "d.jsonl")
    seen = []
    data = tokenize(source, ByteTokenizer(), tmp_path / "a", on_progress=seen.append)
    assert seen[0].documents > 12
    assert [data[i].tolist() for i in range(len(data))] == [by_bytes(text) for text in documents]


@contextlib.contextmanager
def files_of_at_most(size):
    """Makes it an error to write more than `size` bytes to a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save_seconds", [0.0, 1e9], ids=["saved always", "saved never"])
def test_it_goes_on_after_a_full_disk(mixed, tmp_path, small_tasks, monkeypatch, save_seconds):
    folder, documents = mixed
    monkeypatch.setattr(tokenization, "_SAVE_SECONDS", save_seconds)
    source, seen = open_documents(folder), []
    with (
        pytest.raises(OSError, match=r"a\.bin\.partial") as raised,
        files_of_at_most(3000),
    ):
        tokenize(source, ByteTokenizer(), tmp_path / "a")
    assert raised.value.errno == errno.EFBIG
    data = tokenize(source, ByteTokenizer(), tmp_path / "a", on_progress=seen.append)
    assert (seen[0].documents > 0) == (save_seconds == 0.0)
    assert [data[i].tolist() for i in range(len(data))] == [by_bytes(text) for text in documents]


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_it_goes_on_where_the_files_got_their_names(tmp_path, monkeypatch, renames):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": chat}))
    source = open_documents(file, render=render_conversation)
    left = iter(range(renames - 1))
    replace = os.replace

    def killed(old, new):
        if Path(new).suffix in (".bin", ".idx", ".counted") and next(left, None) is None:
            raise Killed
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        tokenize(source, ByteTokenizer(), tmp_path / "a")
    monkeypatch.setattr(os, "replace", replace)
    data = tokenize(source, ByteTokenizer(), tmp_path / "a")
    assert ByteTokenizer().decode(data.tokens) == "User: a\n\nAssistant: b"
    assert ByteTokenizer().decode(data.tokens[np.array(data.counted)]) == " b"
    assert sorted(file.name for file in tmp_path.glob("a.*")) == [
        "a.bin",
        "a.counted",
        "a.idx",
        "a.jsonl",
    ]


def interrupted(source, out):
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(source, ByteTokenizer(), out, on_progress=interrupt)


def test_a_source_that_changed_or_vanished_is_named(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", TEXTS)
    interrupted(open_documents(file), tmp_path / "a")
    write_lines(file, TEXTS[1:])
    with pytest.raises(ValueError, match=r"a\.progress\.json is of another .* has changed since"):
        tokenize(open_documents(file), ByteTokenizer(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"a\.progress\.json is of another tokenization"):
        tokenize(open_documents(file), NoEnd(), tmp_path / "a")
    source = open_documents(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        tokenize(source, ByteTokenizer(), tmp_path / "a")
    (tmp_path / "a.progress.json").unlink()  # as the message says
    write_lines(file, TEXTS[1:])
    assert len(tokenize(open_documents(file), ByteTokenizer(), tmp_path / "a")) == len(TEXTS) - 1


BAD_RECORDS = [
    (b"", "Expecting value: line 1 column 1"),
    (b"{", "line 1 column 2"),
    (b"\0", "Expecting value"),
    (b"\xff\xfe", "byte 0xff in position 0"),
    (b"[" * 10**5, "nested too deeply"),
    (b"[]", r"must hold a JSON object, got \[\]"),
    (b"{}", "of must be a text, got None"),
    (b'{"of": 1}', "of must be a text, got 1"),
    (b'{"of": "1"}', "progress must have the fields documents, tokens,"),
    ({"documents": ...}, "progress must have the fields documents"),
    ({"more": 1}, "progress must have the fields documents"),
    ({"documents": "1"}, r"progress\.documents must be an integer .* got '1'"),
    ({"documents": True}, r"progress\.documents must be an integer .* got True"),
    ({"tokens": 1.0}, r"progress\.tokens must be an integer .* got 1.0"),
    ({"num_bytes": -1}, r"progress\.num_bytes must be an integer .* got -1"),
    ({"skipped": None}, r"progress\.skipped must be an integer .* got None"),
    ({"skipped": "x" * 10**5}, r"progress\.skipped must be an integer .* got 'xxx"),
    ({"position": [0, 0, 1]}, r"progress\.position must be an object, got \[0, 0, 1\]"),
    ({"position": {"item": 0, "x": 1}}, r"progress\.position must have the fields item, offset"),
    ({"position.offset": 10**30}, r"progress\.position\.offset must be an integer from 0 to 2"),
    ({"position.offset": 10**6}, r"a\.jsonl has no place Position\(item=0, offset=1000000"),
    ({"position.item": 2}, r"a\.jsonl has no place Position\(item=2"),
    ({"position.line": "1"}, r"progress\.position\.line must be an integer"),
    ({"written": None}, r"progress\.written must be an object, got None"),
    ({"written.items": [1]}, r"progress\.written\.items must be an integer"),
    ({"written.tokens": 1}, "it tells of .* tokens, but of .* and 1 that are written"),
    ({"documents": 10**6}, "it tells of 1000000 documents"),
    ({"written.pending": 10**6}, "1000000 tokens are pending of"),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A tokenization that was interrupted: its text, and the intact record."""
    file = write_lines(tmp_path_factory.mktemp("started") / "a.jsonl", TEXTS)
    interrupted(open_documents(file), file.with_name("a"))
    return file, json.loads(file.with_name("a.progress.json").read_bytes())


@pytest.mark.parametrize(("change", "message"), BAD_RECORDS, ids=lambda change: repr(change)[:50])
def test_a_damaged_record_is_named(started, change, message):
    file, record = started
    if isinstance(change, dict):
        record = json.loads(json.dumps(record))
        for name, value in change.items():
            *outer, last = name.split(".")
            inner = record[outer[0]] if outer else record
            inner.pop(last, None)
            inner |= {} if value is ... else {last: value}
        change = json.dumps(record).encode()
    file.with_name("a.progress.json").write_bytes(change)
    with pytest.raises(ValueError, match=message) as error:
        tokenize(open_documents(file), ByteTokenizer(), file.with_name("a"))
    text, name = str(error.value), file.with_name("a.progress.json")
    assert text.startswith(f"{name} is damaged: ")
    assert text.endswith("; remove it to begin anew")
    assert len(text) < 300 + 2 * len(str(name))


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_nothing_is_written_over(tmp_path, end):
    file = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / f"a{end}").write_text("precious")
    with pytest.raises(FileExistsError, match=rf"a\{end} exists already"):
        tokenize(open_documents(file), ByteTokenizer(), tmp_path / "a")
    assert (tmp_path / f"a{end}").read_text() == "precious"


def test_two_at_once_do_not_mix(tmp_path):
    source = open_documents(write_lines(tmp_path / "a.jsonl", TEXTS))

    def again(progress):
        with pytest.raises(BlockingIOError, match=r"a\.bin\.partial is being written by another"):
            tokenize(source, ByteTokenizer(), tmp_path / "a")

    data = tokenize(source, ByteTokenizer(), tmp_path / "a", on_progress=again)
    assert len(data) == len(TEXTS)


def test_nothing_stays_of_a_source_without_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"does not hold any text; 2 files were left out: .*a is"):
        tokenize(open_documents(folder), NoEnd(), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


class NoEnd(ByteTokenizer):
    end_of_document = None


def test_a_text_that_cannot_be_encoded_is_named(tmp_path):
    class Wrong(ByteTokenizer):
        vocab_size = 60

    file = write_lines(tmp_path / "a.jsonl", ["!", "A"])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: the tokenizer gave id 66, outside"):
        tokenize(open_documents(file), Wrong(), tmp_path / "a")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_TASK_CHARACTERS", 2**15)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 2**15)

    def peak(megabytes):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        line = json.dumps({"text": "The quick brown fox. " * 100}) + "\n"
        (folder / "a.jsonl").write_text(line * (megabytes * 240))
        (folder / "b.txt").write_text("The quick brown fox\n" * (megabytes * 25_000))
        source = open_documents(folder)
        tracemalloc.start()
        tokenize(source, ByteTokenizer(), tmp_path / f"out{megabytes}")
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(4) < 1.2 * peak(1)


def test_the_command(tmp_path, capsys):
    file = write_lines(tmp_path / "a.jsonl", TEXTS)
    command = ["tokenize", f"--data={file}", "--tokenizer=byte", "--workers=0"]
    main([*command, f"--out={tmp_path / 'a.bin'}"])
    printed = capsys.readouterr()
    assert f"{len(TEXTS)} documents, " in printed.out
    assert "tokens/s" in printed.err
    expected = write_by_hand(tmp_path / "expected", [by_bytes(text) for text in TEXTS])
    assert contents(tmp_path / "a") == contents(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=nowhere"], "there is no file or folder at nowhere"),
        (["--workers=-1"], "--workers must be at least 0, got -1"),
        (["--tokenizer=geese"], "tokenizer 'geese' is unknown"),
        (["--data=a.bin"], "--data a.bin holds tokens already"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["tokenize", f"--out={tmp_path / 'a'}", *arguments])
    assert message in capsys.readouterr().err


def test_the_command_counts_what_it_leaves_out(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.png").write_bytes(b"\x89PNG\0")
    (folder / "a.txt").write_text("text")
    command = ["tokenize", f"--data={folder}", "--tokenizer=byte", "--workers=0"]
    main([*command, f"--out={tmp_path / 'a'}"])
    printed = capsys.readouterr().err
    assert printed.count("left out: ") == 5
    assert "7 files were left out, which are not text" in printed
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--strict", f"--out={tmp_path / 'b'}"])
    assert "0.png is not a text file: byte 4 is zero" in capsys.readouterr().err
    main([*command, "--strict", "--pattern", "*.txt", "*.md", f"--out={tmp_path / 'c'}"])
    assert Binidx(tmp_path / "c").tokens.tolist() == by_bytes("text")


# The command, which waits for a signal after 30 documents. Background jobs ignore Ctrl-C.
STOPPED = """
import signal
from goose_jax.cli.main import main
from goose_jax.data import BinidxWriter

write = BinidxWriter.write

def write_and_wait(self, *arguments, **options):
    write(self, *arguments, **options)
    if self.written.items == 30:
        print("some are written", flush=True)
        signal.pause()

BinidxWriter.write = write_and_wait
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.slow
def test_a_command_with_processes_goes_on_after_sigkill_and_ctrl_c(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = ["The quick brown fox jumps over the lazy dog. " * 1000 + str(i) for i in range(100)]
    write_lines(folder / "a.jsonl", texts)
    long = "The quick brown fox\njumps over the lazy dog\n" * 60_000  # 2.5 MiB, in pieces
    (folder / "b.txt").write_text(long)
    arguments = ["tokenize", f"--data={folder}", "--tokenizer=byte", f"--out={tmp_path / 'a'}"]
    command = [sys.executable, "-c", STOPPED, *arguments, "--workers=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        ) as process:
            assert process.stdout.readline() == "some are written\n"
            process.send_signal(number)
            assert "Traceback" not in process.communicate()[1]
        assert process.returncode == code
    main([*arguments, "--workers=0"])
    expected = write_by_hand(tmp_path / "expected", [by_bytes(text) for text in [*texts, long]])
    assert contents(tmp_path / "a") == contents(expected)
