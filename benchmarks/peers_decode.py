"""Measures decoding of RWKV-7 in PyTorch, by Albatross or flash-linear-attention (FLA).

    python benchmarks/peers_decode.py --peer Albatross --sources peers --num-layers 24 \
        --hidden-size 1024

Weights are random, float16 for Albatross and bfloat16 for FLA; states are float32. A token is one
call of the model; sampling is not counted. One row of Albatross is also measured as a CUDA graph,
which reads the same state each time.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import tyro
from peers_models import albatross_model, fla_model
from results import Row, revisions, write_results

from goose_jax import RWKV7Config


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      peer: whose model.
      sources: folder with a checkout of Albatross; FLA is installed instead.
      num_layers: number of layers.
      hidden_size: channels of the residual stream.
      vocab_size: size of the vocabulary.
      batch_size: rows, besides one.
      prompt_length: tokens of the prompt whose reading is measured.
      rounds: number of rounds whose median is reported.
      tokens: tokens per round.
      json: file to write the rows to, in the format of `results.py`.
    """

    peer: Literal["Albatross", "FLA"]
    sources: pathlib.Path = pathlib.Path("peers")
    num_layers: int = 24
    hidden_size: int = 1024
    vocab_size: int = 65536
    batch_size: int = 128
    prompt_length: int = 2048
    rounds: int = 5
    tokens: int = 16
    json: pathlib.Path | None = None


def seconds_of(settings: Settings, call: Callable[[], object], calls: int) -> float:
    """Returns the time of one of some calls, the median of the rounds, after two that warm up."""
    seconds = []
    for _ in range(settings.rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return float(np.median(seconds[2:]))


def albatross_calls(config: RWKV7Config, settings: Settings) -> dict[str, Callable[[], object]]:
    """Returns what makes a token of one row, of many rows, and what reads a prompt."""
    model = albatross_model(config, settings.sources.resolve())
    prompt = list(range(1, settings.prompt_length + 1))
    _, one = model.forward(prompt[:16], None)
    rows = [[1]] * settings.batch_size
    _, many = model.forward_batch(rows, None)
    return {
        "one": lambda: model.forward(1, one),
        "many": lambda: model.forward_batch(rows, many),
        "prompt": lambda: model.forward(prompt, None),
    }


def fla_calls(config: RWKV7Config, settings: Settings) -> dict[str, Callable[[], object]]:
    """Returns what makes a token of one row, of many rows, and what reads a prompt."""
    model = fla_model(config).eval()
    prompt = torch.arange(1, settings.prompt_length + 1, device="cuda")[None]

    def call(tokens: torch.Tensor) -> Callable[[], object]:
        state = model(input_ids=tokens, use_cache=True).past_key_values
        return lambda: model(input_ids=tokens, past_key_values=state, use_cache=True)

    return {
        "one": call(prompt[:, :1]),
        "many": call(prompt[:, :1].repeat(settings.batch_size, 1)),
        "prompt": lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1),
    }


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """Returns a call as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.no_grad()
def main(settings: Settings) -> None:
    config = RWKV7Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
    )
    versions = revisions(settings.sources, (settings.peer,))
    torch.manual_seed(0)
    sizes = {"layers": settings.num_layers, "width": settings.hidden_size}
    calls = {"Albatross": albatross_calls, "FLA": fla_calls}[settings.peer](config, settings)
    one = seconds_of(settings, calls["one"], settings.tokens)
    many = seconds_of(settings, calls["many"], settings.tokens)
    prompt = seconds_of(settings, calls["prompt"], 1)
    times = {settings.peer: one}
    if settings.peer == "Albatross":
        graph = as_graph(calls["one"])
        times["Albatross, CUDA graph"] = seconds_of(settings, graph, settings.tokens)
    rows: list[Row] = [
        {
            **sizes,
            "peer": name,
            "ms": round(1e3 * seconds, 3),
            f"tokens_per_s_{settings.batch_size}": round(settings.batch_size / many),
            "prefill_tokens_per_s": round(settings.prompt_length / prompt),
        }
        for name, seconds in times.items()
    ]
    for row in rows:
        print(row)
    write_results(settings.json, rows, versions)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
