import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from goose_jax.text import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    StreamingDecoder,
    VocabularyTokenizer,
    get_tokenizer,
    read_vocabulary,
)
from goose_jax.text.vocabulary import world_tokenizer

TEXTS = [
    "",
    "Today is a beautiful day. 今天是美好的一天。",
    "日本語のテキスト、한국어 텍스트, 繁體中文",
    "🦢👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 é \u0000\u007f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff",
    "def f(x):\n\tif x:\n        return {'a': [1, 2.5e-3]}  # 注释\n\n\nclass A(B): ...\r\n",
    " " * 300 + "\n" * 20 + "\t\t\t \n \u00a0\u3000 end   ",
    " one space before",
    "\ufeffbyte order mark, and \ufffd itself",
]
SEQUENCES = 1700  # of random ids for each of six tokenizers: 10,200
ROOT = Path(__file__).parents[2]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train(tokenizer, special, alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, ["<|endoftext|>", "<|pad|>"], pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_tokens(["        ", "説明"])
    return tokenizer


def byte_fallback():
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return train(tokenizer, ["<unk>", "<s>", "</s>"], ["▁", "a"])


def with_byte_tokens(tokenizer):
    """The tokenizer with plain tokens for all bytes, as files with this decoder have them."""
    fields = json.loads(tokenizer.to_str())
    vocabulary = fields["model"]["vocab"]
    start = max(vocabulary.values()) + 1
    vocabulary |= {name: start + byte for byte, name in enumerate(BYTES)}
    return tokenizers.Tokenizer.from_str(json.dumps(fields))


def metaspace():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return train(tokenizer, ["<eos>"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "small.txt").write_bytes(
        b"".join(b"%d %r 1\n" % (byte + 5, bytes([byte])) for byte in range(256))
        + "300 '日本' 6\r\n400 b'\\xe6\\x97' 2\n777 '    ' 4\n500 \"it's\" 4".encode()
    )
    for name in ("byte_level", "byte_fallback", "metaspace"):
        tokenizer = globals()[name]()
        tokenizer = with_byte_tokens(tokenizer) if name == "byte_fallback" else tokenizer
        tokenizer.save(str(folder / f"{name}.json"))
    return folder


@pytest.fixture(scope="module")
def world():
    return get_tokenizer("world")


NAMES = ["byte", "world", "small.txt", "byte_level.json", "byte_fallback.json", "metaspace.json"]


@pytest.fixture
def tokenizer(request, folder, world):
    name = request.param
    known = {"byte": ByteTokenizer(), "world": world}
    return known[name] if name in known else get_tokenizer(folder / name)


each_tokenizer = pytest.mark.parametrize("tokenizer", NAMES, indirect=True)


@each_tokenizer
def test_a_stream_equals_decoding_at_once(tokenizer):
    generator = random.Random(0)
    end = tokenizer.vocab_size
    near = range(-2, end + 20)
    pieces_of_characters = [t for t in range(end) if not is_utf8(tokenizer.decode_bytes([t]))]
    for _ in range(SEQUENCES):
        kinds = (near, range(end), pieces_of_characters or near, (-(10**12), 2**31, 2**64))
        weights = generator.choice([(1, 1, 1, 0), (1, 1, 8, 1), (0, 1, 0, 0)])
        tokens = [
            generator.choice(kind)
            for kind in generator.choices(kinds, weights, k=generator.randint(0, 30))
        ]
        if generator.random() < 0.3:
            tokens += tokenizer.encode(generator.choice(TEXTS[:4]))[:40]
        expected = tokenizer.decode_bytes(tokens).decode("utf-8", "replace")
        expected = expected.removeprefix(" ") if tokenizer.leading_space else expected
        assert tokenizer.decode(tokens) == expected
        assert "".join(stream(tokenizer, tokens, generator)) == expected


def is_utf8(data):
    return data == data.decode(errors="ignore").encode()


def stream(tokenizer, tokens, generator):
    decoder, position = StreamingDecoder(tokenizer), 0
    while position < len(tokens):
        size = generator.randint(0, 3)
        yield decoder.push(tokens[position : position + size])
        position += size
    yield decoder.finish()


@each_tokenizer
@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(tokenizer, text):
    tokens = tokenizer.encode(text)
    if tokenizer.encode(" x") == tokenizer.encode("x"):  # so one space cannot be known of
        text = text.removeprefix(" ")
    assert tokenizer.decode(tokens) == text


@each_tokenizer
def test_ends_and_ranges(tokenizer):
    end = tokenizer.end_of_document
    assert 0 <= end < tokenizer.vocab_size
    assert tokenizer.decode([end, end]) == ""
    assert all(0 <= t < tokenizer.vocab_size for text in TEXTS for t in tokenizer.encode(text))
    outside = [-1, tokenizer.vocab_size, 2**40]
    assert tokenizer.decode(outside) == "\ufffd" * 3
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer.encode("\ud83e")


@pytest.mark.parametrize("name", ["byte_level.json", "byte_fallback.json", "metaspace.json"])
def test_decoding_agrees_with_the_package(folder, name):
    package = tokenizers.Tokenizer.from_file(str(folder / name))
    tokenizer = get_tokenizer(folder / name)
    generator = random.Random(1)
    compared = 0
    for _ in range(1000):
        tokens = generator.choices(range(tokenizer.vocab_size), k=generator.randint(1, 20))
        if name == "metaspace.json" and package.id_to_token(tokens[0]).startswith("▁"):
            continue  # the package takes all spaces off the first token, not one
        if name == "byte_level.json" or is_utf8(tokenizer.decode_bytes(tokens)):
            assert tokenizer.decode(tokens) == package.decode(tokens)
            compared += 1
    assert compared >= 100


def test_world_vocabulary(world):
    tokens = [33520, 4600, 332, 59219, 21509, 47, 33]  # from the page of another implementation
    tokens += [10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080]
    assert world.encode(TEXTS[1]) == tokens
    assert world.encode("\n\n") == [261]
    assert world.vocab_size == 65536
    assert world.decode([65530, 65535]) == "\ufffd\ufffd"
    data = bytes(range(256))
    assert world.decode_bytes(world.encode_bytes(data)) == data
    assert world.decode_bytes(range(1, 257)) == data


def test_the_longest_token_is_taken(world):
    vocabulary = {world.decode_bytes([token]): token for token in range(1, 65530)}
    assert len(vocabulary) == 65529
    generator = random.Random(2)
    words = generator.choices(list(vocabulary), k=1000)
    for _ in range(200):
        data = b"".join(generator.choices(words, k=5)) + generator.randbytes(3)
        tokens = world.encode_bytes(data)
        for token in tokens:
            longest = max(n for n in range(1, 129) if data[:n] in vocabulary)
            assert token == vocabulary[data[:longest]]
            data = data[longest:]
        assert data == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "a line must be `id literal length`, got ''"),
        ("2 'b'", "a line must be"),
        ("2  1", "a line must be"),
        ("x 'b' 1", "a line must be"),
        ("-2 'b' 1", "a line must be"),
        ("2 'b' 1.0", "a line must be"),
        ("2_0 'b' 1", "a line must be"),
        ("0 'b' 1", "the id must be in 1..2147483647, got 0"),
        ("2147483648 'b' 1", "the id must be in 1..2147483647, got 2147483648"),
        ("1 'b' 1", "1 is in line 1 already"),
        ("2 'a' 1", "b'a' is in line 1 already"),
        ("2 b'a' 1", "b'a' is in line 1 already"),
        ("2 'é' 1", "'é' has 2 bytes, and the line says 1"),
        ("2 '' 0", "'' has 0 bytes"),
        ("2 open('x') 1", r"open\('x'\) is no literal"),
        ("2 'b 1", "'b is no literal"),
        ("2 '\\ud800' 3", "is no literal .*surrogates not allowed"),
        (f"2 {'(' * 5000} 1", "is no literal"),
        ("2 17 2", "17 must be text or bytes, and is int"),
        ("2 ['b'] 1", "must be text or bytes, and is list"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    path = tmp_path / "vocabulary.txt"
    path.write_text(f"1 'a' 1\n{line}\n3 'c' 1\n")
    with pytest.raises(ValueError, match=f"vocabulary.txt, line 2: .*{message}"):
        read_vocabulary(path)


def test_other_files_are_no_vocabularies(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"vocabulary\.txt is no vocabulary file: 'utf-8' codec"):
        read_vocabulary(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"vocabulary\.txt, line 1: a line must be"):
        get_tokenizer(path)


def test_a_vocabulary_may_lack_bytes_and_have_more_slots():
    tokenizer = VocabularyTokenizer({1: b"a", 7: b"ab"}, vocab_size=10)
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("aab") == [1, 7]
    assert tokenizer.decode([7, 2, 1]) == "ab\ufffda"
    with pytest.raises(ValueError, match="the vocabulary has no token for byte b'b'"):
        tokenizer.encode("ba")
    with pytest.raises(ValueError, match="vocab_size=7 must be above the highest id, 7"):
        VocabularyTokenizer({7: b"a"}, vocab_size=7)
    for wrong in ({0: b"a"}, {1: b""}, {2**31: b"a"}):
        with pytest.raises(ValueError, match="must be some bytes of an id >= 1"):
            VocabularyTokenizer(wrong)
    with pytest.raises(ValueError, match="has b'a' twice: ids 1 and 2"):
        VocabularyTokenizer({1: b"a", 2: b"a"})


def test_tokenizers_are_found_by_name_file_and_folder(folder, tmp_path):
    assert isinstance(get_tokenizer("byte"), ByteTokenizer)
    with pytest.raises(ValueError, match=r"tokenizer 'morse' is unknown; give one of .*'byte'"):
        get_tokenizer("morse")
    with pytest.raises(ValueError, match=r"no tokenizer: neither rwkv_vocab\*\.txt nor .* nor tok"):
        get_tokenizer(tmp_path)
    (tmp_path / "rwkv_vocab_v1.txt").write_bytes((folder / "small.txt").read_bytes())
    assert get_tokenizer(tmp_path).encode("日本x") == [300, ord("x") + 5]
    (tmp_path / "tokenizer.json").write_bytes((folder / "byte_level.json").read_bytes())
    with pytest.raises(ValueError, match=r"several tokenizers.*: rwkv_vocab_v1\.txt, tokenizer"):
        get_tokenizer(str(tmp_path))
    (tmp_path / "rwkv_vocab_v1.txt").unlink()
    assert isinstance(get_tokenizer(tmp_path), HuggingFaceTokenizer)


# As GPT-2 spells bytes: printable Latin-1 as it is, other bytes from U+0100 on.
SPELLING, _other = {}, 0x100
for _byte in range(256):
    if _byte in range(0x21, 0x7F) or (_byte >= 0xA1 and _byte != 0xAD):
        SPELLING[_byte] = chr(_byte)
    else:
        SPELLING[_byte], _other = chr(_other), _other + 1

SMALL = {byte + 1: bytes([byte]) for byte in range(256)} | {
    257: b"  ",
    258: "日本".encode(),
    259: "日".encode()[:2],
    261: b"\n\n",
    262: b"the",
    263: b" the",
    264: b"therefore",
}


def byte_level_ids(vocabulary):
    ids = {"".join(SPELLING[byte] for byte in data): i for i, data in vocabulary.items()}
    return {"<|endoftext|>": 0, "\ue000260\ue001": 260} | ids


def tokenizer_json(kind, vocabulary, **model):
    end = {"id": 0, "content": "<|endoftext|>", "special": True, "normalized": False}
    end |= {"lstrip": False, "rstrip": False, "single_word": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    whole |= {"trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": whole,
        "post_processor": None,
        "decoder": whole,
        "model": {"type": kind, "vocab": byte_level_ids(vocabulary)} | model,
    }


WORD_PIECE = {
    "unk_token": "<|endoftext|>",
    "continuing_subword_prefix": "",
    "max_input_chars_per_word": 10**6,
}
FORMS = {
    "WordPiece": tokenizer_json("WordPiece", SMALL, **WORD_PIECE),
    "RwkvTrie": tokenizer_json("RwkvTrie", SMALL) | {"pre_tokenizer": None},
    "manifest": {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "RWKV7ByteLevel"},
        "decoder": {"type": "RWKV7ByteLevel"},
        "model": {"type": "RWKV7LongestMatch", "vocab_file": "vocab.json", "vocab_size": 300},
    },
    "list": {"0": "<|rwkv_tokenizer_end_of_text|>"}
    | {str(i): list(data) if i < 257 or i == 259 else data.decode() for i, data in SMALL.items()},
}
LATIN_1 = {data.decode("latin-1"): i for i, data in SMALL.items()}
LATIN_1 |= {"<|endoftext|>": 0, "<|rwkv_unused_260|>": 260, "<|rwkv_unused_299|>": 299}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_that_mean_the_longest_match_are_recognised(tmp_path, form, mark):
    path = tmp_path / "tokenizer.json"
    path.write_text(mark + json.dumps(FORMS[form]), encoding="utf-8")
    (tmp_path / "vocab.json").write_text(mark + json.dumps(LATIN_1), encoding="utf-8")
    tokenizer = get_tokenizer(tmp_path)
    assert isinstance(tokenizer, VocabularyTokenizer)
    assert tokenizer.vocabulary == SMALL
    assert tokenizer.end_of_document == 0
    assert tokenizer.encode("therefore the  日本旦\n\n") == [264, 263, 257, 258, 259, 167, 261]
    assert tokenizer.encode("<|endoftext|>")[0] == ord("<") + 1


def test_the_package_gives_the_same_tokens_for_short_texts(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(FORMS["WordPiece"]))
    package, tokenizer = tokenizers.Tokenizer.from_file(str(path)), get_tokenizer(path)
    for text in [*TEXTS, "therefore the  日本旦\n\n"]:
        assert tokenizer.encode(text) == package.encode(text).ids


def test_the_world_vocabulary_is_recognised_by_its_content(tmp_path, world):
    path = tmp_path / "tokenizer.json"
    vocabulary = {i: world.decode_bytes([i]) for i in range(1, 65530)}
    fields = tokenizer_json("BPE", vocabulary, merges=[])
    # An end of the document that is a text of the vocabulary is one of the usual mistakes.
    fields["added_tokens"].append(fields["added_tokens"][0] | {"id": 65530, "content": "\n\n"})
    path.write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\n\\n"}')
    tokenizer = get_tokenizer(path)
    assert isinstance(tokenizer, VocabularyTokenizer)
    assert tokenizer.vocabulary == vocabulary
    assert tokenizer.end_of_document == 0
    # One token differs: this is another vocabulary.
    ids = fields["model"]["vocab"]
    ids["the"], ids["and"] = ids["and"], ids["the"]
    path.write_text(json.dumps(fields))
    assert isinstance(get_tokenizer(path), HuggingFaceTokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": FORMS["WordPiece"]["pre_tokenizer"] | {"use_regex": True}},
        {"model": FORMS["WordPiece"]["model"] | {"continuing_subword_prefix": "##"}},
        {"model": {"type": "WordLevel", "unk_token": "a", "vocab": byte_level_ids(SMALL)}},
        {"model": FORMS["WordPiece"]["model"] | {"unk_token": "a", "vocab": {"a": 0, "b": 1}}},
        {
            "added_tokens": [
                FORMS["WordPiece"]["added_tokens"][0] | {"id": 265, "content": "<|im_start|>"}
            ]
        },
    ],
)
def test_other_files_stay_with_the_package(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(FORMS["WordPiece"] | change))
    assert isinstance(get_tokenizer(path), HuggingFaceTokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"1": "a", "2": "a"}, "vocabulary has b'a' twice: ids 1 and 2"),
        ({"1": "a", "2": []}, r"vocabulary\[2\] must be some bytes of an id >= 1: b''"),
        ({"1": "a", "2": [256]}, r"bytes must be in range\(0, 256\)"),
        ({"0": "a", "1": "b"}, r"vocabulary\[0\] must be some bytes of an id >= 1: b'a'"),
        ({"1": "a", "2": 3}, "id 2 must have a text or a list of bytes, and has '3'"),
        ({"1": "a", "9" * 5000: "b"}, "Exceeds the limit"),
        (tokenizer_json("RwkvTrie", {1: b"a"}) | {"added_tokens": None}, None),
        (tokenizer_json("WordPiece", {-1: b"a"}, **WORD_PIECE), r"vocabulary\[-1\] must be some"),
        (tokenizer_json("WordPiece", {"1": b"a"}, **WORD_PIECE), "'a' must have an id of its own"),
        (
            {"model": {"type": "RWKV7LongestMatch", "vocab_file": "../vocab.json"}},
            "the name of a f",
        ),
        ({"model": {"type": "RWKV7LongestMatch"}}, "vocab_file must be the name .* got None"),
        ({"model": {"type": "RWKV7LongestMatch", "vocab_file": "broken.json"}}, "Expecting value"),
        ({"model": {"type": "RWKV7LongestMatch", "vocab_file": "list.json"}}, "must hold the ids"),
    ],
)
def test_damaged_vocabularies_are_named(tmp_path, fields, message):
    (tmp_path / "broken.json").write_text("")
    (tmp_path / "list.json").write_text("[]")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    if message is None:
        assert get_tokenizer(path).vocabulary == {1: b"a"}
        return
    with pytest.raises(ValueError, match=rf"tokenizer\.json has a damaged vocabulary: .*{message}"):
        get_tokenizer(path)


