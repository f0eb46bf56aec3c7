"""The language model: embedding, a scan over stacked blocks, head."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from goose_jax.config import RWKV7Config
from goose_jax.nn import initializers
from goose_jax.nn.block import Block, BlockState
from goose_jax.nn.layer_norm import LayerNorm
from goose_jax.nn.remat import rematerialised
from goose_jax.nn.time_mix import Tokens
from goose_jax.parallel.in_model import enter_heads, gather_parameters, look_up, tokens_divided_over
from goose_jax.state import RWKV7State, check_state
from pallas_kernels import LayerWeights, decode_layers
from pallas_kernels.dispatch import dispatch
from pallas_kernels.sharding import Layout, has_explicit_axes, over_explicit_axes
from pallas_kernels.validation import check_float, check_int, check_segment_ids

type TokenIds = Int[Array, "B T"]

_PATHS_OF_OTHER_NAMES = {
    "time_norm_scale": ("time_mix_norm", "scale"),
    "time_norm_bias": ("time_mix_norm", "bias"),
    "time_shift_mix": ("time_mix", "shift_mix"),
    "channel_norm_scale": ("channel_mix_norm", "scale"),
    "channel_norm_bias": ("channel_mix_norm", "bias"),
    "channel_shift_mix": ("channel_mix", "shift_mix"),
    "channel_key": ("channel_mix", "key"),
    "channel_value": ("channel_mix", "value"),
}
LAYER_WEIGHT_PATHS = {
    field.name: _PATHS_OF_OTHER_NAMES.get(field.name, ("time_mix", field.name))
    for field in dataclasses.fields(LayerWeights)
}
"""For each field of `LayerWeights` the module of `RWKV7.blocks` and its parameter."""


class RWKV7(nnx.Module):
    """The RWKV-7 language model.

    Every parameter of `blocks` has a leading axis of `num_layers`; the forward pass is one scan
    over it, so that the time to compile does not grow with depth.

    Args:
      config: configuration of the model.
      rngs: source of random numbers for the initial values.

    Example:
      >>> config = RWKV7Config(vocab_size=257, hidden_size=128, num_layers=2)
      >>> model = RWKV7(config, rngs=nnx.Rngs(0))
      >>> logits, state = model(jnp.array([[71, 111, 111]]))
      >>> logits, state = model(jnp.array([[115]]), state)
      >>> logits.shape, state.wkv.shape
      ((1, 1, 257), (2, 1, 2, 64, 64))

    Attributes:
      config: configuration of the model.
      embedding: `[vocab, C]`, one row for each token id.
      embedding_norm: `LayerNorm` after the embedding (`blocks.0.ln0` in the official code); None if
        `config.embedding_norm` is False.
      blocks: a `Block` whose parameters are stacked over layers.
      final_norm: `LayerNorm` before the head.
      head: `[C, vocab]`, projection to logits.
    """

    def __init__(self, config: RWKV7Config, *, rngs: nnx.Rngs):
        if not isinstance(config, RWKV7Config):
            raise TypeError(f"config must be an RWKV7Config, got {type(config).__name__}")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be an nnx.Rngs, got {type(rngs).__name__}: {rngs!r}")
        self.config = config
        embedding, blocks, head = _initial_values(config, rngs.params())
        self.embedding = nnx.Param(embedding)
        self.embedding_norm = LayerNorm(config) if config.embedding_norm else None
        self.blocks = nnx.merge(*blocks)
        self.final_norm = LayerNorm(config)
        self.head = nnx.Param(head)

    def __call__(
        self,
        tokens: TokenIds,
        state: RWKV7State | None = None,
        segment_ids: TokenIds | None = None,
    ) -> tuple[Float[Array, "B T vocab"], RWKV7State]:
        """Returns logits of the token that follows each token, and the new state.

        A text may be read at once, in pieces with the state carried over, or token by token: the
        logits are the same.

        Args:
          tokens: `[B, T]` integers, ids from 0 to `vocab_size - 1`.
          state: the state after the text before, from this method or `init_state`; None at the
            start of a text.
          segment_ids: `[B, T]` integers, if rows hold several sequences (see
            `pallas_kernels.packing`). 0 is padding, whose logits have no meaning. `state` belongs
            to the first segment of a row.

        Returns:
          logits: `[B, T, vocab]` float32 (float64 if that is the compute dtype).
          state: the state after the last token of each row.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: if an argument has another shape, or an id is out of range; the message names
            it. Under jit ids are not known: there, an id out of range gives NaN in all values that
            depend on it.
        """
        hidden, state = self.hidden(tokens, state, segment_ids)
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: TokenIds,
        state: RWKV7State | None = None,
        segment_ids: TokenIds | None = None,
    ) -> tuple[Tokens, RWKV7State]:
        """Returns the input of the head, and the new state.

        A loss can use it without forming all logits:
        `pallas_kernels.cross_entropy(hidden, model.head[...], targets)`.

        Args:
          tokens: `[B, T]` integers, ids from 0 to `vocab_size - 1`.
          state: the state after the text before; None at the start of a text.
          segment_ids: `[B, T]` integers, if rows hold several sequences; 0 is padding.

        Returns:
          hidden: `[B, T, C]` in the compute dtype.
          state: the state after the last token of each row.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: if an argument has another shape, or an id is out of range.
        """
        self._check(tokens, state, segment_ids)
        layout = Layout(("...", "B T", _state_layout(state), "B T"), ("B T C", _STATE_LAYOUT))
        arrays = (tokens, state, segment_ids)
        return _on_explicit_axes(RWKV7._hidden, layout, self, *arrays, over_context=True)

    def _hidden(
        self, tokens: TokenIds, state: RWKV7State | None, segment_ids: TokenIds | None
    ) -> tuple[Tokens, RWKV7State]:
        x, state = self._run_blocks(self._embed(tokens), state, segment_ids)
        return self.final_norm(x), state

    def layer_weights(self) -> LayerWeights:
        """Returns the parameters of the blocks under the names of `pallas_kernels.decode_layers`.

        Matrices are cast to the compute dtype, and the ranks of low-rank matrices are padded with
        zeros. Other parameters are returned as they are stored.
        """
        values = {
            name: getattr(getattr(self.blocks, module), parameter)[...]
            for name, (module, parameter) in LAYER_WEIGHT_PATHS.items()
        }
        return LayerWeights(**values).prepared(self.config.compute_dtype)

    def decode(
        self,
        tokens: Int[Array, " B"],
        state: RWKV7State,
        active: Bool[Array, " B"] | None = None,
        *,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "B C"], RWKV7State]:
        """Reads one token of each row, and returns the input of the head and the new state.

        In a loop over tokens, use the model of `prepare_decoding(model)`: it has its matrices in
        the compute dtype, so that no step casts them.

        Args:
          tokens: `[B]` integers, ids from 0 to `vocab_size - 1`.
          state: the state after the text before, from this method, `hidden` or `init_state`.
          active: `[B]` booleans, false for rows whose state must not change. The hidden values of
            these rows have no meaning. None reads a token in all rows.
          implementation: "mosaic_gpu" or "reference", the implementations of
            `pallas_kernels.decode_layers`; or "xla", which runs the modules. None takes
            "mosaic_gpu" if it serves the call, else "xla".

        Returns:
          hidden: `[B, C]` in the compute dtype.
          state: the state after the token.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: if an argument has another shape, or an id is out of range.
          NotServed: if a named implementation does not serve this model or device.
        """
        check_int("tokens", tokens, "B", {})
        layout = Layout(("...", "B", _STATE_LAYOUT, "B"), ("B C", _STATE_LAYOUT))
        run = functools.partial(RWKV7._decode, implementation=implementation)
        return _on_explicit_axes(run, layout, self, tokens, state, active)

    def _decode(
        self,
        tokens: Int[Array, " B"],
        state: RWKV7State,
        active: Bool[Array, " B"] | None,
        *,
        implementation: str | None,
    ) -> tuple[Float[Array, "B C"], RWKV7State]:
        implementations: dict[str, Callable[..., tuple[Tokens, RWKV7State]]] = {
            "mosaic_gpu": functools.partial(self._decode_by_layers, "mosaic_gpu"),
            "xla": self._decode_by_modules,
            "reference": functools.partial(self._decode_by_layers, "reference"),
        }
        return dispatch("decode", implementations, implementation, tokens[:, None], state, active)

    def _decode_by_modules(
        self,
        tokens: TokenIds,
        state: RWKV7State,
        active: Bool[Array, " B"] | None,
    ) -> tuple[Float[Array, "B C"], RWKV7State]:
        # The modules keep the state of a row that holds only padding.
        segment_ids = None if active is None else active.astype(jnp.int32)[:, None]
        hidden, state = self.hidden(tokens, state, segment_ids)
        return hidden[:, 0], state

    def _decode_by_layers(
        self,
        implementation: str,
        tokens: TokenIds,
        state: RWKV7State,
        active: Bool[Array, " B"] | None,
    ) -> tuple[Float[Array, "B C"], RWKV7State]:
        self._check(tokens, state, None)
        x, *new = decode_layers(
            self._embed(tokens)[:, 0],
            state.time_shift,
            state.wkv,
            state.channel_shift,
            self.layer_weights(),
            active=active,
            norm_eps=self.config.norm_eps,
            head_norm_eps=self.config.head_norm_eps,
            implementation=implementation,
        )
        return self.final_norm(x[:, None])[:, 0], RWKV7State(*new)

    def logits(self, hidden: Float[Array, "B T C"]) -> Float[Array, "B T vocab"]:
        """Applies the head.

        Args:
          hidden: `[B, T, C]` in the compute dtype, from `hidden` or some tokens of it.

        Returns:
          `[B, T, vocab]` float32 (float64 if that is the compute dtype).

        Raises:
          TypeError: if `hidden` has no floating-point dtype.
          ValueError: if it has another shape.
        """
        check_float("hidden", hidden, "B T C", {"C": self.config.hidden_size})
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)

        def multiply(hidden: Tokens, head: Float[Array, "C vocab"]) -> Float[Array, "B T vocab"]:
            return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=dtype)

        layout = Layout(("B T C", "C vocab"), "B T vocab")
        return over_explicit_axes(multiply, layout, hidden, self.head[...])

    def _check(
        self, tokens: TokenIds, state: RWKV7State | None, segment_ids: TokenIds | None
    ) -> None:
        sizes: dict[str, int] = {}
        check_int("tokens", tokens, "B T", sizes)
        if not isinstance(tokens, jax.core.Tracer):
            known = np.asarray(tokens)  # jnp would trace the comparison under an outer jit
            low, high = int(known.min()), int(known.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"tokens must lie in 0..{self.config.vocab_size - 1}, got {low}..{high}"
                )
        if state is not None:
            num_heads = self.blocks.time_mix.bonus.shape[1]
            check_state(state, self.config, sizes["B"], num_heads=num_heads)
        if segment_ids is not None:
            check_segment_ids(segment_ids, sizes)

    def _embed(self, tokens: TokenIds) -> Tokens:
        embedded = look_up(self.embedding[...], tokens, self.config.compute_dtype)
        return embedded if self.embedding_norm is None else self.embedding_norm(embedded)

    def _cast_matrices(self, params: dict[str, Any]) -> dict[str, Any]:
        """Casts the matrices of all layers to the compute dtype.

        Args:
          params: parameters of `blocks` by module and name.
        """
        paths = LAYER_WEIGHT_PATHS.items()
        weights = LayerWeights(**{name: params[module][key] for name, (module, key) in paths})
        weights = weights.with_matrices_as(self.config.compute_dtype)
        cast: dict[str, Any] = {module: {} for module in params}
        for name, (module, key) in paths:
            cast[module][key] = getattr(weights, name)
        return cast

    def _run_blocks(
        self, x: Tokens, state: RWKV7State | None, segment_ids: TokenIds | None
    ) -> tuple[Tokens, RWKV7State]:
        config = self.config
        graphdef, state_of_blocks = nnx.split(self.blocks)
        params = nnx.to_pure_dict(state_of_blocks)
        states = (
            None if state is None else BlockState(state.time_shift, state.wkv, state.channel_shift)
        )

        def run_block(
            is_first: Any, carry: tuple[Any, Any], params: Any, state: BlockState | None
        ) -> tuple[tuple[Any, Any], BlockState]:
            x, v_first = carry
            block = nnx.merge(graphdef, gather_parameters(params, config.compute_dtype))
            x, v_first, state = block(x, v_first, state, segment_ids, is_first=is_first)
            return (x, v_first), state

        if config.unroll_layers:
            x, new = self._run_one_by_one(run_block, x, params, states)
        else:
            x, new = self._run_in_loop(run_block, x, params, states)
        return x, RWKV7State(new.time_shift, new.wkv, new.channel_shift)

    def _run_in_loop(
        self, run_block: Callable[..., Any], x: Tokens, params: Any, states: BlockState | None
    ) -> tuple[Tokens, BlockState]:
        """Runs one compiled layer for all layers; the first one ignores the values it gets."""
        config = self.config
        run_block = rematerialised(run_block, config)

        def step(carry: tuple[Any, Any], of_layer: tuple[Any, ...]) -> tuple[Any, Any]:
            layer, params, state = of_layer
            return run_block(layer == 0, carry, params, state)

        # Made from x, so that in jax.shard_map its type varies over the mesh, like the type of the
        # values of the first layer. On a mesh each device may have some heads only.
        heads = self.blocks.time_mix.bonus.shape[1:]
        v_first = enter_heads(jnp.zeros_like(x, shape=(*x.shape[:2], *heads)))
        layers = jnp.arange(config.num_layers)
        (x, _), new = jax.lax.scan(
            step, (x, v_first), (layers, self._cast_matrices(params), states)
        )
        return x, new

    def _run_one_by_one(
        self, run_block: Callable[..., Any], x: Tokens, params: Any, states: BlockState | None
    ) -> tuple[Tokens, BlockState]:
        """Runs layers that the compiler sees one by one.

        JAX traces two of them only: the first, and one other. The first layer makes the values that
        all others read; none has to select whose values to take.
        """
        run_first, run_other = (
            jax.jit(rematerialised(functools.partial(run_block, is_first), self.config))
            for is_first in (True, False)
        )
        carry: tuple[Any, Any] = (x, None)
        new = []
        stacks = (params, states)
        cast = jax.eval_shape(self._cast_matrices, params), states
        parts = jax.tree.map(lambda x, cast: _split_layers(x, cast.dtype), stacks, cast)
        layers = jax.tree.transpose(jax.tree.structure(stacks), None, parts)
        for layer, (of_layer, state) in enumerate(layers):
            carry, new_state = (run_other if layer else run_first)(carry, of_layer, state)
            new.append(new_state)
        return carry[0], jax.tree.map(lambda *x: jnp.stack(x), *new)


_STATE_LAYOUT = RWKV7State("layers B C", "layers B H K V", "layers B C")  # type: ignore[arg-type]


def _state_layout(state: RWKV7State | None) -> Any:
    return "..." if state is None else _STATE_LAYOUT


def _on_explicit_axes[R](
    method: Callable[..., R],
    layout: Layout,
    model: RWKV7,
    *arrays: Any,
    over_context: bool = False,
) -> R:
    """Calls a method of a model that knows nothing of explicit mesh axes.

    Args:
      method: from the model and the arrays to arrays.
      layout: of the model's parameters, of the arrays and of the results.
      model: may have parameters that such axes divide.
      *arrays: may be divided by such axes.
      over_context: whether these axes may divide tokens.
    """
    graphdef, params = nnx.split(model)
    if not has_explicit_axes(params, arrays):
        return method(model, *arrays)

    def run(params: Any, *arrays: Any, context_axis: Any = None) -> R:
        with tokens_divided_over(context_axis):
            return method(nnx.merge(graphdef, params), *arrays)

    return over_explicit_axes(run, layout, params, *arrays, over_context=over_context)


def abstract_model(config: RWKV7Config) -> RWKV7:
    """Returns the structure of a model, with `jax.ShapeDtypeStruct`s in place of parameters."""
    return nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def _initial_values(config: RWKV7Config, key: jax.Array) -> tuple[Any, Any, Any]:
    """Returns the embedding, the split stack of blocks and the head, in one compiled program.

    `lax.map` makes one layer after another, with the scratch memory of one layer. `vmap` would need
    the scratch memory of all layers.
    """
    embedding_key, blocks_key, head_key = jax.random.split(key, 3)

    def create(of_layer: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        layer, key = of_layer
        return nnx.split(Block(config, layer=layer, rngs=nnx.Rngs(params=key)))

    keys = jax.random.split(blocks_key, config.num_layers)
    blocks = jax.lax.map(create, (jnp.arange(config.num_layers), keys))
    embedding = initializers.embedding(embedding_key, config).astype(config.param_dtype)
    head = initializers.head(head_key, config).astype(config.param_dtype)
    return embedding, blocks, head


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split_layers(stack: jax.Array, dtype: Any) -> list[jax.Array]:
    """Splits an array along its first axis, and casts the parts."""
    layers = jax.lax.split(stack, (1,) * stack.shape[0])
    return [layer.squeeze(0).astype(dtype) for layer in layers]


def _split_forward(stack: jax.Array, dtype: Any) -> tuple[list[jax.Array], jax.Array]:
    return _split_layers(stack, dtype), jnp.zeros((), stack.dtype)


def _join_gradients(
    dtype: Any, of_stack: jax.Array, gradients: list[jax.Array]
) -> tuple[jax.Array]:
    """Joins the gradients of the parts, in one pass.

    Without the barrier, XLA would join them again for each result of the optimizer.
    """
    del dtype
    joined = jax.lax.optimization_barrier(jnp.stack(gradients))
    return (joined.astype(of_stack.dtype),)


_split_layers.defvjp(_split_forward, _join_gradients)
