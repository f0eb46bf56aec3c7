"""Uses the layers of RWKV-7 in another model, which learns to continue sine waves."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from goose_jax import ChannelMix, RWKV7Config, TimeMix

CONFIG = RWKV7Config(
    vocab_size=1,  # unused: this model reads numbers, not tokens
    hidden_size=64,
    num_layers=2,
    head_size=32,
    compute_dtype="float32",
)


class Forecaster(nnx.Module):
    """Predicts the next number of a series from all numbers before it."""

    def __init__(self, *, rngs: nnx.Rngs):
        C, layers = CONFIG.hidden_size, range(CONFIG.num_layers)
        self.embedding = nnx.Linear(1, C, rngs=rngs)
        self.norms = nnx.List(nnx.LayerNorm(C, rngs=rngs) for _ in range(2 * len(layers)))
        self.time_mixes = nnx.List(TimeMix(CONFIG, layer=i, rngs=rngs) for i in layers)
        self.channel_mixes = nnx.List(ChannelMix(CONFIG, layer=i, rngs=rngs) for i in layers)
        self.head = nnx.Linear(C, 1, rngs=rngs)

    def __call__(self, series: jax.Array) -> jax.Array:
        """Returns predictions `[B, T]`, each of the number after the one read."""
        x = self.embedding(series[..., None])  # [B, T, C]
        v_first = None  # the first time mix sets it, the others read it
        for i in range(CONFIG.num_layers):
            y, v_first, _ = self.time_mixes[i](self.norms[2 * i](x), v_first)
            x = x + y
            y, _ = self.channel_mixes[i](self.norms[2 * i + 1](x))
            x = x + y
        return self.head(x)[..., 0]  # [B, T]


def sine_waves(key: jax.Array) -> jax.Array:
    frequency, phase = jax.random.uniform(key, (2, 16, 1))
    return jnp.sin((0.2 + frequency) * jnp.arange(33) + 6.3 * phase)  # [B, T + 1]


@nnx.jit
def train_step(model: Forecaster, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
    series = sine_waves(key)

    def loss(model: Forecaster) -> jax.Array:
        return jnp.mean((model(series[:, :-1]) - series[:, 1:]) ** 2)

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def main(steps: int = 300) -> list[float]:
    model = Forecaster(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(1), steps)
    losses = [float(train_step(model, optimizer, key)) for key in keys]
    print(f"mean squared error: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
