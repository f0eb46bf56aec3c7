"""Meshes of 8 devices of a CPU give what one device gives; partition rules; wrong meshes."""

import dataclasses
import io
import os
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterable

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from goose_jax import RWKV7Config
from goose_jax.checkpoints import (
    CheckpointMetadata,
    load_pretrained,
    save_checkpoint,
    save_pretrained,
)
from goose_jax.checkpoints.state_files import write_time_states
from goose_jax.cli.main import main
from goose_jax.data import next_token_batch
from goose_jax.nn import abstract_model
from goose_jax.parallel import (
    PARTITION_RULES,
    check_mesh,
    describe_mesh,
    make_mesh,
    parse_mesh,
    partition_spec,
)
from goose_jax.parallel.in_model import compiler_options
from goose_jax.training import (
    LoraConfig,
    OptimizerConfig,
    init_lora,
    init_tuning_state,
    init_wkv,
    make_train_step,
    mean_loss,
)
from tests.goose_jax.parallel_runs import MESHES
from tests.goose_jax.random_parameters import assert_same_params, make_model
from tests.helpers import relative_rms

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = RWKV7Config(vocab_size=258, hidden_size=64, num_layers=3, head_size=16)


def abstract_mesh(**sizes):
    axes = ("data", "fsdp", "context", "tensor")
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    return AbstractMesh(shape, axes, (AxisType.Auto,) * 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of `parallel_runs`, by name."""
    file = tmp_path_factory.mktemp("runs") / "results.npz"
    command = [sys.executable, "-m", "tests.goose_jax.parallel_runs", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def under(runs, name):
    return {key: value for key, value in runs.items() if key.startswith(f"{name}/")}


def assert_same(runs, name, reference):
    """Losses and gradients of each step, and the parameters and first moments after the last."""
    found, expected = under(runs, name), under(runs, reference)
    assert len(found) == len(expected) > 2
    assert len({*found[f"{name}/losses"][:, 0]}) == 5  # the steps differ
    for key, value in expected.items():
        other = found[key.replace(f"{reference}/", f"{name}/", 1)]
        if not value.any():  # the value residual of the first layer, for example
            np.testing.assert_array_equal(other, value, err_msg=key)
        else:
            assert relative_rms(other, value) < 2e-5, (key, relative_rms(other, value))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_five_steps_on_a_mesh_are_those_of_one_device(runs, name):
    assert_same(runs, name, "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "2 x 2 x 2"])
def test_microbatches_on_a_mesh_make_the_step_of_one_device(runs, name):
    found, expected = runs[f"microbatches {name}"], runs["microbatches one"]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def collectives_in_loops(program: str) -> tuple[list[str], list[str]]:
    """Returns the collectives of a compiled program, by kind: those in loops, and the others."""
    bodies = dict(
        re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S)
    )
    called = {
        name: re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", body)
        for name, body in bodies.items()
    }
    pending = re.findall(r"(?:body|condition)=%?([\w.\-]+)", program)
    in_loops = set()
    while pending:
        name = pending.pop()
        if name not in in_loops:
            in_loops.add(name)
            pending += called[name]

    def of(names: Iterable[str]) -> list[str]:
        kinds = (
            r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
        )
        return re.findall(kinds, "\n".join(bodies[name] for name in names))

    return of(in_loops), of(bodies.keys() - in_loops)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "fsdp": 2}])
def test_a_step_of_several_microbatches_sums_gradients_over_devices_once(sizes):
    """Except over fsdp: of each microbatch, a device keeps only its part of the gradient's sum."""
    config = dataclasses.replace(CONFIG, num_layers=2, vocab_size=38, remat="none")
    mesh, recipe = make_mesh(**sizes), OptimizerConfig(total_steps=20)
    model = abstract_model(config)
    state = jax.eval_shape(
        lambda params: init_tuning_state(params, recipe),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    )
    tokens = np.zeros((2, 8, 9), np.int32)  # two microbatches
    batch = jax.tree.map(lambda x: x.reshape(2, 8, 8), next_token_batch(tokens.reshape(16, 9)))
    program = make_train_step(model, recipe, mesh=mesh).lower(state, batch).compile().as_text()
    inside, outside = collectives_in_loops(program)
    assert "all-reduce" in outside
    divided = {"all-gather", "reduce-scatter", "all-to-all"}  # the last one is of the embeddings
    assert set(inside) == (divided if "fsdp" in sizes else set())
    # The table of the embeddings is never gathered.
    assert "[38,64]" not in "".join(re.findall(r"=(.*) all-gather(?:-start)?\(", program))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_states_between_pieces_of_rows_are_not_computed_again(remat):
    def gathered(remat):
        config = dataclasses.replace(CONFIG, num_layers=1, remat=remat)
        model, recipe = abstract_model(config), OptimizerConfig(total_steps=20)
        state = jax.eval_shape(
            lambda params: init_tuning_state(params, recipe),
            nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        )
        step = make_train_step(model, recipe, mesh=make_mesh(data=1, context=2))
        batch = next_token_batch(np.zeros((1, 129), np.int32))
        return str(step.trace(state, batch).jaxpr).count("all_gather[")

    assert gathered(remat) == gathered("none") > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "state"])
