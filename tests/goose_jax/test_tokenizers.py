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
    with pytest.raises(ValueError, match=r"holds no tokenizer: neither tokenizer\.json nor"):
        get_tokenizer(tmp_path)
    (tmp_path / "rwkv_vocab_v1.txt").write_bytes((folder / "small.txt").read_bytes())
    assert get_tokenizer(tmp_path).encode("日本x") == [300, ord("x") + 5]
    (tmp_path / "tokenizer.json").write_bytes((folder / "byte_level.json").read_bytes())
    with pytest.raises(ValueError, match=r"several tokenizers.*: rwkv_vocab_v1\.txt, tokenizer"):
        get_tokenizer(str(tmp_path))
    (tmp_path / "rwkv_vocab_v1.txt").unlink()
    assert isinstance(get_tokenizer(tmp_path), HuggingFaceTokenizer)


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


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 3}'])
def test_other_files_are_no_tokenizer_json(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json: "):
        get_tokenizer(path)


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