def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path):
    path = tmp_path / "rwkv_vocab.txt"
    lines = ["1 '\\r\\n' 2", "2 b'\\xe6' 1", "3 '日本' 6"]
    for start in ("", "\ufeff"):
        for end in ("\n", "\r\n"):
            for last in ("", end):
                path.write_bytes((start + end.join(lines) + last).encode())
                assert read_vocabulary(path) == {1: b"\r\n", 2: b"\xe6", 3: "日本".encode()}


def test_files_of_one_vocabulary_in_a_folder_are_one_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(FORMS["WordPiece"]))
    lines = "".join(f"{i} {data!r} {len(data)}\n" for i, data in SMALL.items())
    (tmp_path / "rwkv_vocab_v1.txt").write_text(lines)
    assert get_tokenizer(tmp_path).vocabulary == SMALL
    (tmp_path / "rwkv_vocab_v1.txt").write_text(lines.replace("b'the' 3", "b'tha' 3"))
    with pytest.raises(ValueError, match=r"several tokenizers.*: rwkv_vocab_v1\.txt, tokenizer"):
        get_tokenizer(tmp_path)


def test_a_missing_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs .* package rwkv: pip install 'goose-jax\[world\]'"
    ):
        world_tokenizer()
    with pytest.raises(ValueError, match=r"package tokenizers: pip install 'goose-jax\[huggingf"):
        get_tokenizer(folder / "byte_level.json")


