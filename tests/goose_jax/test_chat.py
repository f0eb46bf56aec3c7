"""`goose_jax.chat`: conversations and the files that they are saved in."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from goose_jax.chat import (
    SAMPLING_PRESETS,
    ChatSession,
    Conversation,
    ReplySettings,
    ToolCall,
    load_chat,
    parse_tool_calls,
    save_chat,
    split_thinking,
    tool_output,
)
from goose_jax.chat import session as session_module
from goose_jax.chat.prompt import STOPS, THINKING, clean, next_turn, reply_prefix
from goose_jax.chat.tools import tools_text
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.config import RWKV7Config
from goose_jax.generation import generate, prefill
from goose_jax.nn import RWKV7, DecodingWeights
from goose_jax.text import VocabularyTokenizer
from tests.goose_jax.conversations import (
    GREEDY,
    SHORT,
    VOCABULARY,
    chat_model,
    chat_tokenizer,
    check_state,
    never,
    say,
)

GREEDY_8 = {"max_new_tokens": 8, "sampling": GREEDY, "block_size": 4}

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


@pytest.fixture
def model():
    return chat_model()


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


def test_messages_are_cleaned():
    assert clean(" a\r\nb\rc \n") == "a\nb\nc"
    assert clean("def f():\n\n\n    a\n \t\n\n  b") == "def f():\n    a\n  b"
    assert clean("\n \n") == ""


def test_turns_are_separated_by_one_blank_line():
    assert next_turn("", "Hi") == "User: Hi\n\nAssistant:"
    assert next_turn("", "Hi", system="Be\n\nbrief. ", think="on") == (
        "System: Be\nbrief.\n\nUser: Hi\n\nAssistant: <think"
    )
    for read in ("... 4", "... 4\n", "... 4\n\n"):
        turn = next_turn(read, "a\n\nUser: b", system="late")
        assert read + turn == "... 4\n\nUser: a\nUser: b\n\nAssistant:"


@pytest.mark.parametrize(
    ("think", "prompt"),  # as RWKV7-G1x-templates.txt in RWKV-LM has them
    [
        ("none", "User: xxx\n\nAssistant:"),
        ("on", "User: xxx\n\nAssistant: <think"),
        ("closed", "User: xxx\n\nAssistant: <think>\n</think"),
        ("fast", "User: xxx\n\nAssistant: <think></think"),
        ("medium", "User: xxx (think)\n\nAssistant: <think"),
        ("short", "User: xxx (think a bit)\n\nAssistant: <think"),
        ("long", "User: xxx (think a lot)\n\nAssistant: <think"),
    ],
)
def test_thinking_has_the_official_templates(think, prompt):
    assert next_turn("", "xxx ", think=think) == prompt
    assert prompt.endswith("Assistant:" + reply_prefix(think))
    assert len(THINKING) == 7


# The example of RWKV7-G1x-templates.txt in RWKV-LM.
TOOLS_PROMPT = (
    'System: Tools:\n[\n{"name":"find_free_slots","description":"Find free calendar slots",'
    '"arguments":{"date":{"type":"string"},"duration_minutes":{"type":"integer"},'
    '"time_window":{"type":"string"}}},\n{"name":"create_calendar_event","description":'
    '"Create a calendar event","arguments":{"title":{"type":"string"},"start_time":'
    '{"type":"string"},"end_time":{"type":"string"},"attendees":{"type":"array","items":'
    '{"type":"string"}}}}\n]\nReturn only a JSON function call.\n\nUser: Schedule a 30-minute '
    "sync with Bob on 2026-05-08 afternoon.\n\nAssistant: ```json"
)
CALL = (
    '\n{"name":"find_free_slots","arguments":{"date":"2026-05-08","duration_minutes":30,'
    '"time_window":"afternoon"}}\n```'
)
AFTER_CALL = (
    '\n\nUser: Function output:\n{"free_slots":[{"start":"2026-05-08T15:00:00+09:00",'
    '"end":"2026-05-08T15:30:00+09:00"}],"bob_email":"bob@example.com"}\n\nAssistant: ```json'
)
STRING = {"type": "string"}
TOOLS = [
    {
        "name": "find_free_slots",
        "description": "Find free calendar slots",
        "arguments": {
            "date": STRING,
            "duration_minutes": {"type": "integer"},
            "time_window": STRING,
        },
    },
    {
        "type": "function",
        "function": {
            "name": "create_calendar_event",
            "description": "Create a calendar event",
            "parameters": {
                "type": "object",
                "properties": {
                    "title": STRING,
                    "start_time": STRING,
                    "end_time": STRING,
                    "attendees": {"type": "array", "items": STRING},
                },
            },
        },
    },
]


def test_function_calls_have_the_official_template():
    message = "Schedule a 30-minute sync with Bob on 2026-05-08 afternoon."
    assert next_turn("", message, tools=TOOLS) == TOOLS_PROMPT
    slot = {"start": "2026-05-08T15:00:00+09:00", "end": "2026-05-08T15:30:00+09:00"}
    output = tool_output({"free_slots": [slot], "bob_email": "bob@example.com"})
    assert next_turn(TOOLS_PROMPT + CALL, output, tools=TOOLS) == AFTER_CALL
    assert parse_tool_calls(reply_prefix("none", calls=True) + CALL) == [
        ToolCall(
            "find_free_slots",
            {"date": "2026-05-08", "duration_minutes": 30, "time_window": "afternoon"},
        )
    ]
    thinking = next_turn("", message, tools=TOOLS, think="on", system="Be\n\nbrief.")
    assert thinking.startswith("System: Be\nbrief.\nTools:\n[\n{")
    assert thinking.endswith("\n\nAssistant: <think")
    required = tools_text([{"name": "é", "parameters": {"required": ["a"]}}])
    assert '\n{"name":"é","arguments":{},"required":["a"]}\n' in required
    assert tool_output("plain") == "Function output:\nplain"


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ("Fine, thanks.", []),
        ('{"name": "f"}', [ToolCall("f", {})]),
        ('```json\n[{"name": "f"}, {"name": "g"}]\n```', [ToolCall("f", {}), ToolCall("g", {})]),
        ('Here:\n```json\n{"name": "f"}```\nand\n```\n{"name": "g"}\n```\nDone.', None),
        ('```json\n{"name": "f", "arguments": {"a": "```\\n"}}', [ToolCall("f", {"a": "```\n"})]),
        ('```python\n{"name": 1}\n```\nso\n```\nx = 1\n```\n', []),
    ],
)
def test_calls_are_found_in_answers(answer, calls):
    expected = [ToolCall("f", {}), ToolCall("g", {})] if calls is None else calls
    assert parse_tool_calls(answer) == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (" ```json", "the model's call is not JSON: Expecting value"),
        ('```json\n{"name": "f", "argu', "the model's call is not JSON: .*argu"),
        ("[" * 100_000, "the model's call is not JSON: .*recursion"),
        ('```json\n{"name": "f"} or\n```', "text follows the model's call: ' or"),
        ('{"name": "f"} or', "text follows the model's call: ' or"),
        ("```json\n17\n```", "a call must have a name and an object of arguments, got 17"),
        ('{"name": ""}', "a call must have a name"),
        ('{"name": "f", "arguments": [1]}', "a call must have a name and an object of arguments"),
    ],
)
def test_wrong_calls_are_named(answer, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_tool_calls(answer)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (3, r"tools\[1\] must be an object with a name, got 3"),
        ({"function": {"name": 3}}, r"tools\[1\] must be an object with a name"),
        ({"name": "g", "parameters": 3}, r"tools\[1\] must have an object as parameters, got 3"),
        ({"name": "g", "arguments": [3]}, r"tools\[1\] must have an object as arguments"),
        ({"name": "g", "arguments": {"a": {1}}}, "JSON cannot hold .*set"),
    ],
)
def test_wrong_tools_are_named(model, tokenizer, tool, message):
    with pytest.raises(ValueError, match=message):
        ChatSession(model, tokenizer, SHORT, tools=[{"name": "f"}, tool])


def test_thoughts_are_divided_from_the_answer():
    assert split_thinking(" 4") == ("", "4")
    assert split_thinking(" <think></think>\n4\n") == ("", "4")
    assert split_thinking(" <think>\nOh.\n\n2 + 2\n</think>\n\n4") == ("Oh.\n\n2 + 2", "4")
    assert split_thinking(" <think> 2 +") == ("2 +", "")
    assert split_thinking(" <think") == ("", "<think")


@pytest.mark.slow
def test_a_reply_may_be_begun_as_a_call(model, tokenizer):
    session = ChatSession(model, tokenizer, SHORT, tools=[{"name": "f"}])
    assert session.last_reply == ""
    reply = say(session, "Hi")[1]
    assert session.last_reply == " ```json" + reply
    assert session.conversation.text == next_turn("", "Hi", tools=[{"name": "f"}]) + reply
    check_state(session.conversation)
    session.tools = ()
    session.settings = dataclasses.replace(SHORT, think="fast")
    reply = say(session, "So")[1]
    assert session.last_reply == " <think></think" + reply
    session.reset()
    assert session.last_reply == ""


@pytest.mark.parametrize("stop", STOPS)
def test_the_turn_of_somebody_else_ends_a_reply(model, tokenizer, stop):
    prompt = tokenizer.encode(next_turn("", "Hi"))
    reply = generate(model, [prompt], **GREEDY_8).sequences[0]
    place = next(i for i in range(1, 8) if reply[i] not in [*prompt, *reply[:i]])
    tokenizer = with_bytes({reply[place]: stop.encode()})
    kept = tokenizer.decode(reply[:place])
    session = ChatSession(model, tokenizer, SHORT)
    assert say(session, "Hi") == ("end", kept)
    check_state(session.conversation, tokenizer)


def test_presets_are_those_of_the_sources():
    values = {
        name: (c.temperature, c.top_p, c.top_k, c.presence_penalty, c.frequency_penalty)
        for name, c in SAMPLING_PRESETS.items()
    }
    assert values == {
        "demo": (1, 0.3, 0, 0.5, 0.5),
        "think": (1, 0.5, 100, 0, 0),
        "chat": (1, 0.5, 0, 2, 0.1),
        "creative": (0.6, 0.7, 0, 2, 0.2),
        "precise": (0.3, 0.3, 0, 0, 0),
        "tools": (0, 1, 0, 0, 0),
    }
    decays = [SAMPLING_PRESETS[name].penalty_decay for name in ("demo", "think", "chat")]
    assert decays == [0.996, 0.997, 0.99]
    assert not any(c.temperature_first for c in SAMPLING_PRESETS.values())
    assert ReplySettings().sampling == SAMPLING_PRESETS["demo"]


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
    check_state(session.conversation)


def test_the_state_knows_nothing_beyond_a_stop_text(model, tokenizer):
    reply = say(ChatSession(model, tokenizer, SHORT), "Hi")[1]
    session = ChatSession(model, tokenizer, SHORT)
    session.settings = dataclasses.replace(SHORT, stop=("never", reply[2:4]))
    assert say(session, "Hi") == ("end", reply[:2])
    assert session.conversation.text == f"User: Hi\n\nAssistant:{reply[:2]}"
    check_state(session.conversation)


def test_the_end_of_a_document_ends_a_reply(model, tokenizer):
    reply = say(ChatSession(model, tokenizer, SHORT), "Hi")[1]
    place = next(i for i in range(1, 8) if reply[i] not in reply[:i])
    tokenizer.end_of_document = tokenizer.encode(reply[place])[0]
    session = ChatSession(model, tokenizer, SHORT)
    assert say(session, "Hi") == ("end", reply[:place])
    check_state(session.conversation)


def test_an_interrupted_reply_is_kept_as_far_as_it_was_written(model, tokenizer):
    session = ChatSession(model, tokenizer, SHORT)
    pieces = []
    ending = session.reply("Hi", pieces.append, lambda: True)
    written = "".join(pieces)
    assert ending == "interrupted"
    assert 0 < len(written) <= 4
    assert session.conversation.text == f"User: Hi\n\nAssistant:{written}"
    check_state(session.conversation)


def with_bytes(changes):
    """The tokenizer of the conversations, with other bytes for some ids; None takes an id away."""
    vocabulary = {token: text.encode() for token, text in VOCABULARY.items()} | changes
    known = {token: data for token, data in vocabulary.items() if data is not None}
    return VocabularyTokenizer(known, vocab_size=97)


@pytest.mark.parametrize(
    ("place", "data", "ending"),
    [
        (1, b"\xff", "length"),  # never valid
        (1, b"\xf0\x9f\xa6", "length"),  # the rest of the character does not come
        (1, None, "length"),  # an unknown id
        (7, b"\xf0\x9f\xa6", "length"),  # the limit is inside of a character
        (7, b"\xff", "length"),
        (3, b"\xf0\x9f\xa6", "interrupted"),
        (3, b"\xf0\x9f\xa6", "end"),
    ],
)
def test_the_state_has_read_the_text_where_a_reply_is_not_utf_8(
    model, tokenizer, place, data, ending
):
    prompt = tokenizer.encode(next_turn("", "Hi"))
    reply = generate(model, [prompt], **GREEDY_8).sequences[0]
    # The ids of the prompt keep their bytes, so the model writes the same ids.
    assert reply[place] not in prompt
    spare = next(i for i in range(50, 97) if i not in prompt + reply)
    tokenizer = with_bytes({spare: "\ufffd".encode(), reply[place]: data})
    length = 8
    if ending == "end":
        tokenizer.end_of_document, length = reply[place + 1], place + 1
    elif ending == "interrupted":
        length = 4
    data = b"".join(tokenizer.decode_bytes([token]) for token in reply[:length])
    if ending == "end" or place < length - 1 or data.endswith(b"\xff"):
        expected = data.decode(errors="replace")
    else:
        expected = data.decode(errors="ignore")
    session = ChatSession(model, tokenizer, SHORT)
    stopped = (lambda: True) if ending == "interrupted" else never
    assert say(session, "Hi", stopped) == (ending, expected)
    assert session.conversation.text == next_turn("", "Hi") + expected
    check_state(session.conversation, tokenizer)


def test_what_the_vocabulary_cannot_spell_is_left_out_of_a_reply(model, tokenizer):
    prompt = tokenizer.encode(next_turn("", "Hi"))
    reply = generate(model, [prompt], **GREEDY_8).sequences[0]
    assert reply[1] not in prompt
    for data in (None, b"\xff"):
        tokenizer = with_bytes({reply[1]: data})
        with pytest.raises(ValueError, match="the vocabulary has no token for byte"):
            tokenizer.encode("\ufffd")
        session = ChatSession(model, tokenizer, SHORT)
        expected = tokenizer.decode([token for token in reply if token != reply[1]])
        assert say(session, "Hi") == ("length", expected)
        check_state(session.conversation, tokenizer)


class SpaceTokenizer(VocabularyTokenizer):
    """Adds a space before each text that it encodes, as some files `tokenizer.json` say."""

    leading_space = True

    def encode(self, text):
        return super().encode(" " + text)

    def decode(self, tokens):
        return super().decode(tokens).removeprefix(" ")


def test_a_space_before_each_text_is_read_only_at_the_beginning(model):
    tokenizer = SpaceTokenizer({token: text.encode() for token, text in VOCABULARY.items()})
    session = ChatSession(model, tokenizer, SHORT)
    text = next_turn("", "Hi") + say(session, "Hi")[1]
    after_one_turn = session.conversation
    reply = say(session, "Why?")[1]
    check_state(session.conversation, tokenizer)
    session.conversation = after_one_turn
    session.settings = dataclasses.replace(SHORT, stop=(reply[3:5],))
    assert say(session, "Why?") == ("end", reply[:3])
    assert session.conversation.text == text + next_turn(text, "Why?") + reply[:3]
    check_state(session.conversation, tokenizer)


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
    check_state(session.conversation)
    again = ChatSession(model, tokenizer, settings)
    assert say(again, "Hi")[1] == first


@pytest.mark.slow
def test_conversations_are_saved_exactly(model, tmp_path):
    path = tmp_path / "a.chat"
    state = prefill(model, [[5, 6, 7]])
    for text in ("System: é\n\n🦢", "replaced"):
        save_chat(path, Conversation(text, state), model)
        loaded = load_chat(path, model)
        assert loaded.text == text
        chex.assert_trees_all_equal(loaded.state, state)
    half = half_precision(model)
    shifts = jnp.array(np.random.default_rng(0).normal(size=(1, 1, 64)), jnp.bfloat16)
    state = type(state)(time_shift=shifts, wkv=state.wkv, channel_shift=-shifts)
    save_chat(tmp_path / "b.chat", Conversation("b", state), half)
    loaded = load_chat(tmp_path / "b.chat", half).state
    chex.assert_trees_all_equal(loaded, state)
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
    safetensors.numpy.save_file({}, path, {"format": "goose-jax chat 1"})
    with pytest.raises(ValueError, match=r"of goose-jax \(format 'goose-jax chat 2'\)"):
        load_chat(path, model)
    save_chat(path, conversation, model)  # replaces a conversation of an older format
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
        ({"think": "hard"}, "think must be one of none, fast, .* long, got 'hard'"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ReplySettings(**wrong)
