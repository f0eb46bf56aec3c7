"""A training run from Python, on a model small enough to compile in a moment."""

import dataclasses
import gc
import hashlib
import resource
import weakref

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.checkpoints import CheckpointError, CheckpointMetadata, load_checkpoint
from goose_jax.checkpoints.native import checkpoint_path
from goose_jax.data import Document, RandomWindows, TrainingText
from goose_jax.text import ByteTokenizer
from goose_jax.training import (
    FullTuning,
    LoraConfig,
    LoraTuning,
    NonFiniteError,
    OptimizerConfig,
    RunDirectory,
    StateTuning,
    Trainer,
    TrainerConfig,
    init_tuning_state,
    load_tuning_checkpoint,
    make_evaluation,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile", "module_compilation_cache")

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


def make_trainer(run, tuning, evaluate, *, seed=0, text=TEXT, recipe=RECIPE, **more):
    every = {"log_every": 1, "evaluate_every": 2, "save_every": 3, "keep": 1} | more
    config = TrainerConfig(optimizer=recipe, **every)
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
    assert metadata.extra["text"] == hashlib.sha256(TEXT.tokens.tobytes()).hexdigest()
    trained, start = FullTuning(model).result(state.params)
    assert_equal(nnx.state(saved), nnx.state(trained))
    assert start is None


@pytest.mark.slow
def test_nothing_is_printed_and_a_stopped_run_goes_on(finished, model, evaluate, tmp_path, capsys):
    run = RunDirectory.create(tmp_path, "fox", {})
    trainer = make_trainer(run, FullTuning(model), evaluate)
    answers = iter([False, True])
    state = trainer.fit(trainer.start(), stop_requested=lambda: next(answers))
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


@dataclasses.dataclass(frozen=True)
class WithBadTokens:
    """A source of batches, of which those of some steps hold a token that the model lacks."""

    batches: RandomWindows
    bad: tuple[int, ...]
    source = "fox"
    checksum = "fox"

    def for_process(self, index, count):
        return self

    def __call__(self, step):
        batch = self.batches(step)
        if step not in self.bad:
            return batch
        inputs = batch.inputs.copy()  # targets are a part of the same array
        inputs[0, 3] = 99999
        return dataclasses.replace(batch, inputs=inputs)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_or_ends_the_run(model, evaluate, tmp_path):
    run = RunDirectory.create(tmp_path, "fox", {})
    recipe = dataclasses.replace(RECIPE, total_steps=16)
    more = {"recipe": recipe, "log_every": 4, "save_every": 16, "evaluate_every": 16}
    trainer = make_trainer(run, FullTuning(model), evaluate, non_finite="skip", **more)
    windows = trainer.batches
    trainer.batches = WithBadTokens(windows, bad=(0, 5, 6))
    reports = []
    state = trainer.fit(trainer.start(), on_step=reports.append)
    assert int(state.step) == 16
    assert [report.step for report in reports if not report.is_finite] == [1, 6, 7]
    assert [line.get("skipped", 0) for line in run.metrics() if "loss" in line] == [1, 2, 0, 0]
    kept = sorted((run.path / "non_finite").iterdir())
    assert [path.name for path in kept] == ["00000001.npz", "00000006.npz", "00000007.npz"]
    with np.load(kept[1]) as archive:
        assert archive["inputs"][0, 3] == 99999
        np.testing.assert_array_equal(archive["targets"], windows(5).targets)
    params, _ = FullTuning(model).load(run.newest_checkpoint)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))

    trainer.tuning = FullTuning(model)
    trainer.batches = WithBadTokens(windows, bad=tuple(range(3, 13)))
    with pytest.raises(NonFiniteError, match=r"step 13: the loss is nan.*00000013.npz"):
        trainer.fit(trainer.start())
    stopping = make_trainer(run, FullTuning(model), evaluate, **more)
    stopping.batches = WithBadTokens(windows, bad=(5,))
    with pytest.raises(NonFiniteError, match=rf"step 6: .*\(its batch is in {run.path}/non_f"):
        stopping.fit(stopping.start())


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_not_saved(model, evaluate, tmp_path):
    """The gradient of the last step is finite, the parameters after it are not."""
    run = RunDirectory.create(tmp_path, "fox", {})
    recipe = dataclasses.replace(RECIPE, learning_rate=3e38, warmup_steps=0, weight_decay=9.0)
    trainer = make_trainer(run, FullTuning(model), evaluate, recipe=recipe, save_every=1)
    with pytest.raises(NonFiniteError, match=r"step 1: params\..* not finite; no checkpoint was"):
        trainer.fit(trainer.start())
    assert run.checkpoints == []


