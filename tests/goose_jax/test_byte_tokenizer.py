import pytest

from goose_jax.text import ByteTokenizer, StreamingDecoder

TEXTS = [
    "",
    "def f(x):\n    return x\n",
    "line one\r\nline two\rline three\n\r\n",
    "你好、世界。テスト 한국어",
    "🦢👩‍👩‍👧‍👦🏳️‍🌈 é é \u0000\u007f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff",
    "\ufeffbyte order mark, and \ufffd itself",
]
ALL_BYTES = bytes(range(256))


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens == [byte + 1 for byte in text.encode("utf-8")]
    assert tokenizer.decode(tokens) == text


def test_every_byte_round_trips_and_ids_fit_the_vocabulary():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode_bytes(ALL_BYTES)
    assert sorted(tokens) == list(range(1, tokenizer.vocab_size))
    assert tokenizer.decode_bytes(tokens) == ALL_BYTES


def test_end_of_document_is_silent_and_foreign_ids_are_replaced():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 257
    assert tokenizer.end_of_document == 0
    tokens = [ord("a") + 1, 0, ord("b") + 1, 257, -1, 10**9]
    assert tokenizer.decode(tokens) == "ab\ufffd\ufffd\ufffd"


def test_invalid_utf8_becomes_replacement_characters():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode_bytes(b"a\xff\xc3b\xe4\xbd")) == "a\ufffd\ufffdb\ufffd"


def test_half_a_surrogate_pair_is_an_error():
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        ByteTokenizer().encode("\ud83e")


@pytest.mark.parametrize("character", ["é", "你", "🦢"])
def test_incomplete_characters_are_held_back(character):
    tokenizer = ByteTokenizer()
    decoder = StreamingDecoder(tokenizer)
    *first, last = tokenizer.encode(character)
    assert [decoder.push([token]) for token in first] == [""] * len(first)
    assert decoder.push([last]) == character
    assert decoder.finish() == ""
    decoder = StreamingDecoder(tokenizer)
    assert decoder.push(first) == ""
    assert decoder.finish() == "\ufffd"
