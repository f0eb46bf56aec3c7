"""A call of every operator on arrays that a mesh divides, and what its compiled program moves."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import pallas_kernels as operators

HEADS, KEYS, INNER, VOCAB = 4, 64, 64, 64
CHANNELS = HEADS * KEYS
AXES = {"data": 2, "fsdp": 2, "tensor": 2}
DIVIDED = {"B": ("data", "fsdp"), "H": "tensor", "F": "tensor", "vocab": "tensor"}


def mesh_of(axis_type: AxisType) -> Mesh:
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(axis_type,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, with arrays of which each dimension has a name.

    Attributes:
      function: from arrays by name, and the settings, to the results.
      dimensions: of each array, as in "B T C".
      settings: of the operator.
      divided: which mesh axes divide a dimension.
      packed: whether rows hold several segments.
    """

    function: Callable[..., Any]
    dimensions: dict[str, str]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    divided: dict[str, Any] = dataclasses.field(default_factory=lambda: DIVIDED)
    packed: bool = False

    def sizes(self, tokens: int) -> dict[str, int]:
        sizes = {"B": 4, "T": tokens, "H": HEADS, "K": KEYS, "V": KEYS, "C": CHANNELS}
        return sizes | {"F": INNER, "vocab": VOCAB, "M": 3, "layers": 1, "R": 64}

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        sizes = self.sizes(tokens)
        return {n: tuple(sizes[x] for x in names.split()) for n, names in self.dimensions.items()}

    def draw(self, tokens: int) -> dict[str, np.ndarray]:
        """Small numbers in float32, log decays, targets and segment ids."""
        generator = np.random.default_rng(0)
        arrays = {n: generator.normal(size=s) / 4 for n, s in self.shapes(tokens).items()}
        if "log_decay" in arrays:
            arrays["log_decay"] = -np.abs(arrays["log_decay"]).clip(0, 0.6)
        arrays = {n: x.astype(np.float32) for n, x in arrays.items()}
        if "targets" in arrays:
            arrays["targets"] = generator.integers(0, VOCAB, arrays["targets"].shape, np.int32)
        if self.packed:
            ids = np.sort(generator.integers(0, 4, (4, tokens), np.int32))  # begins with padding
            arrays["segment_ids"] = ids * np.array([[1], [1], [0], [1]], np.int32)
        return arrays

    def spec(self, name: str) -> PartitionSpec:
        names = "B T" if name == "segment_ids" else self.dimensions[name]
        return PartitionSpec(*(self.divided.get(x) for x in names.split()))

    def call(self, **arrays: Any) -> Any:
        return self.function(**arrays, **self.settings)


TOKENS = dict.fromkeys(("r", "log_decay", "k", "a", "b"), "B T H K") | {"v": "B T H V"}
STATE = {"initial_state": "B H K V"}
BOUND = {"min_log_decay": -0.7}
CASES = {
    "wkv7": Case(operators.wkv7, TOKENS | STATE, BOUND),
    "packed wkv7": Case(operators.wkv7, TOKENS | STATE, BOUND, packed=True),
    "wkv7_recurrent": Case(operators.wkv7_recurrent, TOKENS | STATE),
    "packed wkv7_recurrent": Case(operators.wkv7_recurrent, TOKENS | STATE, packed=True),
    "token_shift_mix": Case(
        operators.token_shift_mix,
        {"x": "B T C", "mixes": "M C", "state": "B C"},
        divided=DIVIDED | {"C": "tensor"},
    ),
    "packed token_shift_mix": Case(
        operators.token_shift_mix,
        {"x": "B T C", "mixes": "M C", "state": "B C"},
        divided=DIVIDED | {"C": "tensor"},
        packed=True,
    ),
    "layer_norm": Case(operators.layer_norm, {"x": "B T C", "scale": "C", "bias": "C"}),
    "pre_norm": Case(operators.pre_norm, {"x": "B T C", "scale": "C", "bias": "C"}),
    "norm_shift_mix": Case(
        operators.norm_shift_mix,
        {"x": "B T C", "scale": "C", "bias": "C", "mixes": "M C", "state": "B C"},
    ),
    "packed norm_shift_mix": Case(
        operators.norm_shift_mix,
        {"x": "B T C", "scale": "C", "bias": "C", "mixes": "M C", "state": "B C"},
        packed=True,
    ),
    "key_update": Case(
        operators.key_update,
        {"k": "B T H K", "alpha": "B T H K", "removal_scale": "H K", "replacement_mix": "H K"},
    ),
    "value_residual": Case(
        operators.value_residual, dict.fromkeys(("v", "v_first", "logits"), "B T H V")
    ),
    "wkv7_inputs": Case(
        operators.wkv7_inputs,
        dict.fromkeys(("k", "v", "v_first"), "B T H K")
        | dict.fromkeys(("decay_logits", "alpha_logits", "value_residual_logits"), "B T H K")
        | dict.fromkeys(("decay_base", "alpha_base", "value_residual_base"), "H K")
        | dict.fromkeys(("removal_scale", "replacement_mix"), "H K"),
    ),
    "output_correction": Case(
        operators.output_correction,
        dict.fromkeys(("o", "r", "k", "v", "gate"), "B T H V")
        | dict.fromkeys(("bonus", "norm_scale", "norm_bias"), "H V"),
    ),
    "channel_mix": Case(
        operators.channel_mix,
        {"x": "B T C", "mix": "C", "key_weight": "C F", "value_weight": "F C", "state": "B C"},
    ),
    "feed_forward": Case(
        operators.feed_forward, {"x": "B T C", "key_weight": "C F", "value_weight": "F C"}
    ),
    "cross_entropy": Case(
        operators.cross_entropy,
        {"hidden": "B T C", "weight": "C vocab", "targets": "B T"},
        {"l2wrap": 1e-2, "chunk_size": 8},
    ),
    "cross_entropy_sum": Case(
        operators.cross_entropy_sum,
        {"hidden": "B T C", "weight": "C vocab", "targets": "B T", "token_weights": "B T"},
        {"l2wrap": 1e-2, "chunk_size": 8},
    ),
}


