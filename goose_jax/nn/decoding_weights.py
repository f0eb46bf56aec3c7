"""The parameters of a model in the form in which decoding reads them."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from goose_jax.config import RWKV7Config
from goose_jax.nn.model import LAYER_WEIGHT_PATHS, RWKV7

type _Params = dict[str, Any]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "graphdef"]
)
@dataclasses.dataclass(frozen=True)
class DecodingWeights:
    """A model whose matrices are stored as each decoding step needs them.

    A compiled function takes an instance as an argument and calls `model()`. Neither the modules
    nor `pallas_kernels.decode_layers` then cast or pad a matrix. An instance is not for training or
    saving: its matrices are rounded to the compute dtype, and its low ranks are padded.

    Attributes:
      config: configuration of the model.
      graphdef: structure of the model.
      params: parameters of the model. Matrices are in the compute dtype, and the ranks of low-rank
        matrices are padded with zeros; all other parameters are as the model stores them.
    """

    config: RWKV7Config
    graphdef: nnx.GraphDef
    params: _Params

    def model(self) -> RWKV7:
        """Returns the modules with these parameters."""
        return nnx.merge(self.graphdef, self.params)

    def decode_implementation(self, implementation: str | None) -> str | None:
        """Returns the implementation of `RWKV7.decode` for these parameters.

        Args:
          implementation: a name, which is returned; None returns "xla" if parameters are divided
            over devices, because the kernels would gather them, and else None.
        """
        divided = any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(self.params))
        return "xla" if implementation is None and divided else implementation


def prepare_decoding(model: RWKV7 | DecodingWeights) -> DecodingWeights:
    """Casts and pads the matrices of a model once, so that no decoding step has to.

    Parameters that need no change are shared with the model, not copied. For a model whose
    `param_dtype` is its `compute_dtype`, only low-rank matrices may need padding.

    Args:
      model: the model, or weights that have been prepared already, which are returned unchanged.
    """
    if isinstance(model, DecodingWeights):
        return model
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    # A compiled function copies what it returns, so it returns only what changes.
    changed = _changed_params(graphdef, params)
    params = jax.tree.map(lambda old, new: old if new is None else new, params, changed)
    return DecodingWeights(model.config, graphdef, params)


@functools.partial(jax.jit, static_argnums=0)
def _changed_params(graphdef: nnx.GraphDef, params: _Params) -> _Params:
    """Returns the prepared parameters, with None for those that need no change."""
    model = nnx.merge(graphdef, params)
    prepared: _Params = jax.tree.map(lambda param: param, params)  # copies the dicts
    prepared["head"] = params["head"].astype(model.config.compute_dtype)
    weights = model.layer_weights()
    for name, (module, parameter) in LAYER_WEIGHT_PATHS.items():
        prepared["blocks"][module][parameter] = getattr(weights, name)

    def changed(old: jax.Array, new: jax.Array) -> jax.Array | None:
        return None if (old.shape, old.dtype) == (new.shape, new.dtype) else new

    return jax.tree.map(changed, params, prepared)


__all__ = ["DecodingWeights", "prepare_decoding"]
