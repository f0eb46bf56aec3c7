"""Scenarios that run the blocks of docs/rwkv7.md and check their results. Everything is float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.docs import definitions, document
from tests.docs.definitions import differentiate, evaluate

type Arrays = dict[str, Any]

T, K, V, L = 16, 8, 6, 16
SCALE = 0.7
MIN_LOG_DECAY = -0.6065306597126334
TOLERANCE = 1e-12  # relative RMS; measured at most 2e-14 (the inverses), 2e-15 for the others
HELPERS = ("sums", "pairs_of_blocks")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Some blocks, with what they start from and what they must compute.

    Attributes:
      blocks: names of the blocks, in the order in which they run.
      inputs: values of the names that the page takes as given.
      expected: values from the definitions and automatic differentiation. Whenever a block binds
        one of these names, it must have this value.
      finally_: checks names after all blocks ran, where equality with `expected` is not enough.
    """

    blocks: tuple[str, ...]
    inputs: Arrays
    expected: Arrays
    finally_: Callable[[Arrays], None] = lambda names: None

    def run(self, changed: dict[str, str] | None = None) -> Arrays:
        """Runs the blocks, compares their results, and returns all names.

        Args:
          changed: other code for some of the blocks.

        Raises:
          AssertionError: a block computes another value than `expected`.
        """
        code = document.blocks() | (changed or {})
        names = {"np": np, "code": code, **self.inputs}
        for block in self.blocks:
            exec(code[block], names)
            for name in document.assigned_names(document.blocks()[block]) & set(self.expected):
                assert_equal(name, names[name], self.expected[name])
        self.finally_(names)
        return names


def assert_equal(name: str, value: Any, expected: Any) -> None:
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape, f"{name}: {value.shape}, not {expected.shape}"
    if expected.dtype.kind in "bi":
        assert (value == expected).all(), name
        return
    error = np.linalg.norm(value - expected)
    limit = TOLERANCE * np.linalg.norm(expected)
    assert error <= limit, f"{name}: error {error:.1e} > {limit:.1e}"


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def frozen(arrays: Arrays) -> Arrays:
    """Returns the arrays, marked read-only so that no block can change the inputs of others."""
    for x in arrays.values():
        if isinstance(x, np.ndarray):
            x.setflags(write=False)
    return arrays


def tokens(seed: int, length: int = T) -> Arrays:
    """Returns inputs of the operator as RWKV-7 makes them."""
    rng = random(seed)
    r, k, kk = rng.normal(size=(3, length, K))
    kk /= np.linalg.norm(kk, axis=1, keepdims=True)
    alpha = rng.uniform(0.05, 0.99, size=(length, K))
    log_decay = rng.uniform(MIN_LOG_DECAY, -0.001, size=(length, K))
    v = rng.normal(size=(length, V))
    return {"r": r, "log_decay": log_decay, "k": k, "v": v, "a": -kk, "b": kk * alpha}


def rates(tokens: Arrays) -> Arrays:
    return {"kk": -tokens["a"], "alpha": tokens["b"] / -tokens["a"]}


def borders(seed: int) -> Arrays:
    rng = random(seed)
    S0, dS1 = rng.normal(size=(2, K, V))
    return {"S0": S0, "dS1": dS1, "do": rng.normal(size=(T, V))}


SIZES = {"T": T, "K": K, "V": V, "L": L, "scale": SCALE}

# Section 2


def update_scenario() -> Scenario:
    rng = random(1)
    S, key, value = rng.normal(size=(K, V)), rng.normal(size=K), rng.normal(size=V)
    key, rate = key / np.linalg.norm(key), 0.3

    def loss(S):
        return 0.5 * jnp.sum((key @ S - value) ** 2)

    gradient = evaluate(jax.grad(loss), S)
    S_next = S - rate * gradient
    expected = {"gradient": gradient, "S_next": S_next, "S_also": S_next}
    expected |= {"recalled": key @ S_next, "recalled_also": key @ S_next}

    def finally_(names):
        assert_equal("regression_loss", names["regression_loss"](S), evaluate(loss, S))

    inputs = frozen({"S": S, "key": key, "value": value, "rate": rate, "K": K})
    return Scenario(("regression_loss", "delta_rule", "recall"), inputs, expected, finally_)