def results_and_gradients(case: Case, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the results, and the gradients of all floating-point arrays."""
    inputs = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    others = {n: x for n, x in arrays.items() if n not in inputs}

    def loss(inputs: dict[str, Any]) -> tuple[jax.Array, Any]:
        results = case.call(**inputs, **others)
        return sum(weighted_sum(x) for x in jax.tree.leaves(results)), results

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return results, gradients


def weighted_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape))


def place(case: Case, mesh: Mesh, arrays: dict[str, Any]) -> dict[str, jax.Array]:
    """Divides the arrays of a case over a mesh."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, case.spec(name))) for name, x in arrays.items()
    }


def decoding_arguments(rows: int) -> dict[str, Any]:
    """Returns the shapes of a call of `decode_layers` with one layer."""
    C, H, K, F = 256, 4, 64, 512

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    shapes = {field.name: of(C) for field in dataclasses.fields(operators.LayerWeights)}
    shapes |= {"time_shift_mix": of(6, C), "channel_key": of(C, F), "channel_value": of(F, C)}
    shapes |= dict.fromkeys(("receptance", "key", "value", "output"), of(C, C))
    for name in ("decay", "alpha", "value_residual", "gate"):
        shapes |= {f"{name}_down": of(C, 64), f"{name}_up": of(64, C)}
    of_heads = ("removal_scale", "replacement_mix", "bonus", "head_norm_scale", "head_norm_bias")
    shapes |= dict.fromkeys(of_heads, of(H, K))
    states = {"time_shift": of(rows, C), "wkv": of(rows, H, K, K, dtype=jnp.float32)}
    states["channel_shift"] = states["time_shift"]
    weights = operators.LayerWeights(**shapes)
    return {"x": jax.ShapeDtypeStruct((rows, C), jnp.bfloat16), "weights": weights} | states


def moved(program: str) -> dict[str, int]:
    """Returns for each collective but all-reduce the elements of its largest result."""
    kinds = "all-gather|reduce-scatter|all-to-all|collective-permute"
    pattern = rf"= (\S+|\(.*?\)) ({kinds})(?:-start)?\("
    largest: dict[str, int] = {}
    for types, kind in re.findall(pattern, program):
        for shape in re.findall(r"\w+\[([\d,]*)\]", types):
            size = math.prod(int(n) for n in shape.split(",") if n)
            largest[kind] = max(largest.get(kind, 0), size)
    return largest


def partitioned_for_cuda(
    function: Callable[..., Any], arguments: dict[str, Any], folder: Path
) -> tuple[str, list[str]]:
    """Returns the program that XLA's partitioner makes for one device, and its kernels.

    XLA for CPUs partitions a program for GPUs, too. After that it fails at a call of something that
    does not exist, before it can fail in a worse way.
    """

    def failing(arguments: dict[str, Any]) -> Any:
        if "segment_ids" in arguments:
            zero = jax.ffi.ffi_call("unknown", jax.ShapeDtypeStruct((), jnp.int32))()
            arguments = arguments | {"segment_ids": arguments["segment_ids"] + zero}
        return function(arguments)

    lowered = jax.jit(failing).trace(arguments).lower(lowering_platforms=("cuda",))
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    with pytest.raises(jax.errors.JaxRuntimeError, match="No FFI handler registered"):
        lowered.compile(compiler_options=options)
    (path,) = folder.glob("*after_spmd-partitioning*.txt")
    program = path.read_text()
    kernel = 'custom_call_target="mosaic_gpu'
    return program, [line for line in program.splitlines() if kernel in line]
