"""A training run from Python, on a model small enough to compile in a moment."""

import dataclasses
import hashlib

import chex
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.checkpoints import CheckpointError, CheckpointMetadata, load_checkpoint
from goose_jax.data import Document, TrainingText
from goose_jax.text import ByteTokenizer
from goose_jax.training import (
    FullTuning,
    LoraConfig,
    LoraTuning,
    OptimizerConfig,
    RunDirectory,
    StateTuning,
    Trainer,
    TrainerConfig,
    load_tuning_checkpoint,
    make_evaluation,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

CONFIG = RWKV7Config(
    vocab_size=257, hidden_size=32, num_layers=1, head_size=16, compute_dtype="float32"
)
RECIPE = OptimizerConfig(total_steps=4, warmup_steps=1, learning_rate=1e-2)
SIZE = {"batch_size": 2, "sequence_length": 12}
TEXT = TrainingText.from_documents(
    [Document("fox", "the quick brown fox jumps over the lazy dog. " * 20)],
    ByteTokenizer(),
    source="fox",
    held_out_bytes=45,
)


@pytest.fixture(scope="module")
def model():
    return RWKV7(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def evaluate(model):
    return make_evaluation(model, TEXT.held_out, TEXT.tokenizer, **SIZE)


def make_trainer(run, tuning, evaluate, *, seed=0, text=TEXT, recipe=RECIPE):
    config = TrainerConfig(optimizer=recipe, evaluate_every=2, save_every=3, keep=1)
    windows = text.windows(**SIZE, seed=seed)
    return Trainer(run, tuning, windows, evaluate, config, tokenizer="byte")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, evaluate):
    """A finished run, its last state, and what it reported."""
    run = RunDirectory.create(tmp_path_factory.mktemp("runs"), "fox", {"any": "settings"})
    trainer = make_trainer(run, FullTuning(model), evaluate)
    reports, evaluations = [], []
    state = trainer.fit(
        trainer.start(),
        on_step=reports.append,
        on_evaluation=lambda *measured: evaluations.append(measured),
    )
    return run, state, reports, evaluations


def losses_of(run):
    return {line["step"]: line["loss"] for line in run.metrics() if "loss" in line}


def assert_equal(tree, expected):
    chex.assert_trees_all_equal(tree, expected)


def test_a_run_reports_and_keeps_what_it_measures(finished, model):
    run, state, reports, evaluations = finished
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert losses_of(run) == {report.step: report.loss for report in reports}
    assert [step for step, _ in evaluations] == [0, 2, 4]
    assert evaluations[-1][1] < evaluations[0][1]
    recorded = [line for line in run.metrics() if "held_out_bits_per_byte" in line]
    assert [(line["step"], line["held_out_bits_per_byte"]) for line in recorded] == evaluations
    assert RunDirectory.open(run.path).read_settings() == {"any": "settings"}

    assert [path.name for path in run.checkpoints] == ["00000004"]  # of 3 and 4 the newest
    saved, metadata = load_checkpoint(run.path)
    assert (metadata.step, metadata.tokenizer) == (4, "byte")
    # Runs made before know their text by this value.
    assert metadata.extra == {"text": hashlib.sha256(TEXT.tokens.tobytes()).hexdigest()}
    trained, start = FullTuning(model).result(state.params)
    assert_equal(nnx.state(saved), nnx.state(trained))
    assert start is None


@pytest.mark.slow
def test_nothing_is_printed_and_a_stopped_run_goes_on(finished, model, evaluate, tmp_path, capsys):
    run = RunDirectory.create(tmp_path, "fox", {})
    trainer = make_trainer(run, FullTuning(model), evaluate)
    steps = []
    state = trainer.fit(
        trainer.start(), on_step=steps.append, stop_requested=lambda: len(steps) == 2
    )
    assert int(state.step) == 2
    assert [path.name for path in run.checkpoints] == ["00000002"]

    resumed = make_trainer(run, FullTuning.from_checkpoint(run.path), evaluate)
    state = resumed.fit(resumed.resume())
    assert_equal(state.params, finished[1].params)
    assert losses_of(run) == losses_of(finished[0])
    assert capsys.readouterr() == ("", "")


def test_a_run_is_resumed_only_with_its_data_and_steps_left(finished, model, evaluate):
    run, tuning = finished[0], FullTuning.from_checkpoint(finished[0].path)
    with pytest.raises(ValueError, match=f"{run.path} has made all of its 4 steps"):
        make_trainer(run, tuning, evaluate).resume()
    other = dataclasses.replace(TEXT, tokens=TEXT.tokens[1:], source="another text")
    with pytest.raises(ValueError, match=r"trained on another text than is in another text now"):
        make_trainer(run, tuning, evaluate, text=other).resume()
    longer = dataclasses.replace(RECIPE, total_steps=9)
    state = make_trainer(run, tuning, evaluate, recipe=longer).resume()
    assert int(state.step) == 4
    assert_equal(state.opt_state, finished[1].opt_state)


def test_a_folder_without_a_checkpoint_is_not_resumed(model, evaluate, tmp_path):
    run = RunDirectory.create(tmp_path, "fox", {})
    with pytest.raises(CheckpointError, match="fox-1 has no checkpoint to resume from"):
        make_trainer(run, FullTuning(model), evaluate).resume()


def test_parameters_of_few_bits_are_not_trained():
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="training needs param_dtype='float32'"):
        FullTuning(model)


def test_what_is_tuned_beside_a_model_is_known_again(model, tmp_path):
    base = tmp_path / "base"
    lora = LoraTuning(model, LoraConfig(rank=2), base_path=base, seed=3)
    state = StateTuning(model, base_path=base)
    metadata = CheckpointMetadata("byte", 3, {"text": "x"})
    for tuning, name in ((lora, "lora"), (state, "state")):
        path = tmp_path / name
        initial = tuning.init()
        tuning.save(path, initial, metadata)
        params, loaded = tuning.load(path)
        assert_equal(params, initial)
        assert loaded == metadata
        assert load_tuning_checkpoint(path).base_path == str(base)
    with pytest.raises(CheckpointError, match=r"state has None, but LoraConfig.* is trained here"):
        lora.load(tmp_path / "state")
    other = LoraTuning(model, LoraConfig(rank=4), base_path=base, seed=3)
    with pytest.raises(CheckpointError, match=r"lora has LoraConfig\(rank=2.* but LoraConfig"):
        other.load(tmp_path / "lora")


def test_a_finished_run_of_state_tuning_leaves_a_file(model, tmp_path):
    tuning = StateTuning(model, base_path=tmp_path / "base")
    tuning.export(tmp_path, tuning.init())
    tuning.export(tmp_path, tuning.init())  # a resumed run writes it again
    assert [path.name for path in tmp_path.iterdir()] == ["state.pth"]
    lora = LoraTuning(model, LoraConfig(rank=2), base_path=tmp_path / "base", seed=0)
    merged, start = lora.result(lora.init())
    assert_equal(nnx.state(merged), nnx.state(model))  # new adapters change nothing
    assert start is None
    same, start = tuning.result(tuning.init())
    assert same is model
    assert start.wkv.shape == (1, 1, 2, 16, 16)


@pytest.mark.parametrize("name", ["evaluate_every", "save_every", "keep"])
def test_a_number_that_makes_no_sense(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        TrainerConfig(optimizer=RECIPE, **{name: 0})