def step_scenario(seed: int) -> Scenario:
    token, t = tokens(seed), 3
    S, given = borders(seed)["S0"], rates(token)
    if seed % 2:  # near the ends of the rates
        token["b"] = given["kk"] * np.where(random(seed).random((T, K)) < 0.5, 1e-3, 1 - 1e-3)
        given = rates(token)
    kk, alpha, k, v = given["kk"][t], given["alpha"][t], token["k"][t], token["v"][t]

    def remembered(S):
        return 0.5 * jnp.sum(jnp.dot(kk, S) ** 2)

    def agreement(S):
        return jnp.dot(jnp.dot(k, S), v)

    def step(S, v):
        at_t = {name: x[t] for name, x in token.items()}
        del at_t["r"]
        return definitions.update(S, **at_t | {"v": v})

    columns = np.eye(K)[:, :, None] * np.ones(V)  # e_c becomes column c of the transition
    transition = evaluate(jax.vmap(lambda S: step(S, jnp.zeros(V))[:, 0]), columns).T
    eigenvalues = np.sort(np.linalg.eigvals(transition).real)
    expected = {
        "dremembered": evaluate(jax.grad(remembered), S),
        "dagreement": evaluate(jax.grad(agreement), S),
        "S_next": evaluate(step, S, v),
        "a": token["a"],
        "b": token["b"],
        "transition": transition,
        "eigenvalues": eigenvalues,
        "highest": np.exp(token["log_decay"][t]).max(),
        "lowest": np.exp(token["log_decay"][t]).min() - np.sum(alpha * kk * kk),
        "b_next": token["b"][t] * (1 - np.sum(alpha * kk * kk)),
        "b_also": token["b"][t] * (1 - np.sum(alpha * kk * kk)),
    }

    def finally_(names):
        assert_equal("remembered", names["remembered"](S), evaluate(remembered, S))
        assert_equal("agreement", names["agreement"](S), evaluate(agreement, S))
        assert np.abs(np.linalg.eigvals(transition).imag).max() < 1e-12
        assert -1 < names["lowest"] <= eigenvalues[0] + 1e-12
        assert eigenvalues[-1] <= names["highest"] + 1e-12 < 1
        assert (eigenvalues < 0).sum() <= 1

    inputs = frozen({**token, **given, "S": S, "t": t, "K": K})
    del inputs["a"], inputs["b"]
    blocks = ("objectives", "step", "transition", "eigenvalues", "shrink")
    return Scenario(blocks, inputs, expected, finally_)


def product_scenario() -> Scenario:
    token, rate = tokens(4), random(4).uniform(0.01, 0.99, size=K)
    token["b"] = -token["a"] * rate
    zero_values = {"v": np.zeros((T, K)), "S0": np.eye(K), "scale": 1.0}
    product = evaluate(lambda: definitions.recurrence(**token | zero_values)[1])
    bound = (rate.max() / rate.min()) ** 0.5

    def finally_(names):
        assert np.linalg.norm(names["product"], 2) <= names["product_bound"]

    inputs = frozen({**token, **rates(token), "rates": rate, "T": T, "K": K})
    expected = {"product": product, "product_bound": bound}
    return Scenario(("product_bound",), inputs, expected, finally_)


