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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from goose_jax.chat import ChatSession, Conversation, ReplySettings, load_chat, save_chat
from goose_jax.chat import session as session_module
from goose_jax.chat.prompt import clean, next_turn, think_prefix
from goose_jax.checkpoints import CheckpointMetadata, save_checkpoint
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.cli import chat as chat_module
from goose_jax.config import RWKV7Config
from goose_jax.generation import prefill
from goose_jax.nn import RWKV7, DecodingWeights
from goose_jax.text import ByteTokenizer, TextStop, TextStream, get_tokenizer
from tests.helpers import relative_rms

# One id for each printable character, so that any reply is read again as the same tokens.
VOCABULARY = {1: "\n"} | {i: chr(30 + i) for i in range(2, 97)}
CONFIG = RWKV7Config(vocab_size=97, hidden_size=64, num_layers=1, compute_dtype="float32")
GREEDY = dataclasses.replace(ReplySettings().sampling, temperature=0)
SHORT = ReplySettings(max_new_tokens=8, sampling=GREEDY)
TOLERANCE = 1e-5  # token by token against in parallel, fp32; measured 4.6e-7

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


@pytest.fixture(scope="module")
def model():
    """A model no weight of which is 0, so that its state matters to the reply."""

    @jax.jit
    def noisy():
        leaves, structure = jax.tree.flatten(nnx.state(RWKV7(CONFIG, rngs=nnx.Rngs(0))))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = [0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, list(map(jnp.add, leaves, noise)))

    abstract = nnx.eval_shape(lambda: RWKV7(CONFIG, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), noisy())


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.txt"
    path.write_text("".join(f"{token} {text!r} 1\n" for token, text in VOCABULARY.items()))
    return path


@pytest.fixture
def tokenizer(vocabulary_file):
    return get_tokenizer(vocabulary_file)


def never():
    return False


def say(session, message, stopped=never):
    pieces = []
    ending = session.reply(message, pieces.append, stopped)
    return ending, "".join(pieces)


def check_state(conversation, model, tokenizer):
    """The state has read exactly the conversation's text."""
    expected = prefill(model, [tokenizer.encode(conversation.text)])
    for name in ("time_shift", "wkv", "channel_shift"):
        error = relative_rms(getattr(conversation.state, name), getattr(expected, name))
        assert error < TOLERANCE, name


def test_messages_are_cleaned():
    assert clean(" a\r\nb\rc \n") == "a\nb\nc"
    assert clean("def f():\n\n\n    a\n \t\n\n  b") == "def f():\n    a\n  b"
    assert clean("\n \n") == ""


def test_turns_are_separated_by_one_blank_line():
    assert next_turn("", "Hi") == "User: Hi\n\nAssistant:"
    assert next_turn("", "Hi", system="Be\n\nbrief. ", think=True) == (
        "System: Be\nbrief.\n\nUser: Hi\n\nAssistant: <think"
    )
    for read in ("... 4", "... 4\n", "... 4\n\n"):
        turn = next_turn(read, "a\n\nUser: b", system="late")
        assert read + turn == "... 4\n\nUser: a\nUser: b\n\nAssistant:"
    assert (think_prefix(True), think_prefix(False)) == (" <think", "")


def test_each_turn_reads_what_is_new(model, tokenizer, monkeypatch):
    read, used = [], []

    def noted(weights, prompts, **settings):
        read.append(tokenizer.decode(prompts[0]))
        used.append(weights)
        return generate(weights, prompts, **settings)

    generate = session_module.generate
    monkeypatch.setattr(session_module, "generate", noted)
    session = ChatSession(model, tokenizer, SHORT)
    text = ""
    for message in ("Hi", "Why?", "So"):
        ending, reply = say(session, message)
        assert ending == "length"
        assert len(reply) == 8
        assert read[-1] == next_turn(text, message)
        text += read[-1] + reply
        assert session.conversation.text == text
    # The weights were prepared once, for all replies.
    assert isinstance(used[0], DecodingWeights)
    assert used == [used[0]] * 3
    check_state(session.conversation, model, tokenizer)


def test_the_state_knows_nothing_beyond_a_stop_text(model, tokenizer):
    reply = say(ChatSession(model, tokenizer, SHORT), "Hi")[1]
    session = ChatSession(model, tokenizer, SHORT)
    session.settings = dataclasses.replace(SHORT, stop=("never", reply[2:4]))
    assert say(session, "Hi") == ("end", reply[:2])
    assert session.conversation.text == f"User: Hi\n\nAssistant:{reply[:2]}"
    check_state(session.conversation, model, tokenizer)


