"""Speed of a reply in a chat, as `goose-jax chat` writes it: in blocks of 4 tokens.

    python benchmarks/chat.py                              # 24 x 1024 on a GPU, 12 x 768 on a CPU
    python benchmarks/chat.py --compute-dtype bfloat16

Weights are random, with parameters in float32. The first message compiles the programs. The table
gives the time from a message to the first text of its reply, the rate of the tokens after that, and
the time of the whole reply; each is the median of `--rounds` messages.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterable

import jax
import numpy as np
import tyro
from decode import random_model
from results import write_results

from goose_jax import RWKV7Config
from goose_jax.chat.session import BLOCK_SIZE, ChatSession, ReplySettings
from goose_jax.text import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      model: number of layers and hidden size; None takes those of the device.
      vocab_size: size of the vocabulary; None takes 65,536 on a GPU and 4,096 on a CPU.
      param_dtype: dtype of the parameters.
      compute_dtype: dtype of the computation; None takes bfloat16 on a GPU and float32 on a CPU.
      new_tokens: length of a reply.
      rounds: number of messages.
      json: file to write the rows to, in the format of `results.py`.
    """

    model: tuple[int, int] | None = None
    vocab_size: int | None = None
    param_dtype: str = "float32"
    compute_dtype: str | None = None
    new_tokens: int = 100
    rounds: int = 5
    json: pathlib.Path | None = None


class LetterTokenizer(ByteTokenizer):
    """Decodes any id of a large vocabulary to a letter, so that each token is written at once."""

    end_of_document = None

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Returns one letter for each id."""
        return bytes(97 + token % 26 for token in tokens)


def reply(session: ChatSession) -> tuple[float, float]:
    """Returns the seconds from a message to its first text, and to the end of its reply."""
    times: list[float] = []
    start = time.perf_counter()
    session.reply(
        "What do geese eat?",
        lambda text: times.append(time.perf_counter()) if text else None,
        lambda: False,
    )
    return times[0] - start, time.perf_counter() - start


def main(settings: Settings) -> None:
    on_cpu = jax.default_backend() == "cpu"
    num_layers, hidden_size = settings.model or ((12, 768) if on_cpu else (24, 1024))
    config = RWKV7Config(
        vocab_size=settings.vocab_size or (4096 if on_cpu else 65536),
        hidden_size=hidden_size,
        num_layers=num_layers,
        param_dtype=settings.param_dtype,
        compute_dtype=settings.compute_dtype or ("float32" if on_cpu else "bfloat16"),
    )
    session = ChatSession(
        random_model(config),
        LetterTokenizer(),
        ReplySettings(max_new_tokens=settings.new_tokens),
    )
    print(
        f"{jax.devices()[0].device_kind}, {num_layers} x {hidden_size}, parameters in "
        f"{config.param_dtype}, computing in {config.compute_dtype}, replies of "
        f"{settings.new_tokens} tokens"
    )
    compiling, _ = reply(session)
    first, whole = np.median([reply(session) for _ in range(settings.rounds)], axis=0)
    rate = (settings.new_tokens - BLOCK_SIZE) / (whole - first)
    print("| first text at the first message, s | first text, ms | tokens/s | whole reply, s |")
    print("| --- | --- | --- | --- |")
    print(f"| {compiling:.1f} | {1e3 * first:.0f} | {rate:.1f} | {whole:.2f} |")
    row = {
        "device": jax.devices()[0].device_kind,
        "layers": num_layers,
        "width": hidden_size,
        "first_ms": round(1e3 * first, 1),
        "tokens_per_s": round(rate, 1),
        "reply_s": round(whole, 3),
    }
    write_results(settings.json, [row])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
