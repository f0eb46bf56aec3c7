"""`goose-jax chat`: its commands, its input and a session on a terminal."""

import codecs
import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from flax import nnx

from goose_jax.chat import SAMPLING_PRESETS, ChatSession, ReplySettings, load_chat, save_chat
from goose_jax.chat.prompt import next_turn
from goose_jax.checkpoints import CheckpointMetadata, save_checkpoint
from goose_jax.cli import chat as command
from tests.goose_jax.conversations import (
    GREEDY,
    SHORT,
    VOCABULARY,
    chat_model,
    chat_tokenizer,
    check_state,
    say,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


@pytest.fixture
def model():
    return chat_model()


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.txt"
    path.write_text("".join(f"{token} {text!r} 1\n" for token, text in VOCABULARY.items()))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(path, chat_model(), CheckpointMetadata(tokenizer=None))
    return path


def test_settings_change_by_name():
    settings = SHORT
    for line in ("temperature 0.5", "top_k 3", "think on", "stop END", "system Be brief."):
        settings = command._changed(settings, line)
    sampling = dataclasses.replace(GREEDY, temperature=0.5, top_k=3)
    assert (settings.sampling, settings.think) == (sampling, "on")
    assert (settings.stop, settings.system) == (("END",), "Be brief.")
    assert command._changed(settings, "stop").stop == ()
    assert command._changed(settings, "preset chat").sampling == SAMPLING_PRESETS["chat"]
    assert command._changed(settings, "temperature_first on").sampling.temperature_first
    for line, message in (
        ("hotness 3", "no setting 'hotness'; give one of system, think, max_new"),
        ("top_k 1.5", "top_k must be of type int, got '1.5'"),
        ("temperature", "temperature must be of type float, got ''"),
        ("think maybe", "think must be one of none, fast, .*, got 'maybe'"),
        ("temperature_first maybe", "temperature_first must be on or off, got 'maybe'"),
        ("preset loud", "preset must be one of demo, think, .*, got 'loud'"),
        ("top_p 2", r"top_p must be in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            command._changed(settings, line)


@pytest.mark.slow
def test_messages_may_come_through_a_pipe(
    checkpoint, vocabulary_file, model, tokenizer, capsys, monkeypatch, tmp_path
):
    settings = dataclasses.replace(SHORT, think="on")
    expected = ChatSession(model, tokenizer, settings)
    first = say(expected, "Hi")[1]
    save_chat(tmp_path / "a.chat", expected.conversation, model)
    second = say(expected, "a\nb")[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n   \na\\\nb\n"))
    command.chat(checkpoint, settings, tokenizer=str(vocabulary_file), load=tmp_path / "a.chat")
    output = capsys.readouterr().out
    assert f"\nAssistant: <think{second}\n[stopped: max_new_tokens 8]\n\nUser: \n" in output
    assert f" <think{first}\n\nUser: a\nb\n\nAssistant: <think" in expected.conversation.text


def test_calls_of_functions_are_shown_and_answered(
    checkpoint, vocabulary_file, model, capsys, monkeypatch, tmp_path
):
    replies = iter(['\n{"name":"f","arguments":{"a":"é"}}\n```', " It is 7."])
    messages = []

    def reply(session, message, write, stopped):
        messages.append(message)
        write(text := next(replies))
        session.last_reply = " ```json" + text if text.startswith("\n") else text
        return "end"

    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}]')
    monkeypatch.setattr(ChatSession, "reply", reply)
    monkeypatch.setattr(sys, "stdin", io.StringIO('Hi\n/output\n/output {"b": 7}\n'))
    command.chat(checkpoint, SHORT, tokenizer=str(vocabulary_file), tools=tools)
    output = capsys.readouterr().out
    assert "\nAssistant: ```json\n{" in output
    assert '\n[calls f with {"a": "é"}]\n[/output TEXT gives the model what' in output
    assert "error: usage: /output TEXT" in output
    assert messages == ["Hi", 'Function output:\n{"b": 7}']
    for text, message in (("{", "is not JSON"), ("{}", "must hold a list"), ("[3]", r"tools\[0\]")):
        tools.write_text(text)
        with pytest.raises(ValueError, match=message):
            command.chat(checkpoint, SHORT, tokenizer=str(vocabulary_file), tools=tools)


def test_a_preset_takes_the_place_of_the_settings_of_sampling(
    checkpoint, vocabulary_file, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set\n"))
    command.chat(checkpoint, tokenizer=str(vocabulary_file), preset="creative")
    assert "  temperature 0.6\n  top_k 0\n  top_p 0.7\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give either --preset chat or settings of sampling"):
        command.chat(checkpoint, SHORT, tokenizer=str(vocabulary_file), preset="chat")
    assert ReplySettings().think == "none"


def test_logits_that_are_not_finite_are_an_error(
    checkpoint, vocabulary_file, model, capsys, monkeypatch
):
    broken = nnx.clone(model)
    broken.head[...] = broken.head[...].at[3, 5].set(jnp.inf)
    found = (broken, chat_tokenizer())
    monkeypatch.setattr(command, "load_model_and_tokenizer", lambda *_, **__: found)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/history\n"))
    command.chat(checkpoint, SHORT)
    output = capsys.readouterr().out
    assert "\nerror: the model gave NaN or infinite logits for row 0: the parameter head " in output
    assert "\n[this message and its reply are forgotten]\n" in output
    assert output.endswith("\nUser: \nUser: \n")  # the conversation is still empty


def test_a_second_ctrl_c_takes_the_message_back(checkpoint, vocabulary_file, capsys, monkeypatch):
    def interrupted_twice(session, message, write, stopped):
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)  # until the interruption arrives

    # Background jobs ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(ChatSession, "reply", interrupted_twice)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/regenerate\n/history\n"))
    try:
        command.chat(checkpoint, SHORT, tokenizer=str(vocabulary_file))
    finally:
        signal.signal(signal.SIGINT, before)
    output = capsys.readouterr().out
    assert "[stopped at once: this message and its reply are forgotten]" in output
    assert "User: error: there is no message to reply to again\nUser: \nUser: \n" in output


class PseudoTerminal:
    """A goose-jax command whose terminal is this object."""

    def __init__(self, *arguments):
        self._master, slave = pty.openpty()
        program = (  # a background job of a shell would inherit that Ctrl-C is ignored
            "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "os.login_tty(0); from goose_jax.cli.main import main; main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "dumb", "JAX_PLATFORMS": "cpu"},
        )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._seen = ""

    def send(self, text):
        os.write(self._master, text.encode())

    def interrupt(self, pattern):
        """Presses Ctrl-C until the pattern is seen.

        Python sees one that comes just before `input` begins to wait only at the next key. It is
        pressed again only when nothing comes any more: each one that is seen gives an answer.
        """
        for _ in range(30):
            self.send("\x03")
            while self._read(5):
                if re.search(pattern, self._seen):
                    return
        raise AssertionError(f"no {pattern!r} in {self._seen!r}")

    def _read(self, seconds):
        """Takes in what the command has written, if it writes in time."""
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        text = self._decoder.decode(os.read(self._master, 4096))
        self._seen += text.replace("\r", "")
        return True

    def wait_for(self, pattern, seconds=300):
        """The text up to the end of the pattern, which is taken away."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self._seen)):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self._seen!r}"
            assert self._read(left), f"only {self._seen!r}"
        text, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return text

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(checkpoint, vocabulary_file):
    flags = ["--tokenizer", str(vocabulary_file), "--max-new-tokens", "8", "--temperature", "0"]
    terminal = PseudoTerminal("chat", str(checkpoint), *flags)
    yield terminal
    terminal.close()


@pytest.mark.slow
def test_a_session_on_a_terminal(terminal, model, tokenizer, tmp_path):
    expected = ChatSession(model, tokenizer, SHORT)
    file = tmp_path / "talk.chat"

    def ask(line):
        terminal.send(line + "\n")
        return terminal.wait_for("User: ")

    terminal.wait_for("/help lists the commands.\nUser: ")
    for message in ("Hi", "Why?"):
        assert f"\nAssistant:{say(expected, message)[1]}\n[stopped: max_new" in ask(message)
    assert "max_new_tokens 8]" in ask("/regenerate")
    terminal.send("/history\n")
    terminal.wait_for(re.escape(expected.conversation.text) + "\nUser: ")
    assert f"[saved in {file}]" in ask(f"/save {file}")
    saved = load_chat(file, model)
    assert saved.text == expected.conversation.text
    check_state(saved)

    assert "[forgotten]" in ask("/reset")
    assert f"\nAssistant:{say(ChatSession(model, tokenizer, SHORT), 'Hi')[1]}\n" in ask("Hi")
    assert "error: [Errno 21] Is a directory" in ask(f"/load {tmp_path}")
    assert f"[loaded: {len(saved.text)} characters]" in ask(f"/load {file}")
    assert f"\nAssistant:{say(expected, 'So')[1]}\n" in ask("So")

    ask("/set max_new_tokens 1000000")
    terminal.send("Go\n")
    assert terminal.wait_for("(?s)Assistant:.{20}").count("Assistant:") == 1
    terminal.send("\x03")
    assert "\n[interrupted]\n" in terminal.wait_for("User: ")
    ask(f"/save {file}")
    saved = load_chat(file, model)
    before = expected.conversation.text + next_turn(expected.conversation.text, "Go")
    assert saved.text.startswith(before)
    assert 20 <= len(saved.text) - len(before) < 100_000
    check_state(saved)
    ask("/set max_new_tokens 8")
    assert "\nAssistant:" in ask("Go on")

    assert "error: there is no command /halp; /help lists them" in ask("/halp")
    assert "error: usage: /save FILE" in ask("/save")
    assert "error: usage: /reset" in ask("/reset now")
    assert "/regenerate" in ask("/help")
    assert "error: the vocabulary has no token for byte b'\\xc3'" in ask("é")
    assert "error: top_p must be in [0, 1], got 2.0" in ask("/set top_p 2")
    terminal.send("half a line")
    terminal.wait_for("half a line")
    terminal.interrupt(re.escape("[Ctrl-D or /quit ends the session]"))
    # Before it asks for a line, the terminal takes lines in by itself, and Ctrl-D is no key yet.
    terminal.wait_for(r"ends the session\]\nUser: ")
    terminal.send("\x04")
    assert terminal.process.wait(300) == 0