def test_the_end_of_document_is_what_the_files_say(folder, tmp_path):
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    path.write_bytes((folder / "byte_level.json").read_bytes())
    assert get_tokenizer(path).end_of_document == 0
    for token in ("<|pad|>", {"content": "<|pad|>", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": token}))
        assert get_tokenizer(path).end_of_document == 1
    config.write_text(json.dumps({"eos_token": None}))
    assert get_tokenizer(path).end_of_document is None
    config.write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(ValueError, match=r"eos_token '<gone>', which is not in tokenizer\.json"):
        get_tokenizer(path)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not the JSON of a tokenizer"):
        get_tokenizer(path)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": " "},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
    ],
)
def test_other_decoders_are_refused(folder, tmp_path, decoder):
    fields = json.loads((folder / "byte_level.json").read_text()) | {"decoder": decoder}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"tokenizer\.json has a decoder that is not supported: "):
        get_tokenizer(path)


BAD_JSON = {
    b"": "Expecting value: line 1 column 1",
    b"{}": "Model missing",
    b"[1]": "invalid type: sequence",
    b"null": "invalid type: null",
    b'"a"': "invalid type: string",
    b'{"model": 3}': "ModelUntagged at line 1 column 12",
    b"\0": "Expecting value: line 1 column 1",
    b"\xff\xfe{": "byte 0xff in position 0",
    b"[" * 10**5: "recursion",
    b"x" * 10**6: "Expecting value: line 1 column 1",
    b'{"model": {"vocab": {"a": 0}}': "Expecting ',' delimiter: line 1 column 30",
    b'{"model": {"vo': "Unterminated string starting at: line 1 column 12",
    b'{"' + b"x" * 10**5 + b'": 1}': "expected",
}
BAD_FIELDS = [
    ({"model": None}, "ModelUntagged"),
    ({"model": {"type": "Unheard"}}, "ModelUntagged"),
    ({"model.vocab": None}, "expected a map"),
    ({"model.vocab": {"a": "1"}}, 'invalid type: string "1"'),
    ({"model.vocab": {"a": -1}}, "invalid value: integer `-1`"),
    ({"model.vocab": {"a": 2**40}}, "invalid value: integer `1099511627776`"),
    ({"model.vocab": {"a": 2**31}, "model.merges": []}, "'a' has the id 2147483648, at most"),
    ({"model.merges": [1]}, "MergeType"),
    ({"model.merges": ["a"]}, "Merges text file invalid"),
    ({"model.merges": ["a unheard"]}, "Token `unheard` out of vocabulary"),
    ({"model.dropout": 7}, "Dropout should be between 0 and 1"),
    ({"added_tokens": 3}, "expected a sequence"),
    ({"added_tokens": [{}]}, "missing field `id`"),
    ({"decoder": {"type": "Unheard"}}, "PyDecoderWrapper"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}, "parenthesis"),
    ({"pre_tokenizer": {"type": "x"}}, "PreTokenizerUntagged"),
    ({"version": "99"}, "Unknown tokenizer version '99'"),
    (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "Cannot parse precompiled_charsmap",  # the package panics, which is no Exception
    ),
]


