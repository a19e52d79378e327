"""Partial attention as a monoid, and its merge over kvp groups."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.reference import MASKED, merge_partials


@flax.struct.dataclass
class Partial:
    """Attention over some of the keys: `out_TNH` and its log-sum-exp in base 2, `lse_TN`, both float32."""

    out_TNH: jax.Array
    lse_TN: jax.Array


def identity(T: int, N: int, H: int) -> Partial:
    """The Partial over no keys: merging it changes nothing."""
    return Partial(jnp.zeros((T, N, H), jnp.float32), jnp.full((T, N), MASKED, jnp.float32))


def merge(*parts: Partial) -> Partial:
    """The Partial over the union of disjoint sets of keys. Associative and commutative up to rounding.

    Source: online softmax; Mnemosyne's KVP (arXiv 2409.17264, section on KV parallelism).
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return Partial(*merge_partials(stacked.out_TNH, stacked.lse_TN))


def merge_over_kvp(part: Partial) -> Partial:
    """The Partial over the keys of all kvp groups, the same bits in every group.

    One all-gather of packed (out, lse); every group then sums in the order of groups, so that a
    near-tie between two tokens cannot fall differently in two groups.
    """
    if lax.axis_size("kvp") == 1 or part.lse_TN.shape[0] == 0:
        return part
    packed = jnp.concatenate([part.out_TNH, part.lse_TN[..., None]], axis=-1)
    gathered = lax.all_gather(packed, "kvp")
    return Partial(*merge_partials(gathered[..., :-1], gathered[..., -1]))
