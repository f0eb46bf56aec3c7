"""Decodes prompts of different lengths in one batch, then goes on from their state and streams.

    python examples/generate.py [CHECKPOINT]

Without a checkpoint, the model is random and writes nonsense.
"""

import sys

import numpy as np
from flax import nnx

from goose_jax import RWKV7, RWKV7Config, SamplingConfig, generate
from goose_jax.checkpoints import load_checkpoint
from goose_jax.generation import Generation
from goose_jax.text import ByteTokenizer, StreamingDecoder


def main(checkpoint: str | None = None) -> Generation:
    if checkpoint is None:
        config = RWKV7Config(vocab_size=257, hidden_size=64, num_layers=2)
        model = RWKV7(config, rngs=nnx.Rngs(0))
    else:
        model, _ = load_checkpoint(checkpoint)
    tokenizer = ByteTokenizer()
    sampling = SamplingConfig(temperature=0.8, top_p=0.9)

    # One compiled call reads both prompts. Each further call generates a block of 16 tokens.
    prompts = ["def main(", "import"]
    result = generate(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=32,
        sampling=sampling,
        stop_tokens=[tokenizer.end_of_document],
        seed=0,
    )
    for prompt, tokens in zip(prompts, result.sequences, strict=True):
        print(repr(prompt + tokenizer.decode(tokens)))

    # The state has read the prompts and their continuations, and has a constant size.
    decoder = StreamingDecoder(tokenizer)

    def show(new_tokens: list[np.ndarray]) -> None:
        print(decoder.push(new_tokens[0].tolist()), end="", flush=True)

    more = generate(
        model,
        [tokenizer.encode("\n")] * len(prompts),
        max_new_tokens=64,
        sampling=sampling,
        state=result.state,
        on_tokens=show,
    )
    print(decoder.finish())
    return more


if __name__ == "__main__":
    main(*sys.argv[1:])
