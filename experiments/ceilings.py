"""What a device reaches on a large matrix product and on a large copy: what every other rate stands beside."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.clocks import Clock, jax_clock, time_calls
from experiments.rivals import normal


def matmul_clock(size: int) -> Clock:
    """Of the product of two random bfloat16 matrices [size, size]."""
    a, b = normal(0, (size, size)), normal(1, (size, size))
    product = jax.jit(jnp.matmul)
    return jax_clock(lambda: product(a, b))


def measure(matmul_size: int, copy_bytes: int, sample_s: float) -> dict[str, float]:
    """`matmul_tflops`, and `copy_tb_per_s` of bytes read and written, of one device; printed too."""
    matmul = time_calls(matmul_clock(matmul_size), 1, sample_s)
    source = jax.jit(lambda: jax.random.bits(jax.random.key(0), (copy_bytes // 4,), jnp.uint32))()
    copy = jax.jit(jnp.copy)
    copied = time_calls(jax_clock(lambda: copy(source)), 1, sample_s)
    reached = dict(
        matmul_tflops=2e-12 * matmul_size**3 / matmul.median_s,
        copy_tb_per_s=2e-12 * source.nbytes / copied.median_s,
    )
    print(", ".join(f"{name} {value:.4g}" for name, value in reached.items()), flush=True)
    return reached
