"""Paged attention in blockwise jnp: the CPU path, and the definition of correct for every kernel.

One semantics serves a prefill chunk, a decode row, a KVP shard and a ring step. Row r of a call
holds queries cu_q_lens[r] .. cu_q_lens[r+1]. Its keys sit on pages page_table[slots[r], j]; the key
at offset b of local page j has the global position (key_start[r] + key_stride[r] * j) * B + b, and
the first kv_lens[r] of them, counted page after page, exist. A query sees the keys that exist and
whose position is at most its own. What comes back is the attention over those keys alone, with its
log-sum-exp in base 2, so that partial results over disjoint keys merge. A query that sees no key
returns (0, MASKED).

Shapes: T queries, N query heads, K kv heads, H head dim, L layers, P pages, B tokens per page,
R rows, S slots, J page-table columns, X partials. All integers are int32.
"""

from __future__ import annotations

import functools
from math import e, log2

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30
KEYS_PER_BLOCK = 512


def chunked_prefill(
    q_TNH: jax.Array,
    kv_LP2KBH: jax.Array,
    layer: jax.Array | int,
    page_table_SJ: jax.Array,
    *,
    slots_R: jax.Array,
    cu_q_lens_R1: jax.Array,
    q_positions_T: jax.Array,
    kv_lens_R: jax.Array,
    key_start_R: jax.Array,
    key_stride_R: jax.Array,
    q_tile: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Attention of ragged chunks of queries over paged keys: (out_TNH float32, lse_TN float32, base 2).

    The whole stacked cache and a layer index are passed, never a slice of the cache, which would be
    copied. Work is cut into tiles of `q_tile` queries of one row, and keys are met `KEYS_PER_BLOCK`
    at a time: no array grows with the context.
    """
    T, N, H = q_TNH.shape
    K, B = kv_LP2KBH.shape[3:5]
    q_tile = min(q_tile, T)
    tile = functools.partial(
        _attend_tile,
        kv_LP2KBH=kv_LP2KBH,
        layer=layer,
        page_table_SJ=page_table_SJ,
        pages_per_block=max(1, KEYS_PER_BLOCK // B),
    )
    tiles_R = -(-(cu_q_lens_R1[1:] - cu_q_lens_R1[:-1]) // q_tile) * (kv_lens_R > 0)
    tiles_seen_R = jnp.cumsum(tiles_R)

    def pad(x: jax.Array) -> jax.Array:  # a row's last tile may reach past the last query
        return jnp.pad(x, [(0, q_tile)] + [(0, 0)] * (x.ndim - 1))

    q_padded, q_positions_padded = pad(q_TNH), pad(q_positions_T)

    def attend_tile(i, results):
        row = jnp.searchsorted(tiles_seen_R, i, side="right")
        first = cu_q_lens_R1[row] + (i - (tiles_seen_R[row] - tiles_R[row])) * q_tile
        q_tNH = lax.dynamic_slice_in_dim(q_padded, first, q_tile)
        positions_t = lax.dynamic_slice_in_dim(q_positions_padded, first, q_tile)
        in_row_t = first + jnp.arange(q_tile) < cu_q_lens_R1[row + 1]
        new = tile(
            q_tNH,
            jnp.where(in_row_t, positions_t, -1),
            slots_R[row],
            kv_lens_R[row],
            key_start_R[row],
            key_stride_R[row],
        )

        def put(old, new):
            kept = lax.dynamic_slice_in_dim(old, first, q_tile)
            mask = in_row_t.reshape(-1, *[1] * (new.ndim - 1))
            return lax.dynamic_update_slice_in_dim(old, jnp.where(mask, new, kept), first, 0)

        return jax.tree.map(put, results, new)

    empty = (jnp.zeros((T + q_tile, N, H), jnp.float32), jnp.full((T + q_tile, N), MASKED, jnp.float32))
    out, lse = lax.fori_loop(0, tiles_seen_R[-1], attend_tile, empty)
    return out[:T], lse[:T]


def _attend_tile(q_tNH, positions_t, slot, kv_len, start, stride, *, kv_LP2KBH, layer, page_table_SJ, pages_per_block):
    """Attention of the queries of one tile (position -1: not in the row) over the pages they can see."""
    t, N, H = q_tNH.shape
    K, B = kv_LP2KBH.shape[3:5]
    q_KMH = jnp.moveaxis(q_tNH.reshape(t, K, N // K, H), 1, 0).reshape(K, -1, H).astype(jnp.float32)
    q_KMH *= H**-0.5 * log2(e)
    positions_M = jnp.repeat(positions_t, N // K)
    visible_pages = jnp.minimum((jnp.max(positions_t) // B - start) // stride + 1, -(-kv_len // B))

    def attend_block(i, carry):
        out_KMH, max_KM, sum_KM = carry
        pages = i * pages_per_block + jnp.arange(pages_per_block)
        kv = kv_LP2KBH.at[layer, page_table_SJ.at[slot, pages].get(mode="clip")].get(mode="clip").astype(jnp.float32)
        k_KSH, v_KSH = jnp.moveaxis(kv, (1, 2), (0, 1)).reshape(2, K, -1, H)
        key_positions_S = ((start + stride * pages) * B)[:, None] + jnp.arange(B)
        exists_S = ((pages * B)[:, None] + jnp.arange(B) < kv_len).reshape(-1)
        visible_MS = exists_S & (key_positions_S.reshape(-1) <= positions_M[:, None])
        scores_KMS = jnp.einsum("kmh,ksh->kms", q_KMH, k_KSH, precision=lax.Precision.HIGHEST)
        scores_KMS = jnp.where(visible_MS, scores_KMS, MASKED)
        new_max_KM = jnp.maximum(max_KM, scores_KMS.max(-1))
        weights_KMS = jnp.where(visible_MS, jnp.exp2(scores_KMS - new_max_KM[..., None]), 0.0)
        # Slots past the end hold anything, also NaN, and 0 * NaN is NaN.
        v_KSH = jnp.where(exists_S[:, None], v_KSH, 0.0)
        shrink_KM = jnp.exp2(max_KM - new_max_KM)
        out_KMH = out_KMH * shrink_KM[..., None]
        out_KMH += jnp.einsum("kms,ksh->kmh", weights_KMS, v_KSH, precision=lax.Precision.HIGHEST)
        return out_KMH, new_max_KM, sum_KM * shrink_KM + weights_KMS.sum(-1)

    KM = q_KMH.shape[:2]
    empty = (jnp.zeros(q_KMH.shape, jnp.float32), jnp.full(KM, MASKED, jnp.float32), jnp.zeros(KM, jnp.float32))
    out_KMH, max_KM, sum_KM = lax.fori_loop(0, -(-visible_pages // pages_per_block), attend_block, empty)
    saw_KM = sum_KM != 0  # a NaN counts as seen: it must reach its own request's logits, not vanish
    sum_KM = jnp.where(saw_KM, sum_KM, 1.0)
    lse_KM = jnp.where(saw_KM, max_KM + jnp.log2(sum_KM), MASKED)
    out_tNH = jnp.moveaxis((out_KMH / sum_KM[..., None]).reshape(K, t, N // K, H), 0, 1).reshape(t, N, H)
    return out_tNH, jnp.moveaxis(lse_KM.reshape(K, t, N // K), 0, 1).reshape(t, N)


def paged_decode(
    q_RNH: jax.Array,
    kv_LP2KBH: jax.Array,
    layer: jax.Array | int,
    page_table_SJ: jax.Array,
    *,
    slots_R: jax.Array,
    q_positions_R: jax.Array,
    kv_lens_R: jax.Array,
    key_start_R: jax.Array,
    key_stride_R: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query per row over its paged keys: (out_RNH float32, lse_RN float32, base 2).

    Rows with kv_lens 0 cost nothing and return (0, MASKED).
    """
    return chunked_prefill(
        q_RNH,
        kv_LP2KBH,
        layer,
        page_table_SJ,
        slots_R=slots_R,
        cu_q_lens_R1=jnp.arange(q_RNH.shape[0] + 1, dtype=jnp.int32),
        q_positions_T=q_positions_R,
        kv_lens_R=kv_lens_R,
        key_start_R=key_start_R,
        key_stride_R=key_stride_R,
        q_tile=1,
    )


def merge_partials(out_XTNH: jax.Array, lse_XTN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention over the union of X disjoint sets of keys: (out_TNH, lse_TN), summed in the order of X."""
    lse_max_TN = lse_XTN.max(0)
    weight_XTN = jnp.exp2(lse_XTN - lse_max_TN)
    total_TN = weight_XTN.sum(0)
    out_TNH = (weight_XTN[..., None] * out_XTNH).sum(0) / total_TN[..., None]
    return out_TNH, lse_max_TN + jnp.log2(total_TN)
