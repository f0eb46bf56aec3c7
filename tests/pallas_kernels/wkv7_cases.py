"""Inputs of WKV7, common and adversarial, and its definition in float64, sequence by sequence."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

NAMES = ("r", "log_decay", "k", "v", "a", "b")
RWKV7_BOUND = -float(np.exp(-0.5))

DECAYS = {
    "rwkv7": lambda rng, shape: RWKV7_BOUND / (1 + np.exp(-rng.normal(size=shape))),
    "tiny": lambda rng, shape: np.full(shape, -1e-6),
    "slow": lambda rng, shape: np.full(shape, -3e-3),
    "little": lambda rng, shape: rng.uniform(-0.125, 0, size=shape),
    "by chunks": lambda rng, shape: np.where(
        np.arange(shape[1])[:, None, None] // 64 % 2 == 0, RWKV7_BOUND, np.full(shape, -1e-3)
    ),
    "-1e-3": lambda rng, shape: np.full(shape, -1e-3),
    "-1e-4": lambda rng, shape: np.full(shape, -1e-4),
    "-1e-5": lambda rng, shape: np.full(shape, -1e-5),
    "bound": lambda rng, shape: np.full(shape, RWKV7_BOUND),
    "strong": lambda rng, shape: np.full(shape, -20.0),
    "reset": lambda rng, shape: np.full(shape, -np.inf),
    "late": lambda rng, shape: np.where(
        np.arange(shape[1])[:, None, None] < 300, RWKV7_BOUND, rng.choice([-20.0, -np.inf], shape)
    ),
    "mixed": lambda rng, shape: rng.choice([-1e-6, -0.1, RWKV7_BOUND, -20.0, -np.inf], size=shape),
}
"""Log decays by name."""

_BOUNDED = ("rwkv7", "tiny", "slow", "little", "bound", "by chunks", "-1e-3", "-1e-4", "-1e-5")
"""Decays that keep RWKV-7's bound."""

HARD = {
    "nearly parallel keys": {"tokens": "parallel", "decay": "-1e-3"},
    "three tokens in turn": {"tokens": "in turn", "decay": "-1e-4"},
    "one token repeated": {"tokens": "identical", "decay": "-1e-5"},
}
"""Cases in which rounding operands of products costs much more than rounding the results.

The state forgets nearly nothing, and results are small differences: of what tokens write along
their common direction, or of sums over tokens that are the same.
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operator.

    Attributes:
      shape: B, T, H, K, V.
      decay: a name from `DECAYS`.
      tokens: "random"; removal keys that are "repeated" (one all along, alpha 1: the worst case for
        the triangular inverse), "near" (almost one) or "periodic" (four in turn). Or tokens that
        are alike in k, v and r, too: "identical" (one all along, alpha 1), "in turn" (three, alpha
        0.99). Or "parallel": all keys are one direction plus 5 % of noise, alpha 0.8.
      lengths: per row, segments as (id, length), id 0 for padding; None without packing.
      num_segments: asks for states per segment.
      scale: factor on the outputs.
      state: whether a state is carried in.
      dtype: one that represents the inputs and the gradient of the outputs exactly; for states,
        which are never narrower, it is always float32.
      factors: names of inputs, or do or d_final, and what they are multiplied by.
    """

    shape: tuple[int, int, int, int, int]
    decay: str = "rwkv7"
    tokens: str = "random"
    lengths: tuple[tuple[tuple[int, int], ...], ...] | None = None
    num_segments: int | None = None
    scale: float = 1.0
    state: bool = True
    dtype: str = "float32"
    factors: tuple[tuple[str, float], ...] = ()

    @property
    def min_log_decay(self) -> float | None:
        """The bound that the decays keep, if it is one that helps."""
        return RWKV7_BOUND if self.decay in _BOUNDED else None


@functools.cache
def make_inputs(case: Case) -> dict[str, np.ndarray | None]:
    """Float64 arrays by argument name, rounded to `case.dtype`."""
    B, T, H, K, V = case.shape
    rng = np.random.default_rng(sum(case.shape))
    r, k, kk, v = (rng.normal(size=(B, T, H, D)) for D in (K, K, K, V))
    alpha = 1 / (1 + np.exp(-rng.normal(size=(B, T, H, K))))
    log_decay = DECAYS[case.decay](rng, (B, T, H, K))
    k = 0.3 * k
    if case.tokens == "parallel":
        kk = rng.normal(size=(B, 1, H, K)) + 0.05 * kk
        k, alpha = 0.3 * kk, np.full_like(alpha, 0.8)
    elif case.tokens in ("identical", "in turn"):
        period = 3 if case.tokens == "in turn" else 1
        r, k, v, kk = (x[:, np.arange(T) % period] for x in (r, k, v, kk))
        alpha = np.full_like(alpha, 0.99 if period == 3 else 1.0)
    elif case.tokens != "random":
        period = 4 if case.tokens == "periodic" else 1
        kk = kk[:, np.arange(T) % period]
        alpha = np.full_like(alpha, 0.999)
        if case.tokens == "near":
            kk = kk + 0.02 * rng.normal(size=kk.shape)
    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    state_shape = (B, H, K, V) if case.num_segments is None else (B, case.num_segments, H, K, V)
    inputs = {
        "r": r,
        "log_decay": log_decay,
        "k": k,
        "v": v,
        "a": -kk,
        "b": kk * alpha,
        "initial_state": rng.normal(size=state_shape) if case.state else None,
    }
    for name, factor in case.factors:
        if name not in ("do", "d_final"):  # those of `make_cotangents`
            inputs[name] = inputs[name] * factor
    for name, x in inputs.items():
        if x is not None:
            inputs[name] = _round(x, "float32" if name == "initial_state" else case.dtype)
    if case.lengths is not None:
        rows = [np.repeat(*np.array(row).T) for row in case.lengths]
        inputs["segment_ids"] = np.stack(rows).astype(np.int32)
    return inputs


