"""Measures a training step of RWKV-7 in PyTorch, of RWKV-LM or of flash-linear-attention (FLA).

    python benchmarks/peers_train_step.py --peer RWKV-LM --sources peers --num-layers 24 \
        --hidden-size 1024 --batch-size 8 --sequence-length 4096

As in `train_step.py`, tokens are random, and the time is the median of rounds of some steps.
Nothing is computed again. Parameters and activations are bfloat16. As in the trainer of RWKV-LM,
gradients are clipped, and a fused AdamW changes float32 copies of the parameters.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import tyro
from peers_models import fla_model, rwkv_lm_model
from results import Row, revisions, write_results

from goose_jax import RWKV7Config


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      peer: whose model.
      sources: folder with a checkout of RWKV-LM; FLA is installed instead.
      num_layers: number of layers.
      hidden_size: channels of the residual stream.
      vocab_size: size of the vocabulary.
      batch_size: sequences per step.
      sequence_length: tokens per sequence.
      rounds: number of rounds whose median is reported.
      steps: steps per round.
      json: file to write the row to, in the format of `results.py`.
    """

    peer: Literal["RWKV-LM", "FLA"]
    sources: pathlib.Path = pathlib.Path("peers")
    num_layers: int = 24
    hidden_size: int = 1024
    vocab_size: int = 65536
    batch_size: int = 8
    sequence_length: int = 4096
    rounds: int = 3
    steps: int = 4
    json: pathlib.Path | None = None


def make_step(settings: Settings) -> Callable[[], torch.Tensor]:
    """Returns a function that makes a training step and returns its loss."""
    config = RWKV7Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
    )
    shape = (settings.batch_size, settings.sequence_length + 1)
    tokens = torch.randint(settings.vocab_size, shape, device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if settings.peer == "FLA":
        model = fla_model(config)

        def loss_of_batch() -> torch.Tensor:
            return model(input_ids=inputs, shift_labels=targets).loss
    else:
        model = rwkv_lm_model(config, settings.sequence_length, settings.sources.resolve())

        def loss_of_batch() -> torch.Tensor:
            return model.training_step((inputs, targets), 0)

    params = list(model.parameters())
    masters = [x.detach().float() for x in params]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.99), eps=1e-18, fused=True)

    def step() -> torch.Tensor:
        loss = loss_of_batch()
        loss.backward()
        for master, x in zip(masters, params, strict=True):
            if x.grad is not None:  # the value residual of the first layer has none
                master.grad = x.grad.float()
                x.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()  # or these gradients would stay in memory in the next step
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        return loss.detach()

    return step


def measure(settings: Settings) -> Row:
    """Returns speed and memory of a training step, or that memory is not enough for it."""
    try:
        step = make_step(settings)
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        first_step_seconds = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(settings.rounds + 1):
            start = time.perf_counter()
            for _ in range(settings.steps):
                loss = step()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / settings.steps)
    except torch.OutOfMemoryError as error:
        print(error)
        return {"result": "out of memory"}
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}")
    per_step = float(np.median(seconds[1:]))  # the first warms up
    return {
        "tokens_per_s": round(settings.batch_size * settings.sequence_length / per_step),
        "ms_per_step": round(1e3 * per_step, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "first_step_s": round(first_step_seconds, 1),
    }


def main(settings: Settings) -> None:
    json = settings.json and settings.json.resolve()
    versions = revisions(settings.sources, (settings.peer,))
    torch.manual_seed(0)
    row = {
        "layers": settings.num_layers,
        "width": settings.hidden_size,
        "kind": "peer",
        "peer": settings.peer,
        "batch_size": settings.batch_size,
        "sequence_length": settings.sequence_length,
        "compute_dtype": "bfloat16",
        "remat": "none",
        **measure(settings),
    }
    print(row)
    write_results(json, [row], versions)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