def test_the_end_of_a_document_ends_a_reply(model, tokenizer):
    reply = say(ChatSession(model, tokenizer, SHORT), "Hi")[1]
    place = next(i for i in range(1, 8) if reply[i] not in reply[:i])
    tokenizer.end_of_document = tokenizer.encode(reply[place])[0]
    session = ChatSession(model, tokenizer, SHORT)
    assert say(session, "Hi") == ("end", reply[:place])
    check_state(session.conversation, model, tokenizer)


def test_an_interrupted_reply_is_kept_as_far_as_it_was_written(model, tokenizer):
    session = ChatSession(model, tokenizer, SHORT)
    pieces = []
    ending = session.reply("Hi", pieces.append, lambda: True)
    written = "".join(pieces)
    assert ending == "interrupted"
    assert 0 < len(written) <= 4
    assert session.conversation.text == f"User: Hi\n\nAssistant:{written}"
    check_state(session.conversation, model, tokenizer)


def test_a_failed_reply_leaves_the_conversation_as_it_was(model, tokenizer):
    def fail(text):
        raise KeyboardInterrupt

    session = ChatSession(model, tokenizer, SHORT)
    with pytest.raises(ValueError, match="there is no message to reply to again"):
        session.regenerate(fail, never)
    say(session, "Hi")
    before = session.conversation
    for reply in (
        lambda: session.reply("So", fail, never),
        lambda: session.regenerate(fail, never),
    ):
        with pytest.raises(KeyboardInterrupt):
            reply()
        assert session.conversation is before
    session.regenerate(lambda text: None, never)
    assert session.conversation.text == before.text  # greedy


def test_another_reply_to_the_same_message(model, tokenizer):
    sampling = dataclasses.replace(ReplySettings().sampling, top_p=1)
    settings = ReplySettings(max_new_tokens=8, sampling=sampling, seed=2**32 - 1)
    session = ChatSession(model, tokenizer, settings)
    first = say(session, "Hi")[1]
    pieces = []
    assert session.regenerate(pieces.append, never) == "length"
    second = "".join(pieces)
    assert second != first
    assert session.conversation.text == f"User: Hi\n\nAssistant:{second}"
    check_state(session.conversation, model, tokenizer)
    again = ChatSession(model, tokenizer, settings)
    assert say(again, "Hi")[1] == first


def test_half_a_character_is_not_part_of_a_cut_reply():
    goose = ByteTokenizer().encode("a🦢")
    for complete, expected in ((False, "a"), (True, "a\ufffd")):
        stream = TextStream(ByteTokenizer(), [], TextStop(("stop",)))
        assert stream.push(goose[:3]) + stream.finish(complete=complete) == expected


def test_conversations_are_saved_exactly(model, tmp_path):
    path = tmp_path / "a.chat"
    state = prefill(model, [[5, 6, 7]])
    for text in ("System: é\n\n🦢", "replaced"):
        save_chat(path, Conversation(text, state), model)
        loaded = load_chat(path, model)
        assert loaded.text == text
        jax.tree.map(np.testing.assert_array_equal, loaded.state, state)
    half = half_precision(model)
    shifts = jnp.array(np.random.default_rng(0).normal(size=(1, 1, 64)), jnp.bfloat16)
    state = type(state)(time_shift=shifts, wkv=state.wkv, channel_shift=-shifts)
    save_chat(tmp_path / "b.chat", Conversation("b", state), half)
    loaded = load_chat(tmp_path / "b.chat", half).state
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    assert loaded.time_shift.dtype == jnp.bfloat16
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.chat", "b.chat"]


def half_precision(model):
    config = RWKV7Config(**model.config.to_dict() | {"compute_dtype": "bfloat16"})
    abstract = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(abstract)[0], nnx.state(model, nnx.Param))


def test_what_is_no_saved_conversation_is_named(model, tmp_path):
    path = tmp_path / "a.chat"
    with pytest.raises(ValueError, match="there is nothing to save yet"):
        save_chat(path, Conversation(), model)
    conversation = Conversation("a", prefill(model, [[5]]))
    with pytest.raises(FileNotFoundError, match=r"a\.chat"):
        load_chat(path, model)
    with pytest.raises(OSError, match="nowhere"):
        save_chat(tmp_path / "nowhere" / "a.chat", conversation, model)
    path.write_text("a letter, for example, that must not be lost")
    with pytest.raises(ValueError, match=r"a\.chat is no saved conversation: "):
        load_chat(path, model)
    with pytest.raises(FileExistsError, match=r"a\.chat is no saved conversation, and is not wri"):
        save_chat(path, conversation, model)
    assert path.read_text().startswith("a letter")
    weights = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"wkv": np.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"model\.safetensors is no saved conversation of goose"):
        load_chat(weights, model)
    path.unlink()
    save_chat(path, conversation, model)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.chat is no saved conversation: "):
        load_chat(path, model)


