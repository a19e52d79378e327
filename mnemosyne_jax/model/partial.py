"""Partial attention as a monoid, and its merge over kvp groups."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.reference import MASKED, merge_partials

# From this size of a group's packed partial on, and with more than two groups, the merge goes around the ring.
# A guess until `experiments.bench_kvp_merge` has been run on more than two GPUs: on two H200s the ring, which has
# nothing to save there, is slower at 8 MiB (75 against 65 us) and faster at 64 MiB (353 against 389 us).
RING_FROM_BYTES = 8 << 20


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
    return _merge_stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


def merge_over_kvp(part: Partial) -> Partial:
    """The Partial over the keys of all kvp groups, the same bits in every group. Called inside shard_map.

    The same bits, so that a near-tie between two tokens cannot fall differently in two groups. Small
    partials, where latency counts, go by `gather_merge`; large ones among more than two groups,
    where bytes count, by `ring_merge`. The two differ by rounding.
    """
    groups = lax.axis_size("kvp")
    if groups == 1 or part.lse_TN.shape[0] == 0:
        return part
    packed_bytes = 4 * (part.out_TNH.size + part.lse_TN.size)
    return ring_merge(part) if groups > 2 and packed_bytes >= RING_FROM_BYTES else gather_merge(part)


def gather_merge(part: Partial) -> Partial:
    """As `merge_over_kvp`, by one all-gather: every group receives all partials and sums them in group order.

    With G groups a group receives, and merges, G - 1 times its partial.
    """
    return _merge_stacked(_unpack(lax.all_gather(_pack(part), "kvp")))


def ring_merge(part: Partial) -> Partial:
    """As `merge_over_kvp`, by a reduce-scatter around the ring of groups and an all-gather of the result.

    The rows, padded to a multiple of the G groups, are cut into G slices, one owned by each group. A
    slice starts at the group after its owner and is merged with each next group's own until it
    ends, whole, at its owner: slice s is summed in the order s + 1, s + 2, ..., s, which differs from
    slice to slice. All groups hold the same bits nevertheless: every row is finished by one
    group and copied to the others. A group receives less than twice its partial, whatever G is.

    Source: the bandwidth-optimal ring all-reduce (Patarasuk and Yuan, 2009), with `merge` as its sum.
    """
    groups, group = lax.axis_size("kvp"), lax.axis_index("kvp")
    T = part.lse_TN.shape[0]
    to_next = [(g, (g + 1) % groups) for g in range(groups)]
    packed = jnp.pad(_pack(part), ((0, -T % groups), (0, 0), (0, 0)))
    slices = packed.reshape(groups, -1, *packed.shape[1:])

    def own(hop: int) -> jax.Array:  # this group's part of the slice that is here after so many hops
        return lax.dynamic_index_in_dim(slices, (group - 1 - hop) % groups, keepdims=False)

    moving = own(0)
    for hop in range(1, groups):
        received = lax.ppermute(moving, "kvp", to_next)
        moving = _pack(merge(_unpack(received), _unpack(own(hop))))
    return _unpack(lax.all_gather(moving, "kvp", tiled=True)[:T])


def _merge_stacked(stacked: Partial) -> Partial:
    """The merge of partials stacked along a leading axis: the one place where partials are summed.

    XLA fuses it with the packing around it into one pass, at the rate of `pallas_kernels.merge.merge_partials`.
    """
    return Partial(*merge_partials(stacked.out_TNH, stacked.lse_TN))


def _pack(part: Partial) -> jax.Array:
    """Output and log-sum-exp in one array, and so in one message: [..., H + 1]."""
    return jnp.concatenate([part.out_TNH, part.lse_TN[..., None]], axis=-1)


def _unpack(packed: jax.Array) -> Partial:
    """The Partial that `_pack` packed, whatever its leading axes."""
    return Partial(packed[..., :-1], packed[..., -1])