def growing_pair_scenario() -> Scenario:
    kk = np.sqrt([[1 / 3, 2 / 3], [2 / 3, 1 / 3]])
    alpha = np.array([[0.99, 0.01], [0.01, 0.99]])

    def transition(S, token):
        nothing = np.zeros(2)
        return definitions.update(S, np.full(2, np.log(0.999)), nothing, nothing, *token)

    first, second = (evaluate(transition, np.eye(2), (-kk[i], kk[i] * alpha[i])) for i in (0, 1))
    alone = np.abs(np.linalg.eigvals(second)).max()
    in_turn = np.abs(np.linalg.eigvals(evaluate(transition, second, (-kk[0], kk[0] * alpha[0]))))
    expected = {"first": first, "second": second, "radius_alone": alone}
    return Scenario(("growing_pair",), {}, expected | {"radius_in_turn": in_turn.max()})


# Sections 3 to 7

TOKENS = ("r", "log_decay", "k", "v", "a", "b")


@functools.cache
def sequential(seed: int, unbounded: bool = False) -> tuple[Arrays, Arrays]:
    """Returns inputs of a run of tokens, and the recurrence's results and gradients for them."""
    given = {**tokens(seed), "S0": borders(seed)["S0"]}
    if unbounded:
        choice = random(seed).random((T, K))
        choice[:, :2] = 0.5  # two channels that are never cleared
        given["log_decay"] = np.where(choice < 0.2, -np.inf, given["log_decay"])
        given["log_decay"] = np.where(choice > 0.8, -30.0, given["log_decay"])
    do, dS1 = borders(seed)["do"], borders(seed)["dS1"]

    zeros = np.zeros((T, K, V))
    inputs = {**given, "S_before": zeros, "S_after": zeros}
    outputs = (do, dS1, zeros)
    (o, S1, after), results = differentiate(definitions.recurrence, inputs, outputs, scale=SCALE)
    results |= {"o": o, "S1": S1, "S": np.concatenate([given["S0"][None], after])}
    return frozen({**given, "do": do, "dS1": dS1, **SIZES}), frozen(results)


def sequence_scenario() -> Scenario:
    """The recurrence and its gradient, starting from the logits of the decay."""
    given, results = sequential(5)
    ratio = given["log_decay"] / MIN_LOG_DECAY
    logits = np.log(ratio / (1 - ratio))

    def log_decay(decay_logits):
        return -jnp.exp(-0.5) * jax.nn.sigmoid(decay_logits)

    held_after = np.einsum("tkv,tkv->tk", results["S"][1:], results["dS_after"])
    held_before = np.einsum("tkv,tkv->tk", results["S"][:-1], results["dS_before"])
    held_end = np.einsum("kv,kv->k", results["S1"], given["dS1"])
    expected = {
        **results,
        **differentiate(log_decay, {"decay_logits": logits}, results["dlog_decay"])[1],
        "log_decay": given["log_decay"],
        "min_log_decay": MIN_LOG_DECAY,
        "min_decay": np.exp(MIN_LOG_DECAY),
        "tokens_to_one_percent": 2 * np.log(10) / -MIN_LOG_DECAY,
        "held_after": held_after,
        "held_after_also": held_after,
        "held_before": held_before,
        "held_before_also": held_before,
        "held_before_next": np.concatenate([held_before[1:], held_end[None]]),
        "held_end": held_end,
    }
    inputs = frozen({**given, "decay_logits": logits})
    del inputs["log_decay"]
    blocks = ("sums", "decay", "decay_bound", "forward", "backward", "decay_gradient")
    return Scenario((*blocks, "balance", "cumulative", "direct"), inputs, expected)


def pair_weights(given: Arrays, same: np.ndarray | None = None) -> Arrays:
    """Returns the four matrices of weights, entry by entry from products of decays."""
    decay = np.exp(given["log_decay"])
    weights = {name: np.zeros((T, T)) for name in ("A_rk", "A_rb", "A_ak", "A_ab")}
    for name, A in weights.items():
        row, column = given[name[2]], given[name[3]]
        for i in range(T):
            for j in range(i + (name[2] == "r")):
                last = i + (name[2] == "r")
                between = decay[j + 1 : last].prod(axis=0)
                A[i, j] = (row[i] * between * column[j]).sum()
        if same is not None:
            A[~same] = 0
    return weights