def test_five_steps_of_fine_tuning_on_a_mesh_are_those_of_one_device(runs, kind):
    assert_same(runs, f"{kind} mesh", f"{kind} one")


@pytest.mark.slow
def test_parameters_created_on_a_mesh_are_those_of_one_device_and_divided(runs):
    expected = under(runs, "expected")
    for key, value in expected.items():
        np.testing.assert_allclose(runs[key.replace("expected", "created")], value, atol=1e-6)
    size = sum(value.nbytes for value in expected.values())
    assert runs["bytes of a device"] < size / 2
    shares = {key.removeprefix("share/"): value for key, value in under(runs, "share").items()}
    assert shares["blocks.time_mix.key"] == shares["head"] == shares["embedding"] == 1 / 8
    assert shares["blocks.time_mix.bonus"] == 1 / 2
    assert shares["blocks.time_mix_norm.scale"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["one", "mesh"])
def test_a_divided_checkpoint_is_loaded_bit_by_bit_on_other_devices(runs, where):
    saved = under(runs, f"saved {where}")
    assert len(saved) > 80
    for key, value in saved.items():
        found = runs[key.replace("saved", "loaded")]
        assert (found.dtype, found.tobytes()) == (value.dtype, value.tobytes()), key
    divided = "spec=P('fsdp', 'tensor')" in str(runs[f"division {where}"])
    assert divided == (where == "mesh")


def test_each_large_parameter_and_adapter_has_a_rule_that_divides_it():
    mesh = abstract_mesh(fsdp=2, tensor=2)
    params = nnx.to_pure_dict(nnx.state(abstract_model(CONFIG), nnx.Param))
    lora = jax.eval_shape(lambda: init_lora(params, LoraConfig(rank=4), jax.random.key(0)))
    wkv = jax.eval_shape(lambda: init_wkv(CONFIG))
    seen = set()
    for tree in (params, lora, wkv):
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            spec = partition_spec(path, leaf.shape, mesh)
            assert partition_spec(name, leaf.shape, mesh) == spec
            seen |= {rule for rule in PARTITION_RULES if f".{name}".endswith(f".{rule}")}
            if leaf.size > CONFIG.num_layers * 6 * CONFIG.hidden_size:
                assert any(spec), name
    assert seen == set(PARTITION_RULES)  # no rule is for a name that does not exist


def test_moments_of_the_optimizer_are_divided_as_their_parameters():
    mesh = abstract_mesh(fsdp=2)
    recipe = OptimizerConfig(total_steps=20)
    model = nnx.state(abstract_model(CONFIG), nnx.Param)
    state = jax.eval_shape(
        lambda params: init_tuning_state(params, recipe), nnx.to_pure_dict(model)
    )
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree.leaves_with_path(state)
        if partition_spec(path, leaf.shape, mesh) == P(None, "fsdp", None)
    ]
    assert len([path for path in paths if path.endswith("blocks.channel_mix.key")]) == 3


def test_a_vocabulary_that_an_axis_does_not_divide_stays_whole():
    mesh = abstract_mesh(tensor=2, fsdp=2)
    assert partition_spec("embedding", (257, 64), mesh) == P(None, "fsdp")
    assert partition_spec("embedding", (258, 64), mesh) == P("tensor", "fsdp")