def test_a_conversation_of_another_model_is_refused(model, tmp_path):
    path = tmp_path / "a.chat"
    save_chat(path, Conversation("a", prefill(model, [[5]])), model)
    graphdef, params = nnx.split(model)
    other = nnx.merge(graphdef, jax.tree.map(lambda x: x * 1.001, params))
    assert fingerprint(other) != fingerprint(model) == fingerprint(nnx.merge(graphdef, params))
    for wrong in (other, half_precision(model)):
        with pytest.raises(ValueError, match=r"saved with another model, or another --dtype of it"):
            load_chat(path, wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1"),
        ({"seed": -1}, r"seed must lie in 0\.\.2\*\*32-1, got -1"),
        ({"stop": ("",)}, "stop must not be an empty text"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ReplySettings(**wrong)


def test_settings_change_by_name():
    settings = SHORT
    for line in ("temperature 0.5", "top_k 3", "think on", "stop END", "system Be brief."):
        settings = chat_module._changed(settings, line)
    sampling = dataclasses.replace(GREEDY, temperature=0.5, top_k=3)
    assert (settings.sampling, settings.think) == (sampling, True)
    assert (settings.stop, settings.system) == (("END",), "Be brief.")
    assert chat_module._changed(settings, "stop").stop == ()
    for line, message in (
        ("hotness 3", "no setting 'hotness'; give one of system, think, max_new"),
        ("top_k 1.5", "top_k must be of type int, got '1.5'"),
        ("temperature", "temperature must be of type float, got ''"),
        ("think maybe", "think must be on or off, got 'maybe'"),
        ("top_p 2", r"top_p must be in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            chat_module._changed(settings, line)


def test_messages_may_come_through_a_pipe(
    checkpoint, vocabulary_file, model, tokenizer, capsys, monkeypatch, tmp_path
):
    settings = dataclasses.replace(SHORT, think=True)
    expected = ChatSession(model, tokenizer, settings)
    first = say(expected, "Hi")[1]
    save_chat(tmp_path / "a.chat", expected.conversation, model)
    second = say(expected, "a\nb")[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n   \na\\\nb\n"))
    chat_module.chat(checkpoint, settings, tokenizer=str(vocabulary_file), load=tmp_path / "a.chat")
    output = capsys.readouterr().out
    assert f"\nAssistant: <think{second}\n[stopped: max_new_tokens 8]\n\nUser: \n" in output
    assert f" <think{first}\n\nUser: a\nb\n\nAssistant: <think" in expected.conversation.text


def test_a_second_ctrl_c_takes_the_message_back(checkpoint, vocabulary_file, capsys, monkeypatch):
    def interrupted_twice(session, message, write, stopped):
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)  # until the interruption arrives

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    monkeypatch.setattr(ChatSession, "reply", interrupted_twice)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/regenerate\n/history\n"))
    chat_module.chat(checkpoint, SHORT, tokenizer=str(vocabulary_file))
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

        Python sees one that comes just before `input` begins to wait only at the next key.
        """
        for _ in range(30):
            self.send("\x03")
            if self._read(2) and re.search(pattern, self._seen):
                return
        raise AssertionError(f"no {pattern!r} in {self._seen!r}")

    def _read(self, seconds):
        """Takes in what the command has written, if it writes in time."""
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        text = self._decoder.decode(os.read(self._master, 4096))
        self._seen += text.replace("\r", "")
        return True

    def wait_for(self, pattern, seconds=60):
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
        self.process.wait(10)
        os.close(self._master)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(path, model, CheckpointMetadata(tokenizer=None))
    return path


@pytest.fixture
def terminal(checkpoint, vocabulary_file):
    flags = ["--tokenizer", str(vocabulary_file), "--max-new-tokens", "8", "--temperature", "0"]
    terminal = PseudoTerminal("chat", str(checkpoint), *flags)
    yield terminal
    terminal.close()


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
    check_state(saved, model, tokenizer)

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
    check_state(saved, model, tokenizer)
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
    assert terminal.process.wait(30) == 0