CHUNK_FORWARD = ("borders", "entry_and_exit", "solve", "outputs")
CHUNK_BACKWARD = ("gradient_of_values", "gradient_of_weights", "gradient_of_inputs")


def chunk_scenario() -> Scenario:
    """All formulas of one chunk, compared with the recurrence."""
    given, results = sequential(6)
    U = np.einsum("tk,tkv->tv", given["a"], results["S"][:-1])
    expected = {**results, **pair_weights(given), "U": U, "S_after": results["S"][1:]}
    blocks = ("sums", "cumulated", "unrolled", "pairs", "factors", "scaled", "weights")
    blocks += (*CHUNK_FORWARD, "wy", *CHUNK_BACKWARD, "cumulative", "affine", "affine_gradient")
    zeros, inputs = np.zeros((T, K, V)), {name: given[name] for name in (*TOKENS, "S0")}
    inputs |= {"S_before": zeros, "S_after": zeros}
    outputs = (given["do"], np.zeros((K, V)), zeros)
    from_outputs = differentiate(definitions.recurrence, inputs, outputs, scale=SCALE)[1]
    expected["dS0_from_outputs"] = from_outputs["dS0"]
    token = [given[name] for name in TOKENS]
    expected["P"], expected["Q"] = evaluate(definitions.affine_map, *token)
    return Scenario(blocks, frozen({**given, "U": U}), expected)


def reference_scenario() -> Scenario:
    """The formulas of one chunk with exponents measured from the middle of the chunk."""
    given, results = sequential(7)
    g = np.cumsum(given["log_decay"], axis=0)
    entry = given["r"] * np.exp(g), given["a"] * np.exp(g - given["log_decay"])
    expected = {**results, **pair_weights(given)}
    expected |= {"read_by_output": entry[0] @ given["S0"]}
    expected |= {"read_by_removal": entry[1] @ given["S0"]}

    def finally_(names):
        # At the lowest decay, exponents must be exactly as large as the page says.
        lowest = {**names, "log_decay": np.full((T, K), MIN_LOG_DECAY)}
        for block in ("cumulated", "reference", "scaled"):
            exec(names["code"][block], lowest)
        factors = [lowest[name] for name in ("row", "row_before", "column")]
        largest = max(np.abs(np.log(x)).max() for x in factors)
        assert_equal("largest_factor", names["largest_factor"], largest)
        product = np.log(lowest["row_before"][:, None] * lowest["column"][None]).max()
        assert_equal("largest_product", names["largest_product"], product)

    blocks = ("sums", "cumulated", "reference", "scaled", "reference_state", "weights")
    blocks += (*CHUNK_FORWARD, *CHUNK_BACKWARD, "cumulative", "decay_bound", "largest_exponent")
    return Scenario(blocks, given, expected, finally_)


def inverse_scenario() -> Scenario:
    A = np.tril(random(8).normal(size=(L, L)), -1)
    inverse = np.linalg.inv(np.eye(L) - A)

    def finally_(names):
        for way in ("doubling", "substitution", "blockwise"):
            assert_equal(way, names[way](A), inverse)
        assert_equal("doubling", names["doubling"](A[:4, :4]), inverse[:4, :4])

    blocks = ("pairs_of_blocks", "doubling", "substitution", "blockwise")
    return Scenario(blocks, {}, {}, finally_)


def tree_scenario() -> Scenario:
    """The binary tree, with log decays down to minus infinity."""
    given, results = sequential(9, unbounded=True)
    expected = {**results, **pair_weights(given)}
    blocks = (*HELPERS, "cumulated", "tree_weights", *CHUNK_FORWARD)
    blocks += ("gradient_of_values", "gradient_of_weights", "tree_gradient")
    return Scenario(blocks, given, expected)


# Sections 8 and 9