def test_two_axes_divide_the_rows_of_a_matrix_if_their_product_does():
    mesh = abstract_mesh(tensor=2, fsdp=3)
    name = "blocks.channel_mix.value"
    assert partition_spec(name, (4, 12, 8), mesh) == P(None, ("tensor", "fsdp"), None)
    assert partition_spec(name, (4, 8, 8), mesh) == P(None, "tensor", None)
    assert partition_spec(name, (4, 9, 8), mesh) == P(None, "fsdp", None)
    assert partition_spec(name, (4, 5, 8), mesh) == P(None, None, None)


def test_a_mesh_is_read_from_a_text():
    assert parse_mesh("data=2, fsdp=4") == {"data": 2, "fsdp": 4}
    assert describe_mesh(abstract_mesh(data=2, tensor=4)) == "data=2 x tensor=4"
    assert describe_mesh(make_mesh(data=1)) == "1 device"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "'data', but each part must be AXIS=SIZE"),
        ("rows=2", "'rows=2', but each part must be AXIS=SIZE, with an axis of data, fsdp"),
        ("data=2,data=4", "gives the axis data twice"),
        ("data=0", "the size of 'data' must be an integer >= 1"),
        ("data=two", "the size of 'data' must be an integer >= 1"),
    ],
)
def test_a_wrong_text_of_a_mesh_names_the_part(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_a_mesh_of_another_number_of_devices_says_what_fits():
    with pytest.raises(
        ValueError, match=r"tensor of 3 needs a multiple of 3 devices, but .* are 8"
    ):
        make_mesh(tensor=3, devices=[object()] * 8)
    with pytest.raises(ValueError, match=r"data of 4, fsdp of 4 has 16 devices, .* 8; data of 2"):
        make_mesh(data=4, fsdp=4, devices=[object()] * 8)
    with pytest.raises(ValueError, match="fsdp"):
        make_mesh(fsdp=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 2, "fsdp": 2},
            "data and fsdp, of 2 x 2 devices, cannot divide batch_size=6: .* of 4, such as 8",
        ),
        ({"tensor": 8}, "tensor=8 cannot divide num_heads=4; sizes that would fit: 1, 2, 4"),
        ({"fsdp": 3}, "fsdp=3 cannot divide hidden_size=64; .* 1, 2, 4, 8, 16, 32, 64"),
        (
            {"context": 5},
            "context=5 x tensor=1 cannot divide sequence_length=96: .* 5, such as 100",
        ),
        ({"context": 32, "tensor": 2}, "context=32 x tensor=2 cannot divide sequence_length=96"),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_axis_and_what_would_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(abstract_mesh(**sizes), CONFIG, batch_size=6, sequence_length=96)


def test_xla_knows_the_options_for_training_steps_on_several_gpus():
    gpus = np.array([types.SimpleNamespace(platform="gpu")] * 2)
    options = compiler_options(types.SimpleNamespace(size=2, devices=gpus))
    assert options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_unknown": 1})(1)
    assert compiler_options(make_mesh(fsdp=2)) == compiler_options(None) == {}


