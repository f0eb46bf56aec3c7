"""The flags of `goose-jax train`, their defaults, and the settings.json of a run."""

import json
from pathlib import Path

import pytest

from goose_jax.cli.train_flags import TrainFlags
from goose_jax.cli.train_settings import (
    Adapters,
    InitialState,
    NewModel,
    TrainSettings,
    WholeModel,
)
from goose_jax.training import LoraConfig, OptimizerConfig

BASE = Path("/a/base.pth")
COMMON = {
    "data": None, "pattern": "*", "out": "runs", "from_": "/a/base.pth", "tune": None,
    "lora_rank": None, "lora_alpha": None, "state": None, "tokenizer": "world", "num_layers": None,
    "hidden_size": None, "head_size": None, "frozen_dtype": None, "compute_dtype": None,
    "remat": "dots", "steps": 1200, "batch_size": 8, "microbatches": 1, "sequence_length": 512,
    "learning_rate": 0.0002, "final_learning_rate": 2e-05, "warmup_steps": 30, "weight_decay": 0.0,
    "held_out_bytes": 32768, "evaluate_every": 300, "save_every": 300, "keep": 2, "plot": True,
    "prompt": "def ", "sample_length": 400, "seed": 0,
}  # fmt: skip
RECORDED = {  # for each subject the flags given, and the settings.json that 0.1 wrote for them
    "new": (
        TrainFlags(data=Path("/a/fox.txt"), steps=40, num_layers=1),
        COMMON | {
            "data": "/a/fox.txt", "from_": None, "tokenizer": "byte", "num_layers": 1,
            "hidden_size": 128, "head_size": 64, "steps": 40, "sequence_length": 128,
            "learning_rate": 0.003, "final_learning_rate": 0.0002, "weight_decay": 0.1,
        },
    ),
    "full": (
        TrainFlags(from_=BASE, compute_dtype="float16", learning_rate=1e-3),
        COMMON | {"tune": "full", "compute_dtype": "float16", "learning_rate": 0.001,
                  "final_learning_rate": 0.0001},
    ),
    "lora": (
        TrainFlags(from_=BASE, tune="lora", lora_rank=4, frozen_dtype="bfloat16"),
        COMMON | {"tune": "lora", "lora_rank": 4, "lora_alpha": 32.0, "frozen_dtype": "bfloat16"},
    ),
    "state": (
        TrainFlags(from_=BASE, tune="state", state=Path("/a/start.pth")),
        COMMON | {"tune": "state", "state": "/a/start.pth", "learning_rate": 0.1,
                  "final_learning_rate": 0.01},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDED)
def test_settings_are_recorded_as_before_and_read_again(kind):
    flags, recorded = RECORDED[kind]
    settings = TrainSettings.from_flags(flags)
    assert json.loads(json.dumps(settings.to_flags(recorded["tokenizer"]).to_json())) == recorded
    read = TrainSettings.from_flags(TrainFlags.from_json(recorded))
    assert read.tokenizer == recorded["tokenizer"]
    assert read.subject == settings.subject
    assert read.optimizer == settings.optimizer
    assert read.to_flags(recorded["tokenizer"]).to_json() == recorded


def test_defaults_depend_on_what_is_trained():
    new = TrainSettings.from_flags(TrainFlags())
    assert new.subject == NewModel(num_layers=2, hidden_size=128, head_size=64)
    assert (new.optimizer.learning_rate, new.sequence_length, new.tokenizer) == (3e-3, 128, "byte")
    full = TrainSettings.from_flags(TrainFlags(from_=BASE))
    assert full.subject == WholeModel(base=BASE)
    assert full.optimizer == OptimizerConfig(
        total_steps=1200,
        learning_rate=2e-5,
        final_learning_rate=2e-5 / 10,
        warmup_steps=30,
        weight_decay=0,
    )
    assert (full.sequence_length, full.tokenizer) == (512, None)
    lora = TrainSettings.from_flags(TrainFlags(from_=BASE, tune="lora", learning_rate=1.0))
    assert lora.subject == Adapters(
        base=BASE, lora=LoraConfig(rank=16, alpha=32), frozen_dtype=None
    )
    assert lora.optimizer.final_learning_rate == 0.1
    state = TrainSettings.from_flags(TrainFlags(from_=BASE, tune="state"))
    assert state.subject == InitialState(base=BASE, start=None, frozen_dtype=None)


def test_values_that_are_given_are_kept():
    """Also zero, which is not the same as a flag that was left out."""
    given = TrainFlags(
        learning_rate=0.5, final_learning_rate=0.0, weight_decay=0.0, sequence_length=7, seed=3
    )
    settings = TrainSettings.from_flags(given)
    assert settings.optimizer.final_learning_rate == settings.optimizer.weight_decay == 0
    assert (settings.optimizer.learning_rate, settings.sequence_length) == (0.5, 7)
    assert settings.seed == 3


def test_paths_survive_being_written():
    flags = TrainFlags(data=Path("/a/b"), out=Path("c"), steps=30)
    assert TrainFlags.from_json(json.loads(json.dumps(flags.to_json()))) == flags
    assert TrainFlags.from_json(TrainFlags().to_json()) == TrainFlags()
