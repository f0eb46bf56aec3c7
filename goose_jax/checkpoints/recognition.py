"""Finds the layout of a file from the names and shapes of its tensors."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping

from goose_jax.checkpoints.config_inference import count_problems
from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.layouts import LAYOUTS, Layout, general_name
from goose_jax.checkpoints.stored_tensor import StoredTensor

_MAX_PREFIXES = 8  # of one layout that are tried


@dataclasses.dataclass(frozen=True)
class Recognised:
    """The tensors of a file and their layout.

    Attributes:
      layout: the layout.
      weights: tensors by their names in the layout, without a prefix; other names are unknown.
      states: tensors of a trained initial state, by their names in the layout; empty if there are
        none.
    """

    layout: Layout
    weights: dict[str, StoredTensor]
    states: dict[str, StoredTensor]


def recognise(tensors: Mapping[str, StoredTensor]) -> Recognised:
    """Returns the layout that most names fit, and of several the one that most shapes fit.

    Training programs write names behind a prefix, such as `module.` or `_forward_module.`: what
    comes before the name of the embedding, at the beginning of any name, is taken off.

    Args:
      tensors: tensors by their names in the file.
    """
    ranked: list[tuple[int, Layout, str]] = []
    for layout in LAYOUTS.values():
        known = layout.general_names()
        for prefix in _prefixes(tensors, layout):
            fitting = sum(
                general_name(name.removeprefix(prefix)) in known
                for name in tensors
                if name.startswith(prefix)
            )
            ranked.append((fitting, layout, prefix))
    most = max(fitting for fitting, _, _ in ranked)
    candidates = [
        _split(tensors, layout, prefix) for fitting, layout, prefix in ranked if fitting == most
    ]
    if len(candidates) == 1 or not most:
        return candidates[0]
    return min(candidates, key=lambda found: count_problems(found.weights, found.layout))


def _prefixes(names: Iterable[str], layout: Layout) -> list[str]:
    end = layout.embedding
    before = (name.removesuffix(end) for name in names if name.endswith(end))
    found = sorted({prefix for prefix in before if prefix.endswith(".")}, key=len)
    return ["", *itertools.islice(found, _MAX_PREFIXES)]


def _split(tensors: Mapping[str, StoredTensor], layout: Layout, prefix: str) -> Recognised:
    weights: dict[str, StoredTensor] = {}
    states: dict[str, StoredTensor] = {}
    state = general_name(layout.state) if layout.state else None
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        name = full if name != full and name in tensors else name  # a name twice: unknown
        (states if general_name(name) == state else weights)[name] = tensor
    return Recognised(layout, weights, states)


_SIGNS = (  # what a name holds, and what the file is then
    (r"\.ffn\.s_emb|blocks\.\d+\.qkv\.", "RWKV-7a or 7b (DeepEmbed), experimental and not read"),
    (r"\.time_maa_|\.time_decay_w1", "RWKV-6"),
    (r"\.att\.gate\.weight|\.time_faaaa|\.time_mix_g", "RWKV-5"),
    (r"\.time_first|\.time_mix_k", "RWKV-4"),
    (r"lora_A|lora_B|\.lora_[ab]\b", "adapters of LoRA without their model; merge them into it"),
    (r"weight_packed|weight_scale|qweight|qzeros|\.scales$", "quantized weights"),
    (r"\.A_log|\.mixer\.", "Mamba"),
    (r"self_attn\.|\.attention\.|q_proj|\.attn\.c_attn|\.mha\.", "another architecture"),
    (r"exp_avg|^state\.|optimizer", "the state of an optimizer"),
)


def guess_contents(names: Iterable[str], source: str) -> str | None:
    """Returns what a file is, if it is something known but no model of RWKV-7.

    Args:
      names: names of all tensors.
      source: path of the file.
    """
    names = list(names)
    if names and all(name.endswith("time_state") for name in names):
        return "an initial state without its model; load it by load_state or --state"
    for pattern, meaning in _SIGNS:
        if any(re.search(pattern, name) for name in names):
            return meaning
    if re.search(r"-[0-9]+-of-[0-9]+\.", source):
        return "one of several shards; give their folder or index"
    return None


def no_model(source: str, recognised: Recognised, problems: Iterable[str]) -> CheckpointError:
    """Returns the error for a file that is no model of RWKV-7.

    Args:
      source: path of the file.
      recognised: what was found in it.
      problems: what is wrong with it.
    """
    guess = guess_contents([*recognised.weights, *recognised.states], source)
    looks = f" (it looks like {guess})" if guess else ""
    return CheckpointError(f"{source} is no RWKV-7 checkpoint{looks}: " + "; ".join(problems))
