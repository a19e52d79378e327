"""Striped ring attention: prefill of a whole prompt under context parallelism, exact.

The baseline that the sequence pipeline is compared with. The tokens, queries and keys alike, are
dealt out to n devices in pages: local page j of device d is global page d + n * j. Queries stay,
keys and values travel around the ring. As every device holds early and late pages, causal work is
balanced: at each step the visible keys of a query on two devices differ by at most a page.

Source: Ring Attention (arXiv 2310.01889); Striped Attention (arXiv 2311.09431), which deals out
single tokens where this deals out pages, so that a block is an ordinary paged cache.

Shapes: T local tokens, N query heads, K kv heads, H head dim; caches as in pallas_kernels/reference.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from mnemosyne_jax.model.partial import Partial, merge
from pallas_kernels import reference


def stripe[Rows: (jax.Array, np.ndarray)](x: Rows, n: int, page_tokens: int) -> Rows:
    """Rows in global order, dealt out: equal cuts of the leading axis, one per device, in local order.

    Raises: EinopsError if the rows do not fill whole pages, the same number on each of n devices.
    """
    return rearrange(x, "(j n b) ... -> (n j b) ...", n=n, b=page_tokens)


def unstripe[Rows: (jax.Array, np.ndarray)](x: Rows, n: int, page_tokens: int) -> Rows:
    """Rows in global order again: the inverse of `stripe`, with its errors."""
    return rearrange(x, "(n j b) ... -> (j n b) ...", n=n, b=page_tokens)


def ring_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    *,
    tokens: jax.Array | int,
    page_tokens: int = 128,
    axis: str = "kvp",
    chunked_prefill: Callable[..., tuple[jax.Array, jax.Array]] = reference.chunked_prefill,
) -> Partial:
    """Causal attention of this device's queries over all keys of the prompt. Called inside shard_map over `axis`.

    The arguments are this device's part of `stripe`. `tokens`, the same on all devices, is the
    length of the prompt from position 0 on, at most n * T; what lies behind it may hold anything,
    its queries get (0, MASKED). `chunked_prefill` is a kernel with the interface of the reference's.

    Raises: AssertionError if T is not whole pages, or the shapes or types of keys and values differ.
    """
    T, _, H = q_TNH.shape
    chex.assert_is_divisible(T, page_tokens)
    chex.assert_shape([k_TKH, v_TKH], (T, None, H))
    chex.assert_trees_all_equal_shapes_and_dtypes(k_TKH, v_TKH)
    n, device = lax.axis_size(axis), lax.axis_index(axis)
    to_next = [(d, (d + 1) % n) for d in range(n)]
    local_T = jnp.arange(T, dtype=jnp.int32)
    queries = dict(
        slots_R=jnp.zeros(1, jnp.int32),
        cu_q_lens_R1=jnp.stack([jnp.int32(0), _held(tokens, device, n, page_tokens)]),
        q_positions_T=(device + n * (local_T // page_tokens)) * page_tokens + local_T % page_tokens,
    )
    table_SJ = jnp.arange(T // page_tokens, dtype=jnp.int32)[None]
    # One buffer, as two messages would go one after the other; in the layout of a cache, so that no step copies it.
    kv_LP2KBH = rearrange([k_TKH, v_TKH], "c (p b) k h -> 1 p c k b h", b=page_tokens)

    def parts() -> Iterator[Partial]:
        held_LP2KBH = kv_LP2KBH
        for step in range(n):
            owner, last = (device - step) % n, step == n - 1
            # Sent on before the attention, which does not wait for it.
            arriving_LP2KBH = held_LP2KBH if last else lax.ppermute(held_LP2KBH, axis, to_next)
            keys = dict(
                kv_lens_R=_held(tokens, owner, n, page_tokens)[None],
                key_start_R=owner[None],
                key_stride_R=jnp.full(1, n, jnp.int32),
            )
            yield Partial(*chunked_prefill(q_TNH, held_LP2KBH, 0, table_SJ, **queries, **keys))
            held_LP2KBH = arriving_LP2KBH

    return functools.reduce(merge, parts())


def _held(tokens: jax.Array | int, owner: jax.Array, n: int, page_tokens: int) -> jax.Array:
    """How many of the prompt's tokens `owner` holds: its full pages, and the partly filled one if that is its own."""
    full, rest = jnp.divmod(jnp.int32(tokens), page_tokens)
    return (full + n - 1 - owner) // n * page_tokens + jnp.where(full % n == owner, rest, 0)
