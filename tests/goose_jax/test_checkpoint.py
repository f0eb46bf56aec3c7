import contextlib
import json
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.checkpoints import (
    CheckpointError,
    CheckpointMetadata,
    CheckpointWarning,
    load_checkpoint,
    load_optimizer_state,
    read_contents,
    save_checkpoint,
)
from goose_jax.checkpoints.native import checkpoint_path
from goose_jax.training import OptimizerConfig, make_optimizer

CONFIG = RWKV7Config(
    vocab_size=11, hidden_size=32, num_layers=2, head_size=16, compute_dtype="float32"
)
METADATA = CheckpointMetadata(tokenizer="byte", step=7, extra={"text": "abc"})
TRANSFORMATION = make_optimizer(OptimizerConfig(total_steps=50))


def make_model(param_dtype="float32"):
    """A model without its initialisation, filled with random numbers: cheaper."""
    config = RWKV7Config.from_dict(CONFIG.to_dict() | {"param_dtype": param_dtype})
    graphdef, state = nnx.split(nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def opt_state(model):
    """After a step, so that nothing is zero."""
    params = params_of(model)
    state = jax.jit(TRANSFORMATION.init)(params)
    return jax.jit(TRANSFORMATION.update)(params, state, params)[1]


@pytest.fixture(scope="module")
def saved(model, opt_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(path, model, METADATA, opt_state=opt_state)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, reference in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert x.dtype == reference.dtype
        np.testing.assert_array_equal(x, reference)


def test_a_model_comes_back(saved, model):
    loaded, metadata = load_checkpoint(saved)
    assert loaded.config == CONFIG
    assert metadata == METADATA
    assert_equal(params_of(loaded), params_of(model))
    # Not bound to a device, or a program compiled for a new model would be compiled again for it.
    assert not any(leaf.committed for leaf in jax.tree.leaves(nnx.state(loaded)))


def test_an_optimizer_state_comes_back(saved, model, opt_state):
    like = jax.eval_shape(TRANSFORMATION.init, params_of(model))
    assert_equal(load_optimizer_state(saved, like), opt_state)


def test_bfloat16_comes_back(tmp_path):
    model = make_model("bfloat16")
    save_checkpoint(tmp_path / "a", model, METADATA)
    loaded, _ = load_checkpoint(tmp_path / "a")
    assert loaded.head[...].dtype == jnp.bfloat16
    assert_equal(params_of(loaded), params_of(model))


def test_a_model_needs_no_optimizer(copy, model):
    shutil.rmtree(copy / "optimizer")
    assert_equal(params_of(load_checkpoint(copy)[0]), params_of(model))
    like = jax.eval_shape(TRANSFORMATION.init, params_of(model))
    with pytest.raises(CheckpointError, match=f"{copy} is damaged: optimizer/.* is missing"):
        load_optimizer_state(copy, like)


def test_a_model_alone_has_no_optimizer_state(tmp_path, model):
    save_checkpoint(tmp_path / "a", model, METADATA)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'a'} holds a model without"):
        load_optimizer_state(tmp_path / "a", {})


def test_the_way_of_computing_may_change(saved):
    loaded, _ = load_checkpoint(saved, compute_dtype="bfloat16", remat="full")
    assert loaded.config.compute_dtype == "bfloat16"


def test_the_newest_checkpoint_of_a_run_is_found(saved, tmp_path):
    for step in (9, 10, 200):
        copied = pathlib.Path(shutil.copytree(saved, checkpoint_path(tmp_path, step)))
        edit(copied, "metadata.json", step=step)
    assert load_checkpoint(tmp_path)[1].step == 200


@pytest.fixture
def damaged_run(saved, tmp_path):
    """The checkpoints of steps 10 and 200 are damaged in different ways, that of step 9 is not."""
    for step in (9, 10, 200):
        shutil.copytree(saved, checkpoint_path(tmp_path, step))
        edit(checkpoint_path(tmp_path, step), "metadata.json", step=step)
    file = next(file for file in (checkpoint_path(tmp_path, 10) / "params").rglob("*") if
                file.is_file() and file.stat().st_size)  # fmt: skip
    file.write_bytes(file.read_bytes()[:-1])
    (checkpoint_path(tmp_path, 200) / "checksums.json").unlink()
    return tmp_path


def test_damaged_checkpoints_of_a_run_are_passed_over(damaged_run, model, monkeypatch):
    monkeypatch.chdir(damaged_run.parent)
    with pytest.warns(CheckpointWarning) as warned:
        loaded, metadata = load_checkpoint(damaged_run.name)
    assert metadata.step == 9
    assert_equal(params_of(loaded), params_of(model))
    older = checkpoint_path(damaged_run, 9)
    first, second = (str(warning.message) for warning in warned)
    assert first.startswith(f"{checkpoint_path(damaged_run, 200) / 'checksums.json'} is damaged: ")
    assert second.startswith(f"{checkpoint_path(damaged_run, 10)} is damaged: params/")
    assert first.endswith(f"; going on from {older}")
    assert second.endswith(f"; going on from {older}")
    with pytest.warns(CheckpointWarning):  # the description of step 10 is intact
        assert read_contents(damaged_run).metadata.step == 10
    for named in (10, 200):  # one that is named itself has none before it
        with pytest.raises(CheckpointError, match=r"is damaged|is neither a checkpoint"):
            load_checkpoint(checkpoint_path(damaged_run, named))


def test_a_run_whose_checkpoints_are_all_damaged(damaged_run):
    (checkpoint_path(damaged_run, 9) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"all checkpoints of {damaged_run} are") as error:
        load_checkpoint(damaged_run)
    text = str(error.value)
    assert f"{checkpoint_path(damaged_run, 9)} is damaged: config.json is missing" in text
    assert f"{checkpoint_path(damaged_run, 10)} is damaged: params/" in text
    assert f"{checkpoint_path(damaged_run, 200) / 'checksums.json'} is damaged" in text
    for step in range(20, 30):
        checkpoint_path(damaged_run, step).mkdir()
    with pytest.raises(CheckpointError, match="; and 5 more"):
        load_checkpoint(damaged_run)


def test_several_processes_do_not_choose_a_checkpoint_each(damaged_run, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match=f"{checkpoint_path(damaged_run, 200)}.* is damaged"):
        load_checkpoint(damaged_run)


def test_nothing_is_written_over(saved, model, tmp_path):
    with pytest.raises(FileExistsError, match=f"{saved} exists"):
        save_checkpoint(saved, model, METADATA)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        save_checkpoint(tmp_path / "file" / "checkpoint", model, METADATA)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_killed_run_left_is_no_obstacle(model, tmp_path):
    (tmp_path / ".a.unfinished" / "params").mkdir(parents=True)
    save_checkpoint(tmp_path / "a", model, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@contextlib.contextmanager
def files_limited_to(num_bytes):
    """No file may become longer: writing fails then as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def run(saved, tmp_path):
    """A run with a checkpoint of step 7."""
    shutil.copytree(saved, checkpoint_path(tmp_path / "run", 7))
    return tmp_path / "run"


def assert_untouched(run, model):
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000007"]
    assert_equal(params_of(load_checkpoint(run)[0]), params_of(model))


@pytest.mark.parametrize("num_bytes", [0, 5000, 100_000])
def test_a_full_disk(run, model, num_bytes, capfd):
    later = checkpoint_path(run, 8)
    message = f"could not save the checkpoint {later}: .*File too large"
    with files_limited_to(num_bytes), pytest.raises(OSError, match=message):
        save_checkpoint(later, model, METADATA)
    assert capfd.readouterr().err == ""
    assert_untouched(run, model)


def test_a_disk_that_becomes_full_while_writing(run, model, monkeypatch):
    def save(checkpointer, path, args):
        path.mkdir()
        (path / "half").write_bytes(b"half of an array")
        raise ValueError('Error writing "a/0.0": Failed to write 9 bytes: No space left on device')

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", save)
    later = checkpoint_path(run, 8)
    with pytest.raises(OSError, match=f"the checkpoint {later}: No space left on device"):
        save_checkpoint(later, model, METADATA)
    assert_untouched(run, model)


def test_an_interrupted_save_leaves_nothing(run, model, monkeypatch):
    def save(checkpointer, path, args):
        path.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", save)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(checkpoint_path(run, 8), model, METADATA)
    assert_untouched(run, model)


def largest_file(path):
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda file: file.stat().st_size)


def cut(path):
    file = largest_file(path / "params")
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(path):
    file = largest_file(path / "params")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove_a_file(path):
    largest_file(path / "params").unlink()


def remove_the_config(path):
    (path / "config.json").unlink()


def break_the_config(path):
    (path / "config.json").write_text('{"vocab_size": 11, ')


def break_the_checksums(path):
    (path / "checksums.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [cut, flip_a_bit, remove_a_file, remove_the_config, break_the_config, break_the_checksums],
)
def test_a_damaged_checkpoint_is_named(copy, damage):
    damage(copy)
    with pytest.raises(CheckpointError, match=rf"{copy}\b.* is damaged: "):
        load_checkpoint(copy)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path / 'nowhere'}"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"{tmp_path} is neither a checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'file'} is neither a checkpoint"):
        load_checkpoint(tmp_path / "file")


def edit(path, name, **values):
    """Changes a JSON file and its checksum, as someone would who means it."""
    checksums = json.loads((path / "checksums.json").read_text())
    file = path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    del checksums[name]
    (path / "checksums.json").write_text(json.dumps(checksums))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_layers": 3},
            r"params does not fit its configuration: blocks\.channel_mix\.key is "
            r"float32\[2, 32, 128\] in the file and float32\[3, 32, 128\] in the model",
        ),
        ({"param_dtype": "bfloat16"}, r"in the file and bfloat16\[2, 32, 128\] in the model"),
        ({"unheard_of": 1}, "unknown=.'unheard_of'."),
        ({"head_size": 5}, "head_size"),
    ],
)
def test_a_config_that_does_not_fit(copy, values, message):
    edit(copy, "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(copy)
    if "num_layers" in values:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(copy, **values)


def test_another_format_is_refused(copy):
    edit(copy, "metadata.json", format=2)
    with pytest.raises(CheckpointError, match=f"{copy} has format 2, but 1 is read here"):
        load_checkpoint(copy)


BAD_METADATA = [
    (b"", "Expecting value: line 1 column 1"),
    (b"{", "line 1 column 2"),
    (b'{"format": 1, "tok', "Unterminated string starting at: line 1 column 15"),
    (b"\0", "Expecting value"),
    (b"\xff", "byte 0xff in position 0"),
    (b"[" * 10**5, "recursion"),
    (b"x" * 10**6, "Expecting value"),
    (b"[]", "it holds no JSON object"),
    (b"null", "it holds no JSON object"),
    (b"{}", "has format None, but 1 is read here"),
    (b'{"format": 1}', "it is no metadata: only "),
    ({"format": "1"}, "has format '1'"),
    ({"format": True}, "has format True"),
    ({"format": 1.0}, r"has format 1\.0"),
    ({"format": "x" * 10**5}, r"has format 'xxx.*\.\.\."),
    ({"step": -1}, "it is no metadata: step is -1"),
    ({"step": "7"}, "it is no metadata: step is '7'"),
    ({"step": 1.5}, r"it is no metadata: step is 1\.5"),
    ({"step": True}, "it is no metadata: step is True"),
    ({"step": None}, "it is no metadata: step is None"),
    ({"step": 2**31}, "it is no metadata: step is 2147483648"),
    ({"tokenizer": 3}, "it is no metadata: tokenizer is 3"),
    ({"tokenizer": ["byte"]}, r"it is no metadata: tokenizer is \['byte'\]"),
    ({"tokenizer": ""}, "it is no metadata: tokenizer is ''"),
    ({"tokenizer": "a\0b"}, r"it is no metadata: tokenizer is 'a\\x00b'"),
    ({"tokenizer": "/tmp/" + "x" * 256}, "it is no metadata: tokenizer is '/tmp/xxx"),
    ({"extra": None}, "it is no metadata: extra is None"),
    ({"extra": [], "step": -1}, r"it is no metadata: step is -1, extra is \[\]"),
    ({"more": 1}, "it is no metadata: more is 1"),
    ({"x" * 10**5: "\ud800" * 1000}, "it is no metadata: xxx"),
]


@pytest.mark.parametrize(("change", "message"), BAD_METADATA, ids=lambda value: str(value)[:40])
def test_damaged_metadata_are_named(saved, tmp_path, change, message):
    """Also where checksums know nothing of it. Parameters are not read before."""
    text = json.dumps(json.loads((saved / "metadata.json").read_text()) | change).encode() if (
        isinstance(change, dict)) else change  # fmt: skip
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "metadata.json").write_bytes(text)
    (tmp_path / "checksums.json").write_text("{}")
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path)
    shown = str(error.value)
    assert shown.startswith((f"{tmp_path / 'metadata.json'} is damaged", f"{tmp_path} has format"))
    assert len(shown) < 400 + len(str(tmp_path))
    assert shown.isprintable()


def test_an_optimizer_state_that_does_not_fit(saved):
    with pytest.raises(CheckpointError, match="optimizer does not fit its configuration: "):
        load_optimizer_state(saved, {"count": jnp.zeros((), jnp.int32)})
