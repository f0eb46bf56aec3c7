"""Infers the configuration of a model from the names and shapes of its tensors."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from goose_jax.checkpoints.errors import list_problems, shorten_name
from goose_jax.checkpoints.key_map import TRANSPOSED, Entry, Shape
from goose_jax.checkpoints.layouts import Layout
from goose_jax.checkpoints.stored_tensor import STORED_DTYPES, StoredTensor
from goose_jax.config import RWKV7Config

_READ_FROM = {  # for each axis the parameter, and its dimension, that the size is read from
    "vocab": ("embedding", 0),
    "C": ("embedding", 1),
    "K": ("blocks.time_mix.bonus", 1),
    "F": ("blocks.channel_mix.key", 1),
    "decay_rank": ("blocks.time_mix.decay_down", 1),
    "alpha_rank": ("blocks.time_mix.alpha_down", 1),
    "value_rank": ("blocks.time_mix.value_residual_down", 1),
    "gate_rank": ("blocks.time_mix.gate_down", 1),
}


class ProblemsError(Exception):
    """The tensors are no model of RWKV-7.

    Attributes:
      problems: what is wrong, a few words for each kind.
    """

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


def infer_config(
    tensors: Mapping[str, StoredTensor],
    layout: Layout,
    *,
    states: Mapping[str, StoredTensor] | None = None,
    default_value_rank: int | None = None,
    **settings: Any,
) -> RWKV7Config:
    """Infers the configuration of a model, and checks all names, shapes and dtypes.

    Args:
      tensors: all tensors of the model by name.
      layout: layout of the names.
      states: tensors of a trained initial state. If there is one, each layer must have one.
      default_value_rank: rank of the value residual for a model of one layer whose file holds no
        value residual, which the first layer does not use. None means the official rank.
      **settings: fields of `RWKV7Config` that cannot be inferred.

    Raises:
      ProblemsError: if tensors are missing, unknown, or of a wrong shape or dtype.
    """
    num_layers = _count_layers(tensors, layout)
    sizes = _read_sizes(tensors, layout, num_layers)
    missing, unknown, misfits = _problems(tensors, layout, num_layers, sizes)
    for name, tensor in (states or {}).items():
        misfits += _misfits(name, tensor, _state_entry(layout), sizes)
    if states:
        expected = _state_entry(layout).names(max(num_layers, 1))
        missing += [name for name in expected if name not in states]
        unknown += [name for name in states if name not in expected]
    if problems := list_problems(missing, unknown, misfits):
        raise ProblemsError(problems)
    found: dict[str, Any] = {
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["C"],
        "num_layers": num_layers,
        "head_size": sizes["K"],
        "intermediate_size": sizes["F"],
        "decay_rank": sizes["decay_rank"],
        "alpha_rank": sizes["alpha_rank"],
        "value_rank": sizes.get("value_rank", default_value_rank),
        "gate_rank": sizes["gate_rank"],
        "embedding_norm": bool(layout.embedding_norms),
    }
    try:
        RWKV7Config(**found)
    except ValueError as error:
        raise ProblemsError([str(error)]) from error
    return RWKV7Config(**(found | settings))


def count_problems(tensors: Mapping[str, StoredTensor], layout: Layout) -> int:
    """Returns how many tensors are missing, unknown, or of a wrong shape or dtype."""
    num_layers = _count_layers(tensors, layout)
    sizes = _read_sizes(tensors, layout, num_layers)
    return sum(map(len, _problems(tensors, layout, num_layers, sizes)))


def _count_layers(tensors: Mapping[str, StoredTensor], layout: Layout) -> int:
    stacked = next(entry.name for entry in layout.entries if entry.is_stacked)
    pattern = re.compile(re.escape(stacked.split("{i}")[0]) + r"([0-9]+)\.")
    found = (pattern.match(name) for name in tensors)
    return len({match[1] for match in found if match})


def _state_entry(layout: Layout) -> Entry:
    assert layout.state is not None
    return Entry("state", ("H", "K", "K"), None, layout.state, "same")


def _read_sizes(
    tensors: Mapping[str, StoredTensor], layout: Layout, num_layers: int
) -> dict[str, int]:
    """Returns the sizes of the axes that can be read from the tensors."""
    sizes = {"6": 6}
    entries = {entry.parameter: entry for entry in layout.entries}
    for axis, (parameter, position) in _READ_FROM.items():
        entry = entries[parameter]
        for name in entry.names(num_layers):
            if name in tensors and len(shape := tensors[name].shape) == 2:
                sizes[axis] = shape[::-1][position] if entry.form == TRANSPOSED else shape[position]
                break
    if "C" in sizes and "K" in sizes:
        sizes["H"] = sizes["C"] // max(sizes["K"], 1)
    return sizes


def _problems(
    tensors: Mapping[str, StoredTensor], layout: Layout, num_layers: int, sizes: Mapping[str, int]
) -> tuple[list[str], list[str], list[str]]:
    """Returns the names that are missing, the unknown names, and what does not fit."""
    expected: dict[str, Entry] = {}
    optional = set()
    for entry in layout.entries:
        names = entry.names(max(num_layers, 1))
        expected |= dict.fromkeys(names, entry)
        if entry.is_optional:
            optional.add(names[0])
    missing = expected.keys() - tensors.keys()
    if optional <= missing:
        missing -= optional
    misfits: list[str] = []
    telling = {parameter for parameter, _ in _READ_FROM.values()}  # what others are judged by
    known = sorted(tensors.keys() & expected.keys())
    for name in sorted(known, key=lambda name: expected[name].parameter not in telling):
        misfits += _misfits(name, tensors[name], expected[name], sizes)
    return sorted(missing), sorted(tensors.keys() - expected.keys()), misfits


def _misfits(
    name: str, tensor: StoredTensor, entry: Entry, sizes: Mapping[str, int]
) -> Iterator[str]:
    name = shorten_name(name)
    if tensor.dtype not in STORED_DTYPES:
        yield f"{name} has dtype {tensor.dtype.name}"
    if not set(entry.axes) <= set(sizes):  # a size could not be read
        tells = any(entry.parameter == parameter for parameter, _ in _READ_FROM.values())
        if tells and len(tensor.shape) != 2:
            yield f"{name} has shape {_list_sizes(tensor.shape)} rather than two axes"
        return
    expected = entry.stored_shape(sizes)
    if _without_ones(tensor.shape) != _without_ones(expected):
        yield f"{name} has shape {_list_sizes(tensor.shape)} rather than {list(expected)}"


def _list_sizes(shape: Shape) -> str:
    return shorten_name(list(shape))


def _without_ones(shape: Shape) -> Shape:
    """Removes axes of size 1: a vector is [C] in some files and [1, 1, C] in others."""
    return tuple(size for size in shape if size != 1)
