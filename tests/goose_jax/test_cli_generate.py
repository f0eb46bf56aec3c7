import sys

import jax
import jax.numpy as jnp
import pytest
import tyro
from flax import nnx

from goose_jax.checkpoints import (
    CheckpointMetadata,
    save_checkpoint,
    save_pretrained,
)
from goose_jax.cli.generate import generate
from goose_jax.cli.main import main
from goose_jax.config import RWKV7Config
from goose_jax.generation import SamplingConfig
from goose_jax.generation import generate as generate_tokens
from goose_jax.nn import RWKV7
from goose_jax.text import ByteTokenizer

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

CONFIG = RWKV7Config(
    vocab_size=257,
    hidden_size=64,
    num_layers=1,
    compute_dtype="float32",
)


@pytest.fixture(scope="module")
def model():
    model = nnx.jit(lambda: RWKV7(CONFIG, rngs=nnx.Rngs(0)))()
    model.head[...] += jax.random.normal(jax.random.key(0), model.head.shape)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(path, model, CheckpointMetadata(tokenizer="byte"))
    return str(path)


@pytest.fixture
def run(checkpoint, capsys):
    def run(*arguments, checkpoint=checkpoint):
        tyro.cli(generate, args=[checkpoint, *arguments])
        return capsys.readouterr().out

    return run


def expected_text(model, prompt, **settings):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    settings = {"max_new_tokens": 40, "stop_tokens": [0]} | settings
    return tokenizer.decode(generate_tokens(model, [tokens], **settings).sequences[0])


def test_a_prompt_is_continued(run, model):
    text = expected_text(model, "def ", sampling=SamplingConfig(top_p=0.85))
    assert len(text) >= 20
    assert run("--prompt", "def ", "--max-new-tokens", "40") == f"def {text}\n"
    assert run("--prompt", "def ", "--max-new-tokens", "40", "--no-echo") == f"{text}\n"


def test_every_setting_arrives(run, model):
    sampling = SamplingConfig(
        temperature=0.7,
        top_k=100,
        top_p=0.97,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        penalty_decay=0.9,
    )
    text = expected_text(model, "", sampling=sampling, seed=3)
    numbers = "--temperature 0.7 --top-k 100 --top-p 0.97 --presence-penalty 0.5"
    numbers += " --frequency-penalty 0.3 --penalty-decay 0.9 --seed 3 --max-new-tokens 40"
    assert run(*numbers.split()) == f"{text}\n"


def test_a_stop_text_ends_the_output(run):
    greedy = ["--temperature", "0", "--max-new-tokens", "40", "--no-echo", "--prompt", "x"]
    text = run(*greedy)
    stop = text[18:20]
    assert run(*greedy, "--stop", "never to be found", stop) == text[: text.index(stop)] + "\n"


def test_text_is_written_as_it_comes(checkpoint, monkeypatch):
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    generate(checkpoint, prompt="x", max_new_tokens=40)
    assert len(pieces) == 5  # the prompt, three blocks of at most 16 tokens, the end


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], r"top_p must be in \[0, 1\], got 1\.5"),
        (["--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1, got 0"),
        (["--stop", ""], "stop must not be an empty text"),
        (["--seed", "-1"], r"seed must lie in 0\.\.2\*\*32-1, got -1"),
    ],
)
def test_wrong_arguments_are_named(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_logits_that_are_not_finite_are_an_error(model, tmp_path, capsys):
    broken = nnx.clone(model)
    broken.head[...] = broken.head[...].at[3, 5].set(jnp.nan)
    save_checkpoint(tmp_path / "broken", broken, CheckpointMetadata(tokenizer="byte"))
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(tmp_path / "broken"), "--prompt", "x", "--max-new-tokens", "40"])
    assert caught.value.code == 2
    assert capsys.readouterr() == (
        "x",
        "goose-jax: error: the model gave NaN or infinite logits for row 0: the parameter head "
        "holds such values, so the checkpoint is damaged or its training diverged\n",
    )


def test_a_checkpoint_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(checkpoint=str(tmp_path / "nowhere"))


@pytest.fixture(scope="module", params=["pth", "huggingface"])
def foreign(request, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign") / "model"
    save_pretrained(model, path, request.param)
    return path


def test_checkpoints_of_others_are_continued(run, model, foreign):
    arguments = ["--dtype", "float32", "--temperature", "0", "--max-new-tokens", "20"]
    text = expected_text(model, "x", sampling=SamplingConfig(temperature=0), max_new_tokens=20)
    with pytest.raises(ValueError, match="model does not tell its tokenizer; give --tokenizer: b"):
        run(*arguments, "--prompt", "x", checkpoint=str(foreign))
    arguments += ["--tokenizer", "byte", "--prompt", "x"]
    assert run(*arguments, checkpoint=str(foreign)) == f"x{text}\n"