def assert_refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        get_tokenizer(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 350 + 2 * len(str(path))


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: repr(content[:30]))
def test_other_files_are_no_tokenizer_json(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert_refused(path, BAD_JSON[content])


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS, ids=lambda value: str(value)[:50])
def test_damaged_fields_of_a_tokenizer_json_are_named(folder, tmp_path, change, message):
    fields = json.loads((folder / "byte_level.json").read_text())
    for name, value in change.items():
        outer, _, inner = name.partition(".")
        fields |= {outer: fields[outer] | {inner: value} if inner else value}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "Expecting value: line 1 column 1"),
        ("{", "line 1 column 2"),
        ("[" * 10**5, "recursion"),
        ("[]", "it holds no object"),
        ("null", "it holds no object"),
        ('"</s>"', "it holds no object"),
        ('{"eos_token": 3}', "eos_token 3, which is not in"),
        ('{"eos_token": true}', "eos_token True, which is not in"),
        ('{"eos_token": [1]}', r"eos_token \[1\], which is not in"),
        ('{"eos_token": {}}', "eos_token {}, which is not in"),
        ('{"eos_token": {"content": {}}}', "eos_token {}, which is not in"),
        ('{"eos_token": "' + "x" * 10**5 + '"}', "eos_token 'xxx.*, which is not in"),
    ],
    ids=lambda value: value[:30],
)
def test_a_damaged_config_of_a_tokenizer_is_named(folder, tmp_path, config, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes((folder / "byte_level.json").read_bytes())
    path.with_name("tokenizer_config.json").write_text(config)
    with pytest.raises(
        ValueError, match=rf"tokenizer_config\.json (is not|has) .*{message}"
    ) as error:
        get_tokenizer(path)
    assert len(str(error.value)) < 350 + len(str(path))


def test_a_text_is_neither_cut_nor_filled(folder, tmp_path):
    """A file may say how many tokens its own model reads."""
    fields = json.loads((folder / "byte_level.json").read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields | {"truncation": cut, "padding": fill}))
    text = "the quick brown fox"
    assert get_tokenizer(path).encode(text) == get_tokenizer(folder / "byte_level.json").encode(
        text
    )