def naive_segments(segment_ids: Any) -> Arrays:
    """Returns the segments, found by walking along the row."""
    valid, start, index, last_id, current = [], [], [], None, -1
    for segment_id in segment_ids:
        valid.append(segment_id != 0)
        start.append(bool(segment_id != 0 and segment_id != last_id))
        current += start[-1]
        last_id = segment_id if segment_id else last_id
        index.append(max(current, 0))
    return {"valid": np.array(valid), "start": np.array(start), "index": np.array(index)}


PACKED_ROWS = {  # ids, and the id of the segment before the row; 12 tokens are not padding
    "boundaries": ([0, 1, 1, 1, 0, 1, 2, 2, 2, 3, 2, 3, 3, 0, 3, 0], None),
    "no padding first": ([1, 1, 0, 0, 2, 2, 2, 2, 1, 1, 0, 3, 3, 3, 3, 0], None),
    "starts anew": ([4, 4, 4, 4, 0, 0, 1, 2, 1, 1, 1, 1, 0, 0, 9, 8], 3),
    "no boundary": ([0, 5, 5, 5, 5, 5, 0, 0, 5, 5, 5, 5, 5, 0, 5, 5], 5),
    "boundary last": ([0, 5, 5, 5, 5, 5, 0, 0, 5, 5, 5, 5, 5, 0, 5, 6], 5),
}


@functools.cache
def packed(seed: int, row: str, unbounded: bool = False) -> tuple[Arrays, Arrays]:
    given = {**sequential(seed, unbounded)[0]}
    ids, entry_id = PACKED_ROWS[row]
    segments = naive_segments(ids if entry_id is None else [entry_id, *ids])
    if entry_id is not None:  # the token before the chunk is not part of it
        segments = {name: x[1:] for name, x in segments.items()}
    restart = segments["start"] & (segments["index"] > 0)
    named = {name: given[name] for name in (*TOKENS, "S0")}
    constants = {"scale": SCALE, "kept": np.flatnonzero(segments["valid"]), "restart": restart}
    (o, S1), results = differentiate(
        definitions.packed_recurrence, named, (given["do"], given["dS1"]), **constants
    )
    results |= {"o": o, "S1": S1, **segments}
    return frozen({**given, "segment_ids": np.array(ids), "index_before": 0}), frozen(results)


def packed_scenario(row: str, tree: bool) -> Scenario:
    given, results = packed(10, row, unbounded=tree)
    inputs, expected = {**given}, {**results}
    blocks = ("padding", *HELPERS, "cumulated")
    if PACKED_ROWS[row][1] is None:
        blocks = ("segments", *blocks)
    else:
        inputs |= {name: expected.pop(name) for name in ("valid", "index", "start")}
    blocks += ("borders", "tree_weights") if tree else ("reference", "scaled", "borders", "weights")
    blocks += ("masks", "entry_and_exit", "solve", "outputs", "gradient_of_values")
    blocks += ("gradient_of_weights", "masked_gradient")
    blocks += ("tree_gradient",) if tree else ("gradient_of_inputs", "cumulative")
    # Before "padding_gradient" masks them, gradients at padding need not be zero.
    final = {name: expected.pop(name) for name in [f"d{name}" for name in TOKENS]}
    same = results["index"][:, None] == results["index"]
    zeroed = {name: np.where(results["valid"][:, None], given[name], 0) for name in TOKENS}

    def finally_(names):
        for name, x in pair_weights(zeroed, same).items():
            assert_equal(name, names[name], x)
        if tree:  # exactly zero
            later = results["start"] & (results["index"] > 0)
            assert (names["dlog_decay"][later] == 0).all()
        for name, x in final.items():
            assert_equal(name, names[name], x)

    return Scenario((*blocks, "padding_gradient"), inputs, expected, finally_)


def restart_scenario() -> Scenario:
    given, results = packed(11, "boundaries")
    expected = {name: results[name] for name in ("o", "S1", "index", "start", "valid")}
    return Scenario(("segments", "padding", "restart", "forward"), given, expected)


