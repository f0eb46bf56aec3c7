"""Operators on rows whose tokens are divided over devices, against whole rows on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import KEPT_STATES, channel_mix, token_shift_mix, wkv7
from pallas_kernels.operators.wkv7 import context
from tests.helpers import in_mesh_of, relative_rms
from tests.pallas_kernels.mesh_cases import moved

B, T, H, K, V, C, F = 4, 16, 2, 8, 4, 6, 8
SHAPES = {
    **dict.fromkeys(("r", "log_decay", "k", "a", "b"), (B, T, H, K)),
    "v": (B, T, H, V),
    "initial_state": (B, H, K, V),
    "x": (B, T, C),
    "mixes": (3, C),
    "shift_state": (B, C),
    "key_weight": (C, F),
    "value_weight": (F, C),
}
PIECES = {name for name, shape in SHAPES.items() if shape[1] == T}
SEGMENT_IDS = np.array(
    [
        [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 3, 3, 3],  # borders at and between devices' borders
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2],  # a segment over many devices
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1],  # devices without tokens
        [0] * T,
    ],
    np.int32,
)


def draw() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {n: (generator.normal(size=s) / 2).astype(np.float32) for n, s in SHAPES.items()}
    arrays["log_decay"] = -np.abs(arrays["log_decay"]).clip(0, 0.6)
    return arrays


def run(arrays: dict[str, Any], segment_ids: Any, context_axis: Any = None) -> Any:
    """Calls all operators that look at more than one token; returns all their results."""
    inputs = {n: arrays[n] for n in ("r", "log_decay", "k", "v", "a", "b", "initial_state")}
    options = {"segment_ids": segment_ids, "context_axis": context_axis}
    state = arrays["shift_state"]
    return (
        wkv7(**inputs, scale=0.5, min_log_decay=-0.7, **options),
        token_shift_mix(arrays["x"], arrays["mixes"], state=state, **options),
        channel_mix(
            arrays["x"],
            arrays["mixes"][0],
            arrays["key_weight"],
            arrays["value_weight"],
            state=state,
            **options,
        ),
    )


def gradients(function: Any, arrays: dict[str, Any], segment_ids: Any) -> Any:
    def loss(arrays: dict[str, Any]) -> Any:
        results = function(arrays, segment_ids)
        terms = [
            jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape))
            for x in jax.tree.leaves(results)
        ]
        return sum(terms), results

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@functools.cache
def on_one_device(packed: bool) -> Any:
    ids = SEGMENT_IDS if packed else None
    return jax.jit(functools.partial(gradients, run))(draw(), ids)


def spec_of(name: str) -> PartitionSpec:
    return PartitionSpec(None, "context") if name in PIECES else PartitionSpec()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    ("devices", "packed", "way"),
    [
        (2, True, "shard_map"),
        (4, False, "shard_map"),
        (4, True, "shard_map without checks"),
        (8, False, "explicit axis"),
        (8, True, "shard_map"),
        (8, True, "explicit axis"),
        (8, True, "auto axis"),
    ],
)
def test_pieces_of_rows_equal_whole_rows(devices, packed, way, monkeypatch):
    if devices == 2:  # as on a GPU with more multiprocessors than rows and heads
        monkeypatch.setattr(context, "number_of_pieces", lambda rows, length: 4)
    axis_type = AxisType.Explicit if way == "explicit axis" else AxisType.Auto
    mesh = jax.make_mesh((devices,), ("context",), axis_types=(axis_type,))
    pieces = PartitionSpec(None, "context")
    arrays, ids = draw(), SEGMENT_IDS if packed else None
    arrays = {n: jax.device_put(x, NamedSharding(mesh, spec_of(n))) for n, x in arrays.items()}
    if ids is not None:
        ids = jax.device_put(ids, NamedSharding(mesh, pieces))

    function = run
    if way == "auto axis":  # the call names it, without a shard_map
        function = functools.partial(run, context_axis="context")
    elif axis_type is AxisType.Auto:
        state = PartitionSpec()
        function = jax.shard_map(
            functools.partial(run, context_axis="context"),
            mesh=mesh,
            in_specs=({n: spec_of(n) for n in arrays}, None if ids is None else pieces),
            out_specs=((pieces, state),) * 3,
            check_vma=way != "shard_map without checks",
        )
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(gradients, function)).lower(arrays, ids).compile()
        actual = program(arrays, ids)
    for x, reference in zip(
        jax.tree.leaves(actual), jax.tree.leaves(on_one_device(packed)), strict=True
    ):
        assert relative_rms(x, reference) < 4e-6  # measured: up to 1e-6
    # The largest that moves are the maps of all devices.
    assert max(moved(program.as_text()).values()) == devices * B * H * K * (K + V)


def test_context_axis_must_be_one_of_a_shard_map_or_of_the_mesh_in_context():
    x, mixes = jnp.ones((1, 2, 4)), jnp.ones((1, 4))
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    message = r"context_axis='context' must name a mesh axis .*, or an Auto axis of the mesh in"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        token_shift_mix(x, mixes, context_axis="context")
    with pytest.raises(ValueError, match="context_axis=3 must name a mesh axis"):
        token_shift_mix(x, mixes, context_axis=3)


def test_states_of_segments_need_whole_rows():
    mesh = jax.make_mesh((1,), ("context",), axis_types=(AxisType.Auto,))
    pieces = PartitionSpec(None, "context")
    x, ids = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2), jnp.int32)
    call = jax.shard_map(
        lambda x, ids: wkv7(
            x, -x, x, x, x, x, segment_ids=ids, num_segments=1, context_axis="context"
        ),
        mesh=mesh,
        in_specs=(pieces, pieces),
        out_specs=(pieces, PartitionSpec()),
    )
    with pytest.raises(ValueError, match="num_segments=1 needs rows that are not divided"):
        call(x, ids)


@pytest.mark.parametrize(
    ("rows", "length", "pieces"),
    [(16, 65536, 8), (16, 2048, 4), (16, 65536 + 64, 1), (132, 65536, 1), (33, 65536, 4)],
)
def test_few_long_rows_are_divided_further(rows, length, pieces):
    with in_mesh_of("NVIDIA H100 80GB HBM3", 132):
        assert context.number_of_pieces(rows, length) == pieces


@pytest.mark.parametrize(("kept", "gathered"), [((), 3), ((KEPT_STATES,), 2)])
def test_states_between_pieces_can_be_kept(kept, gathered):
    """Devices gather maps in the forward, in the backward, and where it repeats the forward."""
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    pieces = PartitionSpec(None, "context")
    tokens = jax.ShapeDtypeStruct((1, 128, 1, 8), jnp.float32)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*kept))
    def squared(*inputs):
        o, _ = wkv7(*inputs, min_log_decay=-0.7, context_axis="context")
        return (o**2).sum()

    gradient = jax.shard_map(
        jax.grad(squared, argnums=tuple(range(6))), mesh=mesh, in_specs=pieces, out_specs=pieces
    )
    program = str(jax.make_jaxpr(gradient)(*[tokens] * 6))
    assert program.count("all_gather[") == gathered


@pytest.mark.slow
def test_kernels_on_pieces_are_lowered_for_cuda():
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    pieces = PartitionSpec(None, "context")
    tokens = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    inputs = dict.fromkeys(("r", "log_decay", "k", "v", "a", "b"), tokens)
    on_kernels = {"min_log_decay": -0.7, "implementation": "mosaic_gpu"}
    run = jax.shard_map(
        lambda inputs: wkv7(**inputs, **on_kernels, context_axis="context"),
        mesh=mesh,
        in_specs=(pieces,),
        out_specs=(pieces, PartitionSpec()),
    )

    lowered = jax.jit(run).trace(inputs).lower(lowering_platforms=("cuda",))
    # The maps of the pieces need inverses and states; then come the outputs.
    assert lowered.as_text().count("@mosaic_gpu_v2(") == 2 + 1