def test_a_text_without_tokens_is_an_error(tmp_path):
    fields = {
        "version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {"geese": 0}, "unk_token": "unknown"},
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    assert get_tokenizer(path).encode("geese") == [0]
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode the text: .*Missing"):
        get_tokenizer(path).encode("ducks")


def test_fields_may_be_missing(folder, tmp_path):
    fields = json.loads((folder / "byte_level.json").read_text())
    path = tmp_path / "tokenizer.json"
    for missing in ("added_tokens", "decoder", "version"):
        path.write_text(json.dumps({k: v for k, v in fields.items() if k != missing}))
        if missing == "decoder":
            with pytest.raises(ValueError, match=r"a decoder that is not supported: none at all"):
                get_tokenizer(path)
        else:
            assert get_tokenizer(path).encode("a")


def test_a_continuation_keeps_its_leading_space(folder):
    tokenizer = get_tokenizer(folder / "byte_fallback.json")
    assert tokenizer.leading_space
    prompt, more = tokenizer.encode("a"), tokenizer.encode("day")
    assert tokenizer.decode(more) == "day"
    decoder = StreamingDecoder(tokenizer)
    assert decoder.push(prompt) == "a"
    assert decoder.push(more) == " day"


def test_the_page_about_text_runs():
    page = (ROOT / "docs/text.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    exec(blocks[0], {})