def most_chunks(length: int, segments: int, chunk: int) -> int:
    """Returns the largest number of chunks over all ways to cut a row of tokens into segments."""
    if segments == 1:
        return -(-length // chunk)
    return max(
        -(-first // chunk) + most_chunks(length - first, segments - 1, chunk)
        for first in range(length + 1)
    )


def align_scenario(segment_ids: list[int], segments: int) -> Scenario:
    """Moves the tokens, runs the blocks of section 5 chunk by chunk, compares each segment."""
    ids, chunk, length = np.array(segment_ids), 4, len(segment_ids)
    token = tokens(12, length)
    S0 = random(12).normal(size=(segments, K, V))
    valid = ids != 0

    def finally_(names):
        count = names["chunks"].sum()
        assert count <= names["chunks_at_most"]
        moved = {name: np.zeros((count * chunk, x.shape[1])) for name, x in token.items()}
        for name, x in token.items():
            moved[name][names["destination"]] = x[valid]
        blocks = ("sums", "cumulated", "factors", "scaled", "weights", *CHUNK_FORWARD)
        o, final = [], S0.copy()
        for c in range(count):
            rows = slice(c * chunk, (c + 1) * chunk)
            owner = np.flatnonzero((names["first_chunk"] <= c) & (names["length"] > 0))[-1]
            run = {name: x[rows] for name, x in moved.items()}
            run |= {"np": np, "L": chunk, "scale": SCALE, "S0": final[owner]}
            for block in blocks:
                exec(document.blocks()[block], run)
            o.append(run["o"])
            final[owner] = run["S1"]
        o = np.concatenate(o)[names["destination"]]
        ends = {n: np.flatnonzero(ids[valid] == n + 1) for n in range(segments)}
        for n, where in ends.items():
            piece = {name: x[valid][where] for name, x in token.items()}
            state = S0[n]
            for i, position in enumerate(where):
                token_i = {name: x[i] for name, x in piece.items()}
                r = token_i.pop("r")
                state = evaluate(definitions.update, state, *token_i.values())
                assert_equal(f"o of token {position}", o[position], SCALE * (r @ state))
            assert_equal(f"state of segment {n}", final[n], state)

    inputs = {"segment_ids": ids, "valid": valid, "N": segments, "L": chunk, "T": length}
    expected = {"chunks_at_most": most_chunks(length, segments, chunk)}
    return Scenario(("align",), inputs, expected, finally_)


def compose_scenario() -> Scenario:
    token = tokens(13)
    first, second = ([token[name][part] for name in TOKENS] for part in np.s_[:8, 8:])
    inputs, expected = {}, {}
    inputs["P_first"], inputs["Q_first"] = evaluate(definitions.affine_map, *first)
    inputs["P_second"], inputs["Q_second"] = evaluate(definitions.affine_map, *second)
    expected["P_both"], expected["Q_both"] = evaluate(
        definitions.affine_map, *[token[name] for name in TOKENS]
    )
    return Scenario(("compose",), frozen(inputs), expected)


# Section 10


class Counted(np.ndarray):
    """An array that counts the operations of matrix products, and other operations on matrices."""

    products = 0
    others = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        plain = [np.asarray(x) for x in inputs]
        result = np.asarray(getattr(ufunc, method)(*plain, **keywords))
        if ufunc is np.matmul:
            Counted.products += 2 * plain[0].shape[-1] * result.size
        elif result.ndim == 2:
            Counted.others += result.size
        return result.view(Counted)

    def __array_function__(self, function, types, arguments, keywords):
        result = super().__array_function__(function, types, arguments, keywords)
        if function is np.outer:
            Counted.others += result.size
        return result


def count(names: Arrays, *blocks: str) -> tuple[int, int]:
    """Runs blocks and returns how many operations of both kinds they did."""
    Counted.products = Counted.others = 0
    for block in blocks:
        exec(document.blocks()[block], names)
    return Counted.products, Counted.others


def costs_scenario() -> Scenario:
    """The formulas of section 10, compared with counts of operations in sections 3 to 6."""
    given = sequential(14)[0]
    counted = {n: x.view(Counted) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    names = {"np": np, **counted}
    count(names, *HELPERS, "blockwise", "cumulated", "factors", "scaled", "borders")
    count(names, "entry_and_exit")
    weights, _ = count(names, "weights")
    solution, _ = count(names, "solve")
    results, _ = count(names, "outputs")
    gradients, _ = count(names, *CHUNK_BACKWARD)
    Counted.products = 0
    names["blockwise"](names["A_ab"].view(Counted))
    inverse = Counted.products
    size, state_size = 2, 4
    read = sum(given[name][0].size for name in TOKENS)
    expected = {
        "weights": weights,
        "inverse": inverse,
        "solution": solution,
        "results": results,
        "gradients": gradients,
        "forward_chunk": weights + inverse + solution + results,
        "backward_chunk": weights + inverse + solution + gradients,
        "forward_recurrent": sum(count({"np": np, **counted}, "forward")),
        "forward_bytes": size * (read + V),
        "backward_bytes": size * (read + V + read),
        "state_bytes": state_size * given["S0"].size / L,
    }
    inputs = {"L": L, "K": K, "V": V, "size": size, "state_size": state_size}
    return Scenario(("operations", "traffic"), inputs, expected)


# Section 11

C, RANK, F = 10, 4, 12


def normal(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    rng = random(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def token_shift_scenario() -> Scenario:
    inputs = normal(20, x=(T, C), x_before=(C,), mix=(C,))
    given = normal(21, dmixed=(T, C), dx_last=(C,))
    outputs = (given["dmixed"], given["dx_last"])
    (mixed, _), expected = differentiate(definitions.token_shift, inputs, outputs)
    return Scenario(
        ("token_shift", "token_shift_gradient"),
        frozen({**inputs, **given}),
        {**expected, "mixed": mixed},
    )


def low_rank_scenario(function: str) -> Scenario:
    inputs = normal(22, x=(T, C), down=(C, RANK), up=(RANK, K), bias=(K,))
    dy = random(23).normal(size=(T, K))
    choice = np.array([function == name for name in ("tanh", "sigmoid", "none")], float)
    y, expected = differentiate(definitions.low_rank, inputs, dy, choice=choice)
    expected["y"] = y
    given = frozen({**inputs, "dy": dy, "function": function})
    return Scenario(("low_rank", "low_rank_gradient"), given, expected)


def sigmoid_scenario() -> Scenario:
    logits, dalpha = random(24).normal(size=(2, T, K))
    alpha, expected = differentiate(
        lambda logits: jax.nn.sigmoid(logits), {"logits": logits}, dalpha
    )
    return Scenario(("sigmoid_gradient",), frozen({"alpha": alpha, "dalpha": dalpha}), expected)


def key_update_scenario(floor: bool) -> Scenario:
    inputs = normal(25, k=(T, K), alpha=(T, K), removal_scale=(K,), replacement_mix=(K,))
    inputs["alpha"] = 1 / (1 + np.exp(-inputs["alpha"]))
    if floor:  # only keys around it, because their gradients are huge
        inputs = {n: x[:3] if x.ndim == 2 else x for n, x in inputs.items()}
        length = np.linalg.norm(inputs["k"] * inputs["removal_scale"], axis=1, keepdims=True)
        inputs["k"] = inputs["k"] / length * np.array([[3e-13], [0], [1.5e-12]])
    shape = inputs["k"].shape
    given = normal(26, dk_new=shape, da=shape, db=shape)
    outputs, expected = differentiate(definitions.key_update, inputs, tuple(given.values()))
    expected |= dict(zip(("k_new", "a", "b"), outputs, strict=True))
    blocks = ("key_update", "key_update_gradient")
    return Scenario(blocks, frozen({**inputs, **given}), expected)


def value_residual_scenario() -> Scenario:
    inputs = normal(27, v=(T, V), v_first=(T, V), logits=(T, V))
    dv_new = random(28).normal(size=(T, V))
    v_new, expected = differentiate(definitions.value_residual, inputs, dv_new)
    expected["v_new"] = v_new
    blocks = ("value_residual", "value_residual_gradient")
    return Scenario(blocks, frozen({**inputs, "dv_new": dv_new}), expected)


def output_correction_scenario() -> Scenario:
    values, keys = {"o": (T, V), "v": (T, V), "gate": (T, V)}, {"r": (T, K), "k": (T, K)}
    parameters = {"bonus": (K,), "norm_scale": (V,), "norm_bias": (V,)}
    inputs = normal(29, **values, **keys, **parameters)
    dy, eps = random(30).normal(size=(T, V)), 0.1
    y, expected = differentiate(definitions.output_correction, inputs, dy, eps=eps)
    expected["y"] = y
    blocks = ("output_correction", "output_correction_gradient")
    return Scenario(blocks, frozen({**inputs, "dy": dy, "eps": eps}), expected)


def channel_mix_scenario() -> Scenario:
    inputs = normal(31, mixed=(T, C), key_weight=(C, F), value_weight=(F, C))
    dy = random(32).normal(size=(T, C))
    y, expected = differentiate(definitions.channel_mix, inputs, dy)
    expected["y"] = y
    blocks = ("channel_mix", "channel_mix_gradient")
    return Scenario(blocks, frozen({**inputs, "dy": dy}), expected)


def cross_entropy_scenario() -> Scenario:
    inputs, dloss = normal(33, hidden=(T, C), weight=(C, F)), random(34).normal(size=T)
    target, l2wrap = random(35).integers(F, size=T), 0.3
    (loss, _), expected = differentiate(
        definitions.cross_entropy, inputs, (dloss, dloss), target=target, l2wrap=l2wrap
    )
    expected["loss"] = loss
    given = frozen({**inputs, "dloss": dloss, "target": target, "l2wrap": l2wrap, "T": T})
    return Scenario(("cross_entropy", "cross_entropy_gradient"), given, expected)


BUILDERS: dict[str, Callable[[], Scenario]] = {
    "delta rule": update_scenario,
    "one token": lambda: step_scenario(2),
    "one token, extreme rates": lambda: step_scenario(3),
    "product of transitions": product_scenario,
    "growing pair": growing_pair_scenario,
    "sequence": sequence_scenario,
    "chunk": chunk_scenario,
    "chunk with reference": reference_scenario,
    "inverse": inverse_scenario,
    "tree": tree_scenario,
    **{
        f"packed{', tree' * tree}: {row}": functools.partial(packed_scenario, row, tree)
        for row in PACKED_ROWS
        for tree in (False, True)
    },
    "restart": restart_scenario,
    "aligned": lambda: align_scenario([0, 1, 1, 1, 3, 3, 0, 3, 3, 3, 0, 5, 4, 4, 4, 4], 5),
    "aligned, most chunks": lambda: align_scenario([1, 2, 2, 2, 2, 2, 3], 3),
    "compose": compose_scenario,
    "costs": costs_scenario,
    "token shift": token_shift_scenario,
    "low rank, tanh": lambda: low_rank_scenario("tanh"),
    "low rank, sigmoid": lambda: low_rank_scenario("sigmoid"),
    "low rank, none": lambda: low_rank_scenario("none"),
    "sigmoid": sigmoid_scenario,
    "key update": lambda: key_update_scenario(floor=False),
    "key update, floor": lambda: key_update_scenario(floor=True),
    "value residual": value_residual_scenario,
    "output correction": output_correction_scenario,
    "channel mix": channel_mix_scenario,
    "cross entropy": cross_entropy_scenario,
}


@functools.cache
def scenario(name: str) -> Scenario:
    return BUILDERS[name]()