def make_cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random gradients of the outputs and of the final state."""
    B, T, H, K, V = case.shape
    rng = np.random.default_rng(1)
    state_shape = (B, H, K, V) if case.num_segments is None else (B, case.num_segments, H, K, V)
    do, d_final = (rng.normal(size=shape) for shape in ((B, T, H, V), state_shape))
    factors = dict(case.factors)
    do, d_final = do * factors.get("do", 1.0), d_final * factors.get("d_final", 1.0)
    return _round(do, case.dtype), _round(d_final, "float32")


def _round(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(jnp.dtype(dtype)).astype(float)


def run_sequence(inputs, state, scale):
    """One sequence: `[T, H, _]` and `[H, K, V]` to outputs, final state and the states read."""
    outputs, states = [], []
    for r, w, k, v, a, b in zip(*inputs, strict=True):
        states.append(state)
        removed = np.einsum("hkv,hk->hv", state, a)
        state = np.exp(w)[..., None] * state + b[..., None] * removed[:, None]
        state = state + k[..., None] * v[:, None]
        outputs.append(scale * np.einsum("hkv,hk->hv", state, r))
    return np.array(outputs), state, states


def run_sequence_backward(inputs, states, final_state, scale, do, d_state):
    """Gradients of the inputs and of the state that went in."""
    gradients = []
    after = final_state
    for t in reversed(range(len(do))):
        r, w, k, v, a, b = (x[t] for x in inputs)
        before = states[t]
        d_state = d_state + scale * r[..., None] * do[t][:, None]
        to_removed = np.einsum("hkv,hk->hv", d_state, b)
        gradients.append(
            (
                scale * np.einsum("hkv,hv->hk", after, do[t]),
                np.exp(w) * np.sum(before * d_state, axis=-1),
                np.einsum("hkv,hv->hk", d_state, v),
                np.einsum("hkv,hk->hv", d_state, k),
                np.einsum("hkv,hv->hk", before, to_removed),
                np.einsum("hkv,hv->hk", d_state, np.einsum("hkv,hk->hv", before, a)),
            )
        )
        d_state = np.exp(w)[..., None] * d_state + a[..., None] * to_removed[:, None]
        after = before
    return [np.array(g[::-1]) for g in zip(*gradients, strict=True)], d_state


def _sequences(case: Case, inputs) -> list[tuple[int, np.ndarray, int | None]]:
    """Row, positions of the tokens and slot of the state (None: the row's) of each sequence."""
    B, T = case.shape[:2]
    if case.lengths is None:
        return [(row, np.arange(T), None) for row in range(B)]
    sequences = []
    for row, ids in enumerate(inputs["segment_ids"]):
        tokens = np.flatnonzero(ids)
        if case.num_segments is not None:
            sequences += [(row, tokens[ids[tokens] == n + 1], n) for n in range(case.num_segments)]
            continue
        cuts = np.flatnonzero(np.diff(ids[tokens])) + 1
        sequences += [(row, piece, None) for piece in np.split(tokens, cuts)]
    return sequences


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """Outputs, final state and all gradients in float64, one sequence at a time."""
    inputs, (do, d_final) = make_inputs(case), make_cotangents(case)
    _, _, H, K, V = case.shape
    arrays = [inputs[name] for name in NAMES]
    initial = inputs["initial_state"]
    initial = np.zeros_like(d_final) if initial is None else initial
    o, final, d_initial = np.zeros_like(do), initial.copy(), d_final.copy()
    gradients = [np.zeros_like(x) for x in arrays]
    sequences = _sequences(case, inputs)
    for number, (row, tokens, slot) in enumerate(sequences):
        first = number == 0 or sequences[number - 1][0] != row
        last = number + 1 == len(sequences) or sequences[number + 1][0] != row
        where = (row,) if slot is None else (row, slot)
        owns_initial, owns_final = slot is not None or first, slot is not None or last
        pieces = [x[row, tokens] for x in arrays]
        zeros = np.zeros((H, K, V))
        outputs, state, states = run_sequence(
            pieces, initial[where] if owns_initial else zeros, case.scale
        )
        o[row, tokens] = outputs if len(tokens) else o[row, tokens]
        d_state = d_final[where] if owns_final else zeros
        if owns_final:
            final[where] = state
        if not len(tokens):
            continue
        d_pieces, d_state = run_sequence_backward(
            pieces, states, state, case.scale, do[row, tokens], d_state
        )
        for gradient, piece in zip(gradients, d_pieces, strict=True):
            gradient[row, tokens] = piece
        if owns_initial:
            d_initial[where] = d_state
    results = {"o": o, "final_state": final}
    results |= {f"d_{name}": x for name, x in zip(NAMES, gradients, strict=True)}
    return results | ({} if inputs["initial_state"] is None else {"d_initial_state": d_initial})
