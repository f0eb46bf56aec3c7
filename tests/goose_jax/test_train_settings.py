"""The settings of `goose-jax train`: defaults, presets, and files of settings."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest
import tyro
import yaml

from goose_jax import RWKV7Config
from goose_jax.cli.settings_file import from_values, to_values
from goose_jax.cli.tokenize import TokenizeFlags
from goose_jax.cli.train_arguments import settings_before_flags
from goose_jax.cli.train_checks import check_warmup
from goose_jax.cli.train_defaults import (
    PRESETS,
    lora_config,
    model_config,
    optimizer_config,
    with_defaults,
)
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.training import LoraConfig, OptimizerConfig
from goose_jax.training.yaml_file import read_yaml, write_yaml

BASE = Path("/a/base.pth")
OLD = {  # the settings.json of a run of version 0.1
    "data": "/a/fox.txt", "pattern": "*", "out": "runs", "from_": None, "tune": None,
    "lora_rank": None, "lora_alpha": None, "state": None, "tokenizer": "byte", "num_layers": 1,
    "hidden_size": 128, "head_size": 64, "frozen_dtype": None, "compute_dtype": None,
    "remat": "dots", "steps": 40, "batch_size": 8, "microbatches": 1, "sequence_length": 128,
    "learning_rate": 3e-05, "final_learning_rate": 2e-05, "warmup_steps": 30, "weight_decay": 0.1,
    "held_out_bytes": 32768, "evaluate_every": 300, "save_every": 300, "keep": 2, "plot": True,
    "prompt": "def ", "sample_length": 400, "seed": 0,
}  # fmt: skip
GIVEN = {
    "new": TrainSettings(data=Path("/a/fox.txt"), steps=40, num_layers=1, norm_eps=1e-6),
    "full": TrainSettings(from_=BASE, compute_dtype="float16", learning_rate=1e-3),
    "lora": TrainSettings(from_=BASE, tune="lora", lora_rank=4, frozen_dtype="bfloat16"),
    "state": TrainSettings(from_=BASE, tune="state", state=Path("/a/start.pth")),
    "preset": TrainSettings(preset="pile-24x2048", learning_rate=1e-4),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_settings_are_recorded_and_read_again(kind, tmp_path):
    settings = with_defaults(GIVEN[kind])
    file = tmp_path / "settings.yaml"
    write_yaml(file, to_values(settings))
    assert yaml.safe_load(file.read_text())["steps"] == settings.steps  # also for others
    assert from_values(read_yaml(file), file) == settings
    assert with_defaults(settings) == settings
    assert settings_before_flags(["train", f"--config={file}", "--steps=3"]) == settings


def test_a_run_of_version_0_1_is_read(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(OLD))
    settings = settings_before_flags(["train", "--resume", str(tmp_path)])
    for name, value in OLD.items():
        read = getattr(settings, name)
        if name == "pattern":  # there was only one
            assert read == (value,)
        else:
            assert (str(read) if isinstance(read, Path) else read) == value
    assert with_defaults(settings) == settings


def test_defaults_depend_on_what_is_trained():
    new = with_defaults(TrainSettings())
    assert (new.num_layers, new.hidden_size, new.head_size) == (2, 128, 64)
    assert (new.steps, new.batch_size, new.warmup_steps) == (1200, 8, 30)
    assert (new.learning_rate, new.sequence_length, new.tokenizer) == (3e-3, 128, "byte")
    full = with_defaults(TrainSettings(from_=BASE))
    assert full.tune == "full"
    assert optimizer_config(full) == OptimizerConfig(
        total_steps=1200,
        learning_rate=2e-5,
        final_learning_rate=2e-5 / 10,
        warmup_steps=30,
        weight_decay=0,
    )
    assert (full.sequence_length, full.tokenizer) == (512, None)
    lora = with_defaults(TrainSettings(from_=BASE, tune="lora", learning_rate=1.0))
    assert lora_config(lora) == LoraConfig(rank=16, alpha=32)
    assert lora.final_learning_rate == 0.1


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (10, 1), (250, 25), (9999, 30)])
def test_short_trials_have_a_short_warmup(steps, warmup):
    assert with_defaults(TrainSettings(steps=steps)).warmup_steps == warmup


@pytest.mark.parametrize(("steps", "warmup"), [(3, 0), (50, 5), (200, 10), (None, 10)])
def test_short_trials_of_a_preset_have_a_short_warmup(steps, warmup):
    settings = TrainSettings(preset="minipile-12x768", steps=steps)
    assert with_defaults(settings).warmup_steps == warmup


def test_the_file_of_a_warmup_is_named(tmp_path):
    file = tmp_path / "settings.yaml"
    settings = TrainSettings(config=file, warmup_steps=10, steps=5)
    with pytest.raises(ValueError, match=r"--steps=5 must be more than the 10 steps of warm-up in"):
        check_warmup(settings, {"steps"})
    check_warmup(settings, {"warmup_steps"})  # its flag is named elsewhere
    check_warmup(dataclasses.replace(settings, steps=11), set())


def integers(kind):
    hints = typing.get_type_hints(kind)
    return [name for name, hint in hints.items() if hint is int or int in typing.get_args(hint)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in (TrainSettings, TokenizeFlags)
        for name in integers(kind)
        if name != "seed"
    ],
)
def test_integers_that_are_too_large(kind, name):
    given = {"out": Path("x")} if kind is TokenizeFlags else {}
    message = (
        f"--{name.replace('_', '-')} must be at most (65536|2147483647|9223372036854775807), got"
    )
    with pytest.raises(ValueError, match=rf"{message} {2**63}"):
        kind(**given, **{name: 2**63})


def test_values_that_are_given_are_kept():
    """Also zero, which is not the same as a setting that was left out."""
    given = TrainSettings(
        learning_rate=0.5, final_learning_rate=0.0, weight_decay=0.0, warmup_steps=0, seed=3
    )
    settings = with_defaults(given)
    assert settings.final_learning_rate == settings.weight_decay == settings.warmup_steps == 0
    assert (settings.learning_rate, settings.seed) == (0.5, 3)


def test_every_choice_of_the_configurations_is_a_setting():
    settings = {field.name for field in dataclasses.fields(TrainSettings)}
    model = {field.name for field in dataclasses.fields(RWKV7Config)}
    assert model - settings == {"param_dtype"}  # training needs float32
    optimizer = {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert optimizer - settings == {"total_steps"}  # steps
    given = TrainSettings(gate_rank=7, intermediate_size=96, norm_eps=1e-3, remat="full")
    config = model_config(with_defaults(given), vocab_size=300)
    assert (config.gate_rank, config.intermediate_size, config.norm_eps) == (7, 96, 1e-3)
    assert (config.remat, config.vocab_size, config.head_norm_eps) == ("full", 300, 64e-5)


def test_presets_are_the_official_trainings():
    """Tokens of a step, and of the run: `my_exit_tokens` of the official scripts."""
    for name, tokens_of_a_step, tokens in (
        ("minipile-12x768", 16 * 512, 1_498_226_207),
        ("pile-24x1024", 240 * 4096, 332_115_325_534),
        ("pile-24x2048", 240 * 4096, 332_115_325_534),
    ):
        settings = with_defaults(TrainSettings(preset=name, beta1=0.8))
        rows = settings.batch_size * settings.microbatches
        assert rows * settings.sequence_length == tokens_of_a_step
        assert settings.steps == math.ceil(tokens / tokens_of_a_step)
        config = model_config(settings, vocab_size=65536)
        assert name.endswith(f"{config.num_layers}x{config.hidden_size}")
        recipe = optimizer_config(settings)
        assert (recipe.beta1, recipe.beta2, recipe.eps, recipe.warmup_steps) == (
            *(0.8, 0.99, 1e-18, 10),
        )
    assert {preset["learning_rate"] for preset in PRESETS.values()} == {6e-4, 4e-4, 3e-4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: many", "steps must be an integer, got 'many'"),
        ("steps: 1.5", "steps must be an integer, got 1.5"),
        ("steps: true", "steps must be an integer, got True"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("plot: 3", "plot must be true or false, got 3"),
        ("tokenizer: 3", "tokenizer must be a text, got 3"),
        ("data: [a, b]", "data must be a path, got ['a', 'b']"),
        ("remat: some", "remat must be one of none, dots, projections, full, got 'some'"),
        ("out:", "out must be a path, got None"),
        ("steps: 0", "--steps must be an integer >= 1, got 0"),
        ("lora_rank: 3", "--lora-rank needs --from"),
        ("number of steps: 3", "'number of steps' is unknown here"),
        ("resume: runs/x", "'resume' is unknown here"),
        ("- steps", "must hold settings by name"),
        ("3: 3", "must hold settings by name"),
        ("", "must hold settings by name"),
        ("steps: [", "is damaged, or no YAML"),
        ("a: *b", "is damaged, or no YAML"),
        ("a: !!python/object:os.system x", "is damaged, or no YAML"),
        ("[" * 2000, "is damaged, or no YAML"),
        (b"steps: \xff", "is damaged, or no YAML"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below
        settings_before_flags(["train", "--config", str(file)])
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    assert len(str(error.value)) < 400


def test_what_a_person_writes(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("learning-rate: 6e-4\nfrom: /a/base.pth\nweight_decay: 1\nprompt: '- '\n")
    settings = settings_before_flags(["train", f"--config={file}"])
    assert (settings.learning_rate, settings.weight_decay) == (6e-4, 1.0)
    assert (settings.from_, settings.prompt) == (BASE, "- ")
    with pytest.raises(ValueError, match="--config cannot be given with --resume"):
        settings_before_flags(["train", f"--config={file}", "--resume=x"])
    with pytest.raises(FileNotFoundError, match="there is no training run at x"):
        settings_before_flags(["train", "--resume=x"])


def test_none_is_a_text_like_others_on_the_command_line():
    settings = tyro.cli(TrainSettings, args=["--prompt", "None", "--no-embedding-norm"])
    assert (settings.prompt, settings.embedding_norm, settings.steps) == ("None", False, None)
