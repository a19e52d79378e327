"""The kernels of `reference` for Hopper: same arguments, same results up to rounding, and a work list to share.

A call is three launches: tiles of queries are gathered (XLA), items attended (`attend`), partials merged (`merge`).
The work list depends on lengths and positions only: make it once a tick and pass it to the calls of all layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import attend, merge
from pallas_kernels.merge import merge_partials as merge_partials
from pallas_kernels.tiling import SMS, Tiling
from pallas_kernels.work import Work, work_list

PAGE_TOKENS = 128
DECODE = Tiling(rows=64, stages=2, waves=2, least_pages=2)


def prefill_tiling(tokens: int, heads_per_kv: int, kv_heads: int, head_dim: int) -> Tiling:
    """How a chunk of so many tokens is cut. Chosen by measurement on an H100; what lost is in TRIED.md."""
    rows = tokens * heads_per_kv
    if rows <= 64:
        return DECODE
    tile = 192 if head_dim == 64 and rows >= 384 else 128
    shared: dict[str, Any] = dict(rows=tile)
    # With an odd number of kv heads half of the last such tile of a chunk could stay empty: not where tiles are few.
    if head_dim == 128 and rows > (tile if kv_heads % 2 == 0 else 15 * tile):
        shared = dict(rows=256, ctas=2)
    if rows * kv_heads < 2 * SMS * tile:
        return Tiling(**shared, stages=2, waves=6, least_pages=4, heads_together=2, even=True)
    return Tiling(**shared, stages=2, waves=32, least_pages=64, heads_together=1)


def unsupported(head_dim: int, heads_per_kv: int, page_tokens: int, dtype: Any) -> str | None:
    """Why these kernels cannot serve such a model, or None if they can."""
    if head_dim not in (64, 128):
        return f"head dim {head_dim} is neither 64 nor 128"
    if heads_per_kv > 16:
        return f"{heads_per_kv} query heads for each kv head are more than 16"
    if page_tokens != PAGE_TOKENS:
        return f"pages hold {page_tokens} tokens, not {PAGE_TOKENS}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype).name} is neither bfloat16 nor float16"
    return None


def prefill_work(
    cu_q_lens_R1: jax.Array,
    q_positions_T: jax.Array,
    *,
    heads_per_kv: int,
    kv_heads: int,
    head_dim: int,
    decodes: int = 0,
    **rows_R: Any,
) -> Work:
    """The work list of a `chunked_prefill`; `rows_R` are its slots, kv_lens, key_start and key_stride.

    The first `decodes` rows have one query each, the tokens before all others: they share one list with the chunks.
    """
    tiling = prefill_tiling(q_positions_T.shape[0] - decodes, heads_per_kv, kv_heads, head_dim)
    heads: Any = dict(heads_per_kv=heads_per_kv, kv_heads=kv_heads)
    ragged = (cu_q_lens_R1, q_positions_T)
    return work_list(*ragged, **rows_R, **heads, page_tokens=PAGE_TOKENS, tiling=tiling, singles=decodes)


def decode_work(q_positions_R: jax.Array, *, heads_per_kv: int, kv_heads: int, **rows_R: Any) -> Work:
    """The work list of a `paged_decode`; `rows_R` as in `prefill_work`."""
    R = q_positions_R.shape[0]
    ragged = (jnp.arange(R + 1, dtype=jnp.int32), q_positions_R)
    heads: Any = dict(heads_per_kv=heads_per_kv, kv_heads=kv_heads)
    return work_list(*ragged, **rows_R, **heads, page_tokens=PAGE_TOKENS, tiling=DECODE, singles=R)


def chunked_prefill(
    q_TNH: jax.Array,
    kv_LP2KBH: jax.Array,
    layer: jax.Array | int,
    page_table_SJ: jax.Array,
    *,
    cu_q_lens_R1: jax.Array,
    q_positions_T: jax.Array,
    interpret: Any = False,
    **rows_R: Any,
) -> tuple[jax.Array, jax.Array]:
    """`reference.chunked_prefill`: (out_TNH float32, lse_TN float32 base 2)."""
    (_, N, H), K = q_TNH.shape, kv_LP2KBH.shape[3]
    work = prefill_work(cu_q_lens_R1, q_positions_T, heads_per_kv=N // K, kv_heads=K, head_dim=H, **rows_R)
    return attend_work(q_TNH, kv_LP2KBH, layer, page_table_SJ, work, interpret=interpret)


def paged_decode(
    q_RNH: jax.Array,
    kv_LP2KBH: jax.Array,
    layer: jax.Array | int,
    page_table_SJ: jax.Array,
    *,
    q_positions_R: jax.Array,
    interpret: Any = False,
    **rows_R: Any,
) -> tuple[jax.Array, jax.Array]:
    """`reference.paged_decode`: (out_RNH float32, lse_RN float32 base 2)."""
    N, K = q_RNH.shape[1], kv_LP2KBH.shape[3]
    work = decode_work(q_positions_R, heads_per_kv=N // K, kv_heads=K, **rows_R)
    return attend_work(q_RNH, kv_LP2KBH, layer, page_table_SJ, work, interpret=interpret)


def attend_work(
    q_TNH: jax.Array,
    kv_LP2KBH: jax.Array,
    layer: jax.Array | int,
    page_table_SJ: jax.Array,
    work: Work,
    *,
    dtype: Any = jnp.float32,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """What `chunked_prefill` or `paged_decode` returns, for a work list made before: (out_TNH of `dtype`, lse_TN)."""
    T, N, H = q_TNH.shape
    K = kv_LP2KBH.shape[3]
    G = N // K
    q_TKGH = q_TNH.astype(kv_LP2KBH.dtype).reshape(T, K, G, H)
    if work.tile_rows < 64:  # tiles of one query each: as they lie
        q_TKGH = jnp.pad(q_TKGH, ((0, 0), (0, 0), (0, work.tile_rows - G), (0, 0)))
        q_KMH = q_TKGH.swapaxes(0, 1).reshape(K, -1, H)
    else:
        q_KMH = q_TKGH[work.token_M, :, work.head_M].swapaxes(0, 1)
    parts = attend.partials(q_KMH, kv_LP2KBH, layer, page_table_SJ, work, interpret=interpret)
    return merge.merge_items(*parts, work.merges_TW, heads_per_kv=G, dtype=dtype, interpret=interpret)