def test_a_train_step_refuses_a_mesh_before_it_compiles():
    with pytest.raises(ValueError, match="tensor=8 cannot divide num_heads=4"):
        make_train_step(
            abstract_model(CONFIG), OptimizerConfig(total_steps=20), mesh=abstract_mesh(tensor=8)
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    sizes = {"vocab_size": 258, "hidden_size": 64, "head_size": 16, "intermediate_size": 64}
    model = make_model(**sizes, compute_dtype="float32")
    save_checkpoint(path, model, CheckpointMetadata("byte"))
    return str(path)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_divided_model_generates_what_one_device_does(checkpoint, capsys):
    for mesh in ([], ["--mesh=fsdp=2,tensor=4"]):
        main(["generate", checkpoint, "--prompt=a", "--max-new-tokens=12", "--seed=3", *mesh])
    texts = capsys.readouterr().out
    assert len(texts) > 12
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_divided_model_chats_as_one_device_does(checkpoint, capsys, monkeypatch, tmp_path):
    """Also where it goes on with a conversation that was saved on other devices."""
    one, divided = [], ["--mesh=tensor=2,fsdp=2"]

    def say(message, *arguments, save):
        lines = f"{message}\n/save {tmp_path / save}\n/history\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        main(["chat", checkpoint, "--max-new-tokens=6", "--temperature=0", *arguments])
        return capsys.readouterr().out.replace(save, "FILE")

    first = say("Hi", *one, save="one.chat")
    assert "[saved in" in first
    assert first == say("Hi", *divided, save="divided.chat")
    second = say("Why?", f"--load={tmp_path / 'divided.chat'}", *one, save="again.chat")
    assert "Why?" in second
    assert second == say("Why?", f"--load={tmp_path / 'one.chat'}", *divided, save="other.chat")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_divided_model_is_evaluated_as_on_one_device(checkpoint, capsys, tmp_path):
    text, state = tmp_path / "text.txt", tmp_path / "state.pth"
    text.write_text("the quick brown fox jumps over the lazy dog")
    values = 1e4 * np.random.default_rng(0).normal(size=(2, 4, 16, 16))
    write_time_states(state, list(values.astype(np.float32)))
    bits = []
    for start in ([], [f"--state={state}"]):
        for mesh in ([], ["--mesh=data=2,fsdp=2,tensor=2"]):
            sizes = ["--batch-size=4", "--sequence-length=8"]
            main(["evaluate", checkpoint, str(text), *sizes, *start, *mesh])
            out = capsys.readouterr().out
            bits.append(float(out.split()[0]))
            assert ("on 8 x cpu (cpu), mesh data=2 x fsdp=2 x tensor=2" in out) == bool(mesh)
    np.testing.assert_allclose(bits[::2], bits[1::2], atol=2e-4)
    assert abs(bits[0] - bits[2]) > 1e-3


@pytest.mark.parametrize(
    ("command", "mesh", "message"),
    [
        ("generate", "tensor=3", "mesh axis tensor=3 cannot divide num_heads=4; sizes that would"),
        ("generate", "rows=2", "--mesh 'rows=2' has 'rows=2', but each part must be AXIS=SIZE"),
        ("generate", "tensor=16", "tensor of 16 has 16 devices, but there are 8"),
        ("chat", "tensor=2,data=2", "data divides batches, but this command works on one text"),
        ("chat", "context=2", "context divides batches, but this command works on one text"),
        ("chat", "fsdp=6", "mesh axis fsdp=6 cannot divide hidden_size=64"),
        ("evaluate", "fsdp=8", "of 1 x 8 devices, cannot divide --batch-size=4"),
        ("evaluate", "data=1,context=8", "context=8 x tensor=1 cannot divide --sequence-length=12"),
        ("evaluate", "data=1,fsdp=3", "of 1 x 3 devices, cannot divide --batch-size=4"),
    ],
)
def test_commands_refuse_a_mesh_that_does_not_fit(
    checkpoint, capsys, tmp_path, command, mesh, message
):
    arguments = []
    if command == "evaluate":
        (tmp_path / "text").write_text("text")
        arguments = [str(tmp_path / "text"), "--batch-size=4", "--sequence-length=12"]
    with pytest.raises(SystemExit):
        main([command, checkpoint, *arguments, f"--mesh={mesh}"])
    assert message in capsys.readouterr().err


def test_a_file_of_another_program_is_divided_as_it_is_read(checkpoint, tmp_path):
    model, _ = load_pretrained(checkpoint)
    save_pretrained(model, tmp_path / "model.pth", "pth")
    found, _ = load_pretrained(tmp_path / "model.pth", mesh=make_mesh(fsdp=2, tensor=4))
    assert_same_params(found, model)
    assert found.head[...].sharding.spec == P("fsdp", None)
    assert found.blocks.time_mix.key[...].sharding.spec == P(None, "fsdp", "tensor")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_model_on_a_mesh_with_explicit_axes_is_that_of_one_device():
    """`jax.make_mesh` makes such a mesh; there, the types of arrays say how they are divided."""
    mesh = jax.make_mesh((4,), ("rows",))
    assert mesh.axis_types == (AxisType.Explicit,)
    model = make_model(compute_dtype="float32")
    graphdef, params = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 6), np.int32)
    batch = next_token_batch(tokens)

    @jax.jit
    def differentiate(params, batch):
        return jax.value_and_grad(lambda p: mean_loss(nnx.merge(graphdef, p), batch))(params)

    expected, of_one = differentiate(params, batch)
    with jax.set_mesh(mesh):
        divided = jax.device_put(batch, NamedSharding(mesh, P("rows")))
        found, gradient = differentiate(jax.device_put(params, NamedSharding(mesh, P())), divided)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_one), strict=True):
        assert relative_rms(a, b) < 1e-4, relative_rms(a, b)
