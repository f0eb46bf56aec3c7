"""The speed of the device itself, as a measure for that of programs."""

import functools
import time

import jax
import jax.numpy as jnp


@functools.cache
def copy_rate(gigabytes: float = 1.0, calls: int = 20) -> float:
    """Returns the bytes per second that copies read and write, in the fastest of 3 rounds."""
    x = jnp.ones(int(gigabytes * 2**30) // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            y = copy(x)
        jax.block_until_ready(y)
        rounds.append((time.perf_counter() - start) / calls)
    return 2 * x.nbytes / min(rounds)


@functools.cache
def product_rate(size: int = 8192, calls: int = 10) -> float:
    """Returns the operations per second of large bfloat16 products, in the fastest of 3 rounds."""
    if jax.default_backend() != "gpu":
        size = 1024
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, y))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            z = multiply(x, y)
        jax.block_until_ready(z)
        rounds.append((time.perf_counter() - start) / calls)
    return 2 * size**3 / min(rounds)