class Recorder:
    def __init__(self):
        self.written = []

    def write(self, step, values):
        self.written.append((step, dict(values)))

    def close(self):
        pass


@pytest.mark.slow
def test_lines_of_several_steps_and_other_writers(model, evaluate, finished, tmp_path):
    """Means over the steps, of which none is left out or counted twice."""
    run, writer = RunDirectory.create(tmp_path, "fox", {}), Recorder()
    trainer = make_trainer(run, FullTuning(model), evaluate, log_every=3, peak_flops=1e12)
    trainer.writers = [writer]
    trainer.fit(trainer.start())
    lines = [line for line in run.metrics() if "loss" in line]
    single = losses_of(finished[0])
    assert [line["step"] for line in lines] == [2, 3, 4]  # 2 and 4: it measures
    expected = [(single[1] + single[2]) / 2, single[3], single[4]]
    np.testing.assert_allclose([line["loss"] for line in lines], expected, rtol=1e-6)
    assert [line["tokens"] for line in lines] == [48, 24, 24]
    for line in lines:
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / np.log(2) * 46 / 45)
        assert 0 < line["mfu"] < 1
        assert line["host_memory_bytes"] > 1e7
    assert writer.written == [(line.pop("step"), line) for line in run.metrics()]


def test_which_checkpoints_are_kept(tmp_path):
    run = RunDirectory.create(tmp_path, "fox", {})
    for step, bits in {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: None, 12: 3.2}.items():
        if bits is not None:
            run.log({"step": step, "held_out_bits_per_byte": bits})
        checkpoint_path(run.path, step).mkdir(parents=True)
        run.remove_old(keep=2, keep_best=True, keep_every=6)
    assert [int(path.name) for path in run.checkpoints] == [4, 6, 10, 12]
    assert run.best_checkpoint.name == "00000004"
    checkpoint_path(run.path, 14).mkdir()
    run.remove_old(keep=1)
    assert [int(path.name) for path in run.checkpoints] == [14]
    assert run.best_checkpoint is None


def test_a_half_written_line_of_metrics_is_dropped(tmp_path):
    run = RunDirectory.create(tmp_path, "fox", {})
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0})
    whole = run.metrics_file.read_bytes()
    for cut in (1, 5, 17):
        run.metrics_file.write_bytes(whole[:-cut])
        assert [line["step"] for line in run.metrics()] == [1, 2]
    run.rewind(1)
    assert run.metrics_file.read_text() == '{"step": 1, "loss": 1.0}\n'
    run.metrics_file.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2 is no line of metrics, remove it"):
        run.rewind(3)
    with pytest.raises(ValueError, match="loss must be a finite number"):
        run.log({"step": 4, "loss": float("nan")})


def test_a_line_of_metrics_is_written_completely_or_not_at_all(tmp_path):
    """The largest size of a file stands for a full disk: a part of a line still fits."""
    run = RunDirectory.create(tmp_path, "fox", {})
    run.log({"step": 1, "loss": 1.0})
    before = run.metrics_file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (0, 10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
            with pytest.raises(OSError, match=r"metrics.jsonl|File too large"):
                run.log({"step": 2, "loss": 1.0})
            assert run.metrics_file.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.log({"step": 2, "loss": 1.0})
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_parameters_of_few_bits_are_not_trained():
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="training needs param_dtype='float32'"):
        FullTuning(model)


def test_a_run_holds_the_parameters_once():
    model = RWKV7(CONFIG, rngs=nnx.Rngs(0))
    parameter = weakref.ref(model.head[...])
    tuning = FullTuning(model)
    del model
    state = init_tuning_state(tuning.init(), RECIPE)
    gc.collect()
    assert parameter() is None
    trained, _ = tuning.result(state.params)
    assert trained.head[...] is state.params["head"]
    with pytest.raises(RuntimeError, match="no parameters to start from: they have been handed"):
        tuning.init()


def test_what_is_tuned_beside_a_model_is_known_again(model, tmp_path):
    base = tmp_path / "base"
    lora = LoraTuning(model, LoraConfig(rank=2), base_path=base, seed=3)
    state = StateTuning(model, base_path=base)
    metadata = CheckpointMetadata("byte", 3, {"text": "x"})
    for tuning, name in ((lora, "lora"), (state, "state")):
        path = tmp_path / name
        initial = tuning.init()
        tuning.begin_save(path, initial, metadata).wait()
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


@pytest.mark.parametrize(
    "name", ["log_every", "evaluate_every", "save_every", "keep", "keep_every"]
)
def test_a_number_that_makes_no_sense(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        TrainerConfig(optimizer=RECIPE, **{name: 0})
