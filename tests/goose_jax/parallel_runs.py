"""Trains a tiny model on meshes of 8 devices of a CPU.

    python -m tests.goose_jax.parallel_runs FILE

JAX fixes the number of devices when it starts, so `test_parallel.py` runs this in a process of its
own. The file receives losses, and the parameters and moments after 5 steps, for each mesh.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.checkpoints import (
    CheckpointMetadata,
    begin_checkpoint,
    load_checkpoint,
    load_optimizer_state,
)
from goose_jax.data import next_token_batch
from goose_jax.parallel import make_mesh, place_tree
from goose_jax.parallel.placement import creation
from goose_jax.training import (
    LoraConfig,
    OptimizerConfig,
    init_lora,
    init_train_state,
    init_tuning_state,
    init_wkv,
    lora_loss,
    make_train_step,
    make_tuning_step,
    state_loss,
    with_params,
)

CONFIG = RWKV7Config(
    vocab_size=18, hidden_size=32, num_layers=2, head_size=8, compute_dtype="float32", remat="none"
)
RECIPE = OptimizerConfig(total_steps=50, warmup_steps=0, learning_rate=1e-3)
LORA = LoraConfig(rank=4)
STEPS, B, T = 5, 8, 32

MESHES = {
    "one": None,
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 1, "tensor": 4},
    "context": {"data": 1, "context": 8},
    "data x context": {"data": 2, "context": 4},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "2 x 2 x 2": {"fsdp": 2, "tensor": 2, "context": 2},
}
TUNING_MESH = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}


def make_model(**changes):
    """All parameters are away from their initial values, of which many are zero."""
    config = dataclasses.replace(CONFIG, **changes)
    graphdef, state = nnx.split(RWKV7(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(x.dtype), state)
    return nnx.merge(graphdef, noisy)


def batch(step, rows=B):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, T + 1))
    ids = np.cumsum(rng.random((rows, T + 1)) < 0.1, axis=1) + 1  # several segments in a row
    ids[:, -2:] = 0
    return next_token_batch(tokens, ids)


def train(step, state, *frozen, first=0):
    losses = []
    for number in range(STEPS):
        made = batch(number)
        if frozen and "wkv" in state.params:  # rows must be one sequence
            made = next_token_batch(np.pad(made.inputs, ((0, 0), (0, 1))))
        state, metrics = step(state, *frozen, made)
        losses.append([float(metrics.loss), float(metrics.gradient_norm), int(metrics.tokens)])
    return np.array(losses), state


def add(results, name, losses, state):
    results[f"{name}/losses"] = losses
    moments = state.opt_state[1]
    for kind, tree in {"params": state.params, "mu": moments.mu}.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            path = jax.tree_util.keystr(path, simple=True, separator=".")
            results[f"{name}/{kind}/{path}"] = jax.device_get(leaf)


def save_and_load(results, folder, step, state, model):
    """Saves a state that is divided, trains on while that is written, and loads the checkpoint."""
    saved = jax.device_get((state.params, state.opt_state))
    path = folder / "checkpoint"
    model = with_params(model, state.params)
    saving = begin_checkpoint(path, model, CheckpointMetadata("byte"), opt_state=state.opt_state)
    step(state, batch(STEPS))  # its buffers are donated
    saving.wait()
    for name, sizes in {"one": None, "mesh": TUNING_MESH}.items():
        mesh = None if sizes is None else make_mesh(**sizes)
        loaded, _ = load_checkpoint(path, mesh=mesh)
        params = nnx.to_pure_dict(nnx.state(loaded, nnx.Param))
        found = (params, load_optimizer_state(path, saved[1], mesh=mesh))
        for kind, tree in {"saved": saved, "loaded": found}.items():
            for key, leaf in jax.tree.leaves_with_path(tree):
                key = jax.tree_util.keystr(key, simple=True, separator=".")
                results[f"{kind} {name}/{key}"] = jax.device_get(leaf)
        results[f"division {name}"] = str(params["head"].sharding)


def main(file):
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    results = {}
    for name, sizes in MESHES.items():
        mesh = None if sizes is None else make_mesh(**sizes)
        # These take longer to compile, so they are on one mesh only.
        more = {"remat": "dots", "unroll_layers": True} if name == "2 x 2 x 2" else {}
        model = make_model(**more)
        model = model if mesh is None else place_tree(model, mesh)
        state = init_train_state(model, RECIPE, mesh=mesh)
        step = make_train_step(model, RECIPE, mesh=mesh)
        losses, state = train(step, state)
        add(results, name, losses, state)
        if name in ("one", "data", "2 x 2 x 2"):
            large = batch(STEPS, 2 * B)
            if mesh is not None:  # the same step in two microbatches
                large = jax.tree.map(lambda array: array.reshape(2, B, T), large)
            _, metrics = step(jax.tree.map(jnp.copy, state), large)
            results[f"microbatches {name}"] = [float(metrics.loss), float(metrics.gradient_norm)]
        if name == "fsdp":
            save_and_load(results, pathlib.Path(file).parent, step, state, model)

    for name, mesh in {"one": None, "mesh": make_mesh(**TUNING_MESH)}.items():
        model = make_model()
        frozen = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        lora = init_lora(frozen, LORA, jax.random.key(0))
        wkv = init_wkv(CONFIG)
        if mesh is not None:
            frozen = place_tree(frozen, mesh)
        for kind, trained, loss in (
            ("lora", lora, lora_loss(model, LORA)),
            ("state", wkv, state_loss(model)),
        ):
            step = make_tuning_step(loss, RECIPE, mesh=mesh)
            state = init_tuning_state(trained, RECIPE, mesh=mesh)
            add(results, f"{kind} {name}", *train(step, state, frozen))

    # A model whose largest matrix is far smaller than all of it.
    config = dataclasses.replace(CONFIG, num_layers=48)
    program = creation(lambda: RWKV7(config, rngs=nnx.Rngs(0)), make_mesh(fsdp=4, tensor=2))
    compiled = program.lower().compile()
    plan = compiled.memory_analysis()
    results["bytes of a device"] = plan.temp_size_in_bytes + plan.output_size_in_bytes
    made, expected = compiled(), RWKV7(config, rngs=nnx.Rngs(0))
    for name, model in {"created": made, "expected": expected}.items():
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
            path = jax.tree_util.keystr(path, simple=True, separator=".")
            results[f"{name}/{path}"] = jax.device_get(leaf)
            if name == "created":
                results[f"share/{path}"] = leaf.addressable_shards[0].data.size / leaf.size
    np.savez(file, **results)


if __name__ == "__main__":
    main(sys.argv[1])
