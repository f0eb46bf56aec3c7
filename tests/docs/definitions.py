"""Plain definitions in JAX, which the tests differentiate automatically, in float64.

Each is written in the most direct way, without the rearrangements that docs/rwkv7.md derives.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

type Arrays = dict[str, Any]


def numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function)


@functools.cache
def _gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    def gradients(inputs, constants, cotangents):
        outputs, pull_back = jax.vjp(lambda named: function(**named, **constants), inputs)
        return outputs, pull_back(cotangents)[0]

    return jax.jit(gradients)


def evaluate(function: Callable[..., Any], *inputs: Any) -> Any:
    """Returns the value of a function in float64. Compiles it once for each shape."""
    with jax.enable_x64(True):
        return numpy(_compiled(function)(*inputs))


def differentiate(
    function: Callable[..., Any], inputs: Arrays, cotangents: Any, **constants: Any
) -> tuple[Any, Arrays]:
    """Returns the value of a function of named inputs in float64, and gradients as `d<name>`."""
    with jax.enable_x64(True):
        outputs, gradients = _gradients(function)(inputs, constants, cotangents)
    return numpy(outputs), numpy({f"d{name}": x for name, x in gradients.items()})


def update(S, log_decay, k, v, a, b):
    """Returns the state after one token."""
    return jnp.exp(log_decay)[:, None] * S + jnp.outer(b, a @ S) + jnp.outer(k, v)


def recurrence(r, log_decay, k, v, a, b, S0, scale, restart=None, S_before=0.0, S_after=0.0):
    """Returns outputs, exit state, and the states after each token.

    The state before a token with `restart` is zero. `S_before` and `S_after` `[T, K, V]` are
    added to the states before and after each token: if they are zero, their gradients are the
    gradients of these states.
    """
    restart = jnp.zeros(len(r), bool) if restart is None else jnp.asarray(restart)
    changes = [jnp.broadcast_to(x, (len(r), *S0.shape)) for x in (S_before, S_after)]

    def step(S, token):
        (restart, before, after), r, token = token
        S = update(jnp.where(restart, 0, S) + before, *token) + after
        return S, (scale * (r @ S), S)

    tokens = ((restart, *changes), r, (log_decay, k, v, a, b))
    S1, (o, states) = jax.lax.scan(step, S0, tokens)
    return o, S1, states


def packed_recurrence(r, log_decay, k, v, a, b, S0, scale, kept, restart):
    """Returns outputs and exit state of the tokens at `kept` only. Other outputs are zero."""
    tokens = [x[kept] for x in (r, log_decay, k, v, a, b)]
    o, S1, _ = recurrence(*tokens, S0, scale, restart[kept])
    return jnp.zeros((len(r), v.shape[1])).at[kept].set(o), S1


def affine_map(r, log_decay, k, v, a, b):
    """Returns the affine map from entry to exit state, from runs that start from special states.

    P is the exit state of a run that starts from the identity and has zero values, Q that of a run
    that starts from zero.
    """
    keys = r.shape[1]
    no_values = jnp.zeros((len(r), keys))
    P = recurrence(r, log_decay, k, no_values, a, b, jnp.eye(keys), 1.0)[1]
    return P, recurrence(r, log_decay, k, v, a, b, jnp.zeros((keys, v.shape[1])), 1.0)[1]


def token_shift(x, x_before, mix):
    rows = []
    for t in range(len(x)):
        last = x_before if t == 0 else x[t - 1]
        rows.append(x[t] * (1 - mix) + last * mix)
    return jnp.stack(rows), x[-1]


def low_rank(x, down, up, bias, choice):
    """Returns the low-rank map; `choice` is one-hot over tanh, the sigmoid and no function."""
    inner = x @ down
    functions = jnp.stack([jnp.tanh(inner), jax.nn.sigmoid(inner), inner])
    return jnp.tensordot(choice, functions, 1) @ up + bias[None]


def key_update(k, alpha, removal_scale, replacement_mix):
    def token(k, alpha):
        scaled = k * removal_scale
        squares = scaled @ scaled
        safe = squares > 1e-24
        length = jnp.where(safe, jnp.sqrt(jnp.where(safe, squares, 1)), 1e-12)
        kk = scaled / length
        mixed = replacement_mix * (k * alpha) + (1 - replacement_mix) * k
        return mixed, -kk, kk * alpha

    return jax.vmap(token)(k, alpha)


def value_residual(v, v_first, logits):
    amount = jax.nn.sigmoid(logits)
    return (1 - amount) * v + amount * v_first


def output_correction(o, r, k, v, gate, bonus, norm_scale, norm_bias, eps):
    def token(o, r, k, v, gate):
        centred = o - o.mean()
        normalised = centred * jax.lax.rsqrt((centred**2).mean() + eps)
        return (normalised * norm_scale + norm_bias + jnp.dot(r * bonus, k) * v) * gate

    return jax.vmap(token)(o, r, k, v, gate)


def channel_mix(mixed, key_weight, value_weight):
    return jnp.square(jax.nn.relu(mixed @ key_weight)) @ value_weight


def cross_entropy(hidden, weight, target, l2wrap):
    """Returns the loss of each token, and the term whose gradient L2Wrap adds."""
    logits = hidden @ weight
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)[:, 0]
    return -chosen, 0.5 * l2wrap * logits.max(axis=1) ** 2
