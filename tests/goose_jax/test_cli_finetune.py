"""`goose-jax train --from`, `goose-jax merge` and `--state`, on the smallest model."""

import dataclasses
import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from goose_jax import RWKV7, RWKV7Config, load_pretrained, load_state, save_pretrained
from goose_jax.chat import ChatSession, ReplySettings, save_chat
from goose_jax.checkpoints import load_model_and_tokenizer
from goose_jax.cli.main import main
from goose_jax.cli.train_defaults import with_defaults
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.cli.train_setup import prepare
from goose_jax.text import VocabularyTokenizer
from goose_jax.training import (
    init_wkv,
    load_initial_state,
    load_tuning_checkpoint,
    merge_lora,
    save_tuning_checkpoint,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile", "module_compilation_cache")

CONFIG = RWKV7Config(
    vocab_size=128,
    hidden_size=32,
    num_layers=1,
    head_size=16,
    head_norm_eps=64e-5,
    compute_dtype="float32",
)
TEXT = "the quick brown fox jumps over the lazy dog. " * 30
SMALL = [
    *("--batch-size=2", "--sequence-length=12", "--steps=4", "--warmup-steps=1", "--no-plot"),
    *(
        "--log-every=1",
        "--save-every=2",
        "--evaluate-every=4",
        "--held-out-bytes=64",
        "--sample-length=4",
    ),
    *("--prompt=the", "--learning-rate=1e-2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, a vocabulary in which words are tokens, and a model of others."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "fox.txt").write_text(TEXT)
    words = [f" {word}" for word in TEXT.split()[:9]]
    entries = ["\n", *(chr(i) for i in range(32, 127)), *dict.fromkeys(words)]
    lines = [f"{i} {entry!r} {len(entry)}\n" for i, entry in enumerate(entries, start=1)]
    (folder / "words.txt").write_text("".join(lines))
    save_pretrained(make_model(0), folder / "base.pth", "pth")
    save_pretrained(make_model(1), folder / "other.pth", "pth")
    return folder


def make_model(seed):
    """Blocks are away from their initial values, where many are zero."""
    graphdef, state = nnx.split(RWKV7(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    state["blocks"] = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), jnp.float32),
        state["blocks"],
    )
    return nnx.merge(graphdef, state)


@pytest.fixture(scope="module")
def tune(folder):
    def tune(kind, *arguments, out="runs"):
        main(["train", f"--from={folder / 'base.pth'}", f"--tune={kind}", *SMALL,
              f"--tokenizer={folder / 'words.txt'}", f"--data={folder / 'fox.txt'}",
              f"--out={folder / out}", *arguments])  # fmt: skip
        return folder / out / "fox-1"

    return tune


@pytest.fixture(scope="module")
def lora(tune):
    return tune("lora", out="lora")


@pytest.fixture(scope="module")
def state(tune):
    return tune("state", "--learning-rate=0.1", out="state")


@pytest.fixture(scope="module")
def full(tune):
    return tune("full", out="full")


def trained(kind, run):
    if kind == "full":
        return nnx.to_pure_dict(nnx.state(load_pretrained(run)[0]))
    return load_tuning_checkpoint(run).params


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    return capsys.readouterr().err.rpartition("goose-jax: error: ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "state"])
def test_a_run_goes_on_as_if_nothing_had_happened(request, kind, tmp_path):
    original = request.getfixturevalue(kind)
    run = pathlib.Path(shutil.copytree(original, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "00000004")  # as if it had been killed in step 4
    main(["train", "--resume", str(run)])
    chex.assert_trees_all_equal(trained(kind, run), trained(kind, original))
    of_the_machine = {"seconds", "tokens_per_second", "host_memory_bytes"}
    kept, expected = (
        [{name: line[name] for name in line.keys() - of_the_machine} for line in lines_of(path)]
        for path in (run, original)
    )
    assert kept == expected
    assert [line["step"] for line in kept if "held_out_bits_per_byte" in line] == [0, 4]
    assert yaml.safe_load((run / "settings.yaml").read_text())["tokenizer"].endswith("words.txt")


@pytest.mark.slow
def test_a_run_holds_its_tokenizer(folder, full, lora, tmp_path, capsys, monkeypatch):
    """Also where another folder is the working directory and the first file is gone."""
    words = (folder / "words.txt").read_bytes()
    (folder / "words.txt").unlink()
    monkeypatch.chdir(tmp_path)
    try:
        run = pathlib.Path(shutil.copytree(full, tmp_path / "run"))
        for path in (run, run / "checkpoints" / "00000004"):
            assert (path / "rwkv_vocab.txt").read_bytes() == words
            main(["generate", str(path), "--prompt=the", "--max-new-tokens=2"])
            assert capsys.readouterr().out.startswith("the")
        shutil.rmtree(run / "checkpoints" / "00000004")
        main(["train", "--resume", "run"])
        main(["merge", str(lora), f"--base={folder / 'base.pth'}", "--out=merged"])
        main(["generate", "merged", "--prompt=the", "--max-new-tokens=2"])
        assert (tmp_path / "merged" / "rwkv_vocab.txt").read_bytes() == words
    finally:
        (folder / "words.txt").write_bytes(words)


@pytest.mark.slow
def test_what_was_tuned_is_taken_from_an_intact_checkpoint(folder, lora, state, tmp_path, capsys):
    """By merge, and by the flag --state, as by commands that take a model."""
    words = f"--tokenizer={folder / 'words.txt'}"
    for original, arguments in (
        (lora, ["merge", "RUN", f"--base={folder / 'base.pth'}", f"--out={tmp_path / 'merged'}"]),
        (state, ["generate", str(folder / "base.pth"), "--state=RUN", words, "--max-new-tokens=2"]),
    ):
        run = pathlib.Path(shutil.copytree(original, tmp_path / original.parent.name))
        older, newest = sorted((run / "checkpoints").iterdir())
        (newest / "adapter.json").unlink()
        main([argument.replace("RUN", str(run)) for argument in arguments])
        assert capsys.readouterr().err == (
            f"goose-jax: warning: {newest} is damaged: adapter.json is missing; "
            f"going on from {older}\n"
        )


@pytest.mark.parametrize("kind", ["full", "lora", "state"])
def test_a_run_opens_its_tokenizer_once(kind, folder, monkeypatch):
    opened = []
    init = VocabularyTokenizer.__init__

    def count(self, *args, **kwargs):
        opened.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(VocabularyTokenizer, "__init__", count)
    settings = TrainSettings(
        from_=folder / "base.pth",
        tune=kind,
        data=folder / "fox.txt",
        out=folder / "runs",
        tokenizer=str(folder / "words.txt"),
        sequence_length=12,
        held_out_bytes=64,
    )
    prepared = prepare(with_defaults(settings), None)
    assert opened == [prepared.text.tokenizer]


def test_bits_are_per_byte_whatever_the_tokenizer(folder, lora):
    """A word is one token here; a model that knows nothing pays for it as for any token."""
    before = lines_of(lora)[0]["held_out_bits_per_byte"]  # new adapters change nothing
    tokenizer = VocabularyTokenizer.from_file(folder / "words.txt")
    held_out = TEXT[-64:]
    tokens = len(tokenizer.encode(held_out)) + 1  # the end of the document
    assert before == pytest.approx(7 * tokens / 64, rel=0.05)  # bits of 128; 1.985, not 1.97


@pytest.mark.slow
def test_adapters_are_merged(lora, folder, tmp_path, capsys):
    out = str(tmp_path / "merged")
    main(["merge", str(lora), "--base", str(folder / "base.pth"), "--out", out])
    assert "with adapters of rank 16 merged" in capsys.readouterr().out
    merged, metadata = load_pretrained(out)
    assert metadata.step == 4
    copied = tmp_path / "merged" / "rwkv_vocab.txt"
    assert metadata.tokenizer == str(copied)
    assert copied.read_bytes() == (folder / "words.txt").read_bytes()
    adapter = load_tuning_checkpoint(lora)
    base, _ = load_pretrained(folder / "base.pth")
    expected = merge_lora(base, adapter.params, adapter.lora)
    chex.assert_trees_all_equal(nnx.state(merged), nnx.state(expected))
    for name in ("output", "key"):
        before, after = (getattr(m.blocks.time_mix, name)[...] for m in (base, merged))
        assert not np.array_equal(before, after)
    main(["generate", out, "--prompt=the", "--max-new-tokens=4"])
    assert capsys.readouterr().out.startswith("the")
    path = tmp_path / "merged.pth"
    main(["merge", str(lora), f"--base={folder / 'base.pth'}", f"--out={path}", "--layout=pth",
          "--dtype=bfloat16"])  # fmt: skip
    assert load_pretrained(path)[0].config.param_dtype == "bfloat16"


@pytest.mark.slow
def test_what_cannot_be_merged(lora, state, folder, tmp_path, capsys):
    base, out = folder / "base.pth", tmp_path / "out"
    for arguments, message in (
        ((lora, "--base", folder / "other.pth", "--out", out), "same sizes, but other weights"),
        ((lora, "--base", base, "--out", base), "base.pth exists"),
        ((state, "--base", base, "--out", out), "holds initial states, which cannot be merged"),
        ((base, "--base", base, "--out", out), "base.pth is neither a checkpoint"),
        ((lora, "--base", tmp_path / "no", "--out", out), "there is no checkpoint at"),
    ):
        assert message in fails(capsys, "merge", *arguments)
    assert not out.exists()
    assert "for adapters use goose-jax merge" in fails(capsys, "generate", lora)


@pytest.mark.slow
def test_texts_begin_with_a_tuned_state(state, folder, capsys):
    """The file of the official ecosystem, and the run's folder, are the same state."""
    base, words = folder / "base.pth", str(folder / "words.txt")
    model, tokenizer = load_model_and_tokenizer(base, tokenizer=words)
    assert model.config.compute_dtype == "float32"  # on a CPU
    start = load_initial_state(state, model)
    np.testing.assert_array_equal(start.wkv, load_state(state / "state.pth", model.config).wkv)
    assert np.any(start.wkv)

    def write(*arguments):
        main(["generate", str(base), f"--tokenizer={words}", "--max-new-tokens=12", *arguments])
        return capsys.readouterr().out

    from_file = write(f"--state={state / 'state.pth'}", "--temperature=0")
    assert from_file == write(f"--state={state}", "--temperature=0")
    assert from_file != write("--temperature=0")

    session = ChatSession(model, tokenizer, ReplySettings(max_new_tokens=2), start)
    with pytest.raises(ValueError, match="nothing to save"):
        save_chat(folder / "chat", session.conversation, model)
    session.reply("the fox", lambda _: None, lambda: False)
    assert session.conversation.text
    assert session.conversation.state is not start
    session.reset()
    assert (session.conversation.text, session.conversation.state) == ("", start)


def test_states_that_do_not_fit(lora, folder, tmp_path, capsys):
    words = f"--tokenizer={folder / 'words.txt'}"
    adapters = load_tuning_checkpoint(lora)
    state = tmp_path / "state"  # as a run of state tuning on the same model would leave it
    save_tuning_checkpoint(state, dataclasses.replace(adapters, params=init_wkv(CONFIG), lora=None))
    for path, message in (
        (state, "same sizes, but other weights"),
        (lora, "holds adapters and no state"),
        (tmp_path / "no", "no"),
    ):
        arguments = ("generate", folder / "other.pth", words, "--state", path)
        assert message in fails(capsys, *arguments)


@pytest.mark.slow
def test_a_tuned_state_can_be_tuned_further(state, tune):
    run = tune("state", f"--state={state / 'state.pth'}", "--learning-rate=0.1", out="further")
    first, last = (
        [line["held_out_bits_per_byte"] for line in lines_of(path) if len(line) == 2]
        for path in (state, run)
    )
    assert first[-1] == last[0]
    assert first[-1] < first[0]


def test_a_base_that_has_changed(lora, folder, tmp_path, capsys):
    run = pathlib.Path(shutil.copytree(lora, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "00000004")
    err = fails(capsys, "train", "--resume", run, "--from", folder / "other.pth")
    assert "same sizes, but other weights" in err
    assert "base.pth" in err
    err = fails(capsys, "train", "--resume", run, "--tune=lora", "--lora-rank=4")
    assert "keeps its settings; leave out --lora-rank" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune=lora"], "--tune needs --from CHECKPOINT"),
        (["--lora-rank=4"], "--lora-rank needs --from CHECKPOINT"),
        (["--from=x", "--num-layers=2", "--head-size=64"], "--num-layers, --head-size cannot be g"),
        (["--from=x", "--lora-alpha=2"], "--lora-alpha needs --tune lora"),
        (["--from=x", "--tune=lora", "--state=y"], "--state needs --tune state"),
        (["--from=x", "--frozen-dtype=bfloat16"], "--frozen-dtype needs --tune lora or state"),
        (["--from=/nowhere"], "there is no checkpoint at /nowhere"),
        (["--from={base}"], "does not tell its tokenizer; give --tokenizer"),
        (["--from={base}", "--tokenizer=byte"], "'byte' has 257 ids, but the model's vocabulary"),
        (["--from={base}", "--tokenizer={words}", "--tune=lora", "--lora-rank=0"], "rank must be"),
    ],
)
def test_flags_that_do_not_fit_together(folder, tmp_path, capsys, arguments, message):
    paths = {"base": folder / "base.pth", "words": folder / "words.txt"}
    arguments = [argument.format(**paths) for argument in arguments]
    common = (f"--out={tmp_path / 'runs'}", f"--data={folder / 'fox.txt'}", *SMALL)
    assert message in fails(capsys, "train", *arguments, *common)
    assert not (tmp_path / "runs").exists()
