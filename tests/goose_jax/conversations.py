"""What the tests of conversations share: a model, a tokenizer, and turns of a session."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from goose_jax.chat import ReplySettings
from goose_jax.config import RWKV7Config
from goose_jax.generation import prefill
from goose_jax.nn import RWKV7
from goose_jax.text import VocabularyTokenizer
from tests.helpers import relative_rms

# One id for each printable character, so that any reply is read again as the same tokens.
VOCABULARY = {1: "\n"} | {i: chr(30 + i) for i in range(2, 97)}
CONFIG = RWKV7Config(vocab_size=97, hidden_size=64, num_layers=1, compute_dtype="float32")
GREEDY = dataclasses.replace(ReplySettings().sampling, temperature=0)
SHORT = ReplySettings(max_new_tokens=8, sampling=GREEDY)
TOLERANCE = 1e-5  # token by token against in parallel, fp32; measured 4.6e-7


@functools.cache
def chat_model():
    """Returns a model whose greedy replies never end by themselves.

    No weight is 0, so that the state matters to the reply, except those that make the logits of
    token 0 and of "\\n": theirs are 0, so another token's is always larger.
    """

    graphdef, state = nnx.split(RWKV7(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: np.asarray(x) + 0.3 * rng.standard_normal(x.shape, np.float32), state
    )
    state.head.get_value()[:, :2] = 0
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))


def chat_tokenizer():
    """Returns a new tokenizer, which a test may change."""
    return VocabularyTokenizer({token: text.encode() for token, text in VOCABULARY.items()})


def never():
    return False


def say(session, message, stopped=never):
    """Returns how a reply ended, and its text."""
    pieces = []
    ending = session.reply(message, pieces.append, stopped)
    return ending, "".join(pieces)


def check_state(conversation, tokenizer=None):
    """Asserts that the state has read exactly the conversation's text."""
    tokenizer = tokenizer or chat_tokenizer()
    expected = prefill(chat_model(), [tokenizer.encode(conversation.text)])
    for name in ("time_shift", "wkv", "channel_shift"):
        error = relative_rms(getattr(conversation.state, name), getattr(expected, name))
        assert error < TOLERANCE, name
