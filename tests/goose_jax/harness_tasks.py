"""Requests of an evaluation harness, and their results by a plain forward of the golden model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.goose_jax.official_weights import golden_model

QUESTIONS = [f"Question: {i} + 1 =\nAnswer:" for i in range(6)]
CHOICES = [[f" {i}", f" {i + 1}"] for i in range(6)]
END = 0  # ends a document of bytes
LENGTH = 64  # of the texts of the forward, so that one program is compiled


@dataclasses.dataclass
class Instance:
    """A request: what the harness calls an instance has `args`, too."""

    args: tuple


def byte_tokens(text):
    return [byte + 1 for byte in text.encode()]


@functools.cache
def forward():
    model = golden_model()
    return jax.jit(lambda tokens: model(tokens)[0][0])


def log_probabilities(tokens):
    """`[T, vocab]`, of the token that follows each token; computed from logits in float64."""
    padded = jnp.array([tokens + [END] * (LENGTH - len(tokens))])
    logits = np.asarray(forward()(padded), np.float64)[: len(tokens)]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected_score(context, continuation):
    """The log-likelihood of a text, and whether it is greedy, from the forward."""
    before, after = byte_tokens(context) or [END], byte_tokens(continuation)
    predicted = log_probabilities(before + after)[len(before) - 1 : -1]
    greedy = predicted.argmax(-1).tolist() == after
    return float(predicted[np.arange(len(after)), after].sum()), greedy


def expected_text(context, num_tokens, *, stop):
    """The greedy continuation of a text, token by token, up to a stop text."""
    tokens = byte_tokens(context) or [END]
    new = []
    for _ in range(num_tokens):
        token = int(log_probabilities(tokens + new)[-1].argmax())
        if token == END:
            break
        new.append(token)
    # Ids above 256 are no bytes. An incomplete character at the limit is dropped.
    data = b"".join(bytes([t - 1]) if t <= 256 else "\ufffd".encode() for t in new)
    text = data.decode(errors="replace")
    return text.split(stop)[0]
