import functools

import pytest

from goose_jax.text import ByteTokenizer, TextStop, TextStream


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", (), "one two three"),
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "ne t"), "o"),
        ("one two thre", ("three",), "one two thre"),
        ("aaab", ("aab",), "a"),
        ("ends\n\nUser: no", ("\n\nUser:",), "ends"),
    ],
)
def test_text_stops(text, stops, expected, size):
    ending = TextStop(stops)
    pieces = [ending.push(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(pieces) + ending.finish() == expected
    assert ending.reached == (len(expected) < len(text))


def test_text_that_may_be_a_stop_is_held_back():
    push = functools.partial(TextStop.push, TextStop(["\n\n"]))
    assert [push("a\n"), push("b"), push("\n"), push("\n"), push("c")] == ["a", "\nb", "", "", ""]


def test_half_a_character_is_not_part_of_a_cut_reply():
    goose = ByteTokenizer().encode("a🦢")
    for complete, expected in ((False, "a"), (True, "a\ufffd")):
        stream = TextStream(ByteTokenizer(), [], TextStop(("stop",)))
        assert stream.push(goose[:3]) + stream.finish(complete=complete) == expected


def test_a_stream_continues_its_prompt_up_to_a_stop_text():
    encode = ByteTokenizer().encode
    goose = encode("🦢 flies")
    stream = TextStream(ByteTokenizer(), encode("a") + goose[:2], TextStop(["ie"]))
    assert [stream.push(goose[2:6]), stream.stopped] == ["🦢 f", False]
    assert [stream.push(goose[6:9]), stream.push(goose[9:]), stream.finish()] == ["l", "", ""]
    assert stream.stopped
