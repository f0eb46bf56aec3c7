"""What the tests of decoding share: a model, settings, and a look at the order of events."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from goose_jax.config import RWKV7Config
from goose_jax.generation import SamplingConfig
from goose_jax.nn import RWKV7
from tests.helpers import relative_rms

VOCAB = 97
CONFIG = RWKV7Config(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    head_size=16,
    decay_rank=8,
    alpha_rank=8,
    value_rank=8,
    gate_rank=8,
    compute_dtype="float32",
)
GREEDY = SamplingConfig(temperature=0)
WARM = SamplingConfig(temperature=0.8, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.1)
STATE_TOLERANCE = 1e-5  # of fp32 states that were read in other pieces; measured 6.5e-7


def random_model(seed):
    """A model no weight of which is 0, so that its states matter to the tokens."""
    model = RWKV7(CONFIG, rngs=nnx.Rngs(seed))
    generator = np.random.default_rng(seed)
    graphdef, params = nnx.split(model)
    noisy = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.3 * generator.standard_normal(x.shape, np.float32)),
        params,
    )
    return nnx.merge(graphdef, noisy)


def state_row(state, row):
    return jax.tree.map(lambda x: np.asarray(x[:, row]), state)


def assert_states_agree(got, expected):
    for x, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(x, reference) < STATE_TOLERANCE


class WatchedBlocks:
    """Stands in for `decode_block` and notes when blocks are dispatched, and tokens waited for.

    Attributes:
      events: ("dispatch" | "copy" | "wait", number of the block), in order.
    """

    def __init__(self, decode_block):
        self.events = []
        self._decode_block = decode_block
        self._count = 0

    def __call__(self, *args, **kwargs):
        progress, tokens = self._decode_block(*args, **kwargs)
        self.events.append(("dispatch", self._count))
        watched = _WatchedTokens(tokens, self._count, self.events)
        self._count += 1
        return progress, watched


class _WatchedTokens:
    def __init__(self, tokens, block, events):
        self._tokens = tokens
        self._block = block
        self._events = events

    def copy_to_host_async(self):
        self._events.append(("copy", self._block))
        self._tokens.copy_to_host_async()

    def __array__(self, dtype=None, copy=None):
        self._events.append(("wait", self._block))
        return np.asarray(self._tokens, dtype)
