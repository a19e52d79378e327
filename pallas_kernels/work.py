"""The work list of a tick: ragged attention cut into items that keep every SM busy, whatever the mix.

Queries are cut into tiles, the keys of each tile into runs of pages of one common length: the mean over what the chip
can hold, or what has all SMs end together. One long row, a thousand short ones, or both: no item is longer than that
(or `least_pages`), so no SM works much longer than another. All of it is a few sorts and sums over rows + items on the
device, made once a tick and shared by all layers; bounds are data, so one compiled program serves every context length.

Shapes: N tiles, t queries and M rows in a tile, I items, W int32 words of an item, and those of `reference`.
"""

from __future__ import annotations

import dataclasses
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SMS = 132  # of an H100 SXM or an H200
MOST_PARTS = 33  # of the longest tile, among the cuts that are tried
ITEM_PAGES = 2  # what it takes to begin and end an item, in pages


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work. `rows` of queries (tokens x heads of one kv head) make a tile, 64 a warpgroup.

    `stages` pages of keys and values are in flight; `waves` CTAs for each SM are aimed at, no item below `least_pages`.
    Where CTAs are few, some SMs could have one more than others: `even` aims at up to `waves`, as many as end together.
    Full items of `heads_together` kv heads (all if None) run side by side before the next heads' turn: fewer keys in
    the L2 cache at a time. A tile is shared by the `ctas` of a cluster, each of which reads a part of a page for all.
    """

    rows: int
    stages: int
    waves: int
    least_pages: int
    heads_together: int | None = None
    ctas: int = 1
    even: bool = False

    def items_of_a_head(self, kv_heads: int, waves: int) -> int:
        """How many there are if they come to so many waves, at least one."""
        return max(1, waves * SMS // (kv_heads * self.ctas))

    def place(self, index: Any, full_items: Any, kv_heads: int) -> tuple[Any, Any]:
        """(item, kv head) of the CTA or cluster number `index`: those that start first have full items, in turns.

        What is left of tiles comes last, whatever its head, and fills the SMs that finish early.
        """
        together = gcd(kv_heads, self.heads_together or kv_heads)
        in_turn = jnp.maximum(full_items * together, 1)
        turn, rest = lax.div(index, in_turn), index - full_items * kv_heads
        item = jnp.where(rest < 0, lax.div(lax.rem(index, in_turn), together), full_items + lax.div(rest, kv_heads))
        head = jnp.where(
            rest < 0, turn * together + lax.rem(lax.rem(index, in_turn), together), lax.rem(rest, kv_heads)
        )
        return item, head

    @property
    def warpgroups(self) -> int:
        """Those of a CTA that attend."""
        return self.rows // 64 // self.ctas


class Item(NamedTuple):
    """The words of an item: which queries meet which pages, and where the partial result goes."""

    tile: jax.Array
    partial: jax.Array  # its place among the partials: those of one tile lie side by side, in the order of their keys
    slot: jax.Array
    begin_page: jax.Array
    whole_pages: jax.Array  # up to here every key of every page is visible to every query of the tile
    end_page: jax.Array
    key_start: jax.Array
    key_stride: jax.Array
    kv_len: jax.Array


class Merge(NamedTuple):
    """The words of a query token: where its partials are, none if it has no key on any page, and its place there."""

    first_partial: jax.Array
    partials: jax.Array
    place: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What the kernels need beside q and the cache. Items are sorted: long ones first, neighbours share keys.

    The first `full_items_1` of them are of the common length.
    """

    items_IW: jax.Array
    full_items_1: jax.Array
    tokens_Nt: jax.Array
    positions_NM: jax.Array  # of each row of a tile, -1 where there is no query
    merges_TW: jax.Array
    tiling: Tiling = dataclasses.field(metadata=dict(static=True))


def work_list(
    cu_q_lens_R1: jax.Array,
    q_positions_T: jax.Array,
    *,
    slots_R: jax.Array,
    kv_lens_R: jax.Array,
    key_start_R: jax.Array,
    key_stride_R: jax.Array,
    page_tokens: int,
    heads_per_kv: int,
    kv_heads: int,
    tiling: Tiling,
) -> Work:
    """The Work of these rows; arguments as in `reference.chunked_prefill`, the first row starting at query 0.

    Queries behind the last row get no tile.
    """
    T, R, B = q_positions_T.shape[0], slots_R.shape[0], page_tokens
    t = tiling.rows // heads_per_kv if T > R else 1
    N = T // t + (R if t > 1 else 0)
    lens_R = cu_q_lens_R1[1:] - cu_q_lens_R1[:-1]
    tiles_R = -(-lens_R // t)
    tiles_seen_R = jnp.cumsum(tiles_R)
    row_N = _owner(tiles_seen_R, N)
    first_N = cu_q_lens_R1[row_N] + (jnp.arange(N) - (tiles_seen_R - tiles_R)[row_N]) * t
    real_N = jnp.arange(N) < tiles_seen_R[-1]
    count_N = jnp.where(real_N, jnp.clip(cu_q_lens_R1[row_N + 1] - first_N, 0, t), 0)
    tokens_Nt = jnp.clip(first_N[:, None] + jnp.arange(t), 0, T - 1)
    in_tile_Nt = jnp.arange(t) < count_N[:, None]
    positions_Nt = jnp.where(in_tile_Nt, q_positions_T[tokens_Nt], -1)

    start_N, stride_N, kv_len_N = key_start_R[row_N], key_stride_R[row_N], kv_lens_R[row_N]
    highest_N = positions_Nt.max(1)
    lowest_N = jnp.where(in_tile_Nt, positions_Nt, jnp.iinfo(jnp.int32).max - 1).min(1)
    reach_N = (highest_N // B - start_N) // stride_N + 1
    pages_N = jnp.clip(jnp.minimum(reach_N, -(-kv_len_N // B)), 0)
    whole_N = jnp.minimum(((lowest_N + 1) // B - 1 - start_N) // stride_N + 1, kv_len_N // B)

    longest = _longest(pages_N, kv_heads, tiling)
    partials_N = -(-pages_N // longest)
    partials_seen_N = jnp.cumsum(partials_N)
    first_partial_N = partials_seen_N - partials_N
    i_I = jnp.arange(N + tiling.items_of_a_head(kv_heads, tiling.waves))
    tile_I = _owner(partials_seen_N, len(i_I))
    split_I = i_I - first_partial_N[tile_I]
    begin_I = split_I * longest
    end_I = jnp.where(i_I < partials_seen_N[-1], jnp.minimum(begin_I + longest, pages_N[tile_I]), begin_I)
    items = Item(
        tile=tile_I,
        partial=i_I,
        slot=slots_R[row_N[tile_I]],
        begin_page=begin_I,
        whole_pages=whole_N[tile_I],
        end_page=end_I,
        key_start=start_N[tile_I],
        key_stride=stride_N[tile_I],
        kv_len=kv_len_N[tile_I],
    )
    # Items of full length by the part of the keys they read, so that those running together share it in the L2 cache;
    # then the rests, longest first, which fill the SMs that finish early.
    full_I = end_I - begin_I == longest
    order_I = jnp.argsort(jnp.where(full_I, split_I, len(i_I) + longest - (end_I - begin_I)))
    items_IW = jnp.stack(items, axis=1)[order_I]

    row_T = _owner(cu_q_lens_R1[1:], T)
    place_T = jnp.arange(T) - cu_q_lens_R1[row_T]
    tile_T = (tiles_seen_R - tiles_R)[row_T] + place_T // t
    partials_T = jnp.where(jnp.arange(T) < cu_q_lens_R1[-1], partials_N[tile_T], 0)
    merges_TW = jnp.stack(Merge(first_partial_N[tile_T], partials_T, place_T % t), axis=1)
    positions_NM = jnp.repeat(positions_Nt, heads_per_kv, axis=1)
    rows_beyond = tiling.rows - t * heads_per_kv
    positions_NM = jnp.pad(positions_NM, ((0, 0), (0, rows_beyond)), constant_values=-1)
    return Work(items_IW, full_I.sum(dtype=jnp.int32)[None], tokens_Nt, positions_NM, merges_TW, tiling)


def _longest(pages_N: jax.Array, kv_heads: int, tiling: Tiling) -> jax.Array:
    """Pages of the longest item."""
    aimed_at = tiling.items_of_a_head(kv_heads, tiling.waves)
    least = jnp.maximum(-(-pages_N.sum() // aimed_at), tiling.least_pages)
    if not tiling.even:
        return least
    items_W = jnp.array([tiling.items_of_a_head(kv_heads, waves + 1) for waves in range(tiling.waves)])
    parts_P = jnp.arange(MOST_PARTS) + 1
    length_C = jnp.maximum(jnp.concatenate([-(-pages_N.sum() // items_W), -(-pages_N.max() // parts_P)]), least)
    return length_C[jnp.argmin(_pages_until_all_end(pages_N, length_C, kv_heads, SMS // tiling.ctas))]


def _pages_until_all_end(pages_N: jax.Array, length_C: jax.Array, kv_heads: int, ctas: int) -> jax.Array:
    """How long so many CTAs at a time take for items of at most `length_C` pages.

    First full ones, in waves; then what is left of tiles, in the room of the last wave, and in waves of their own.
    """
    rest_CN = pages_N % length_C[:, None]
    full_C = kv_heads * (pages_N // length_C[:, None]).sum(1)
    rests_C = kv_heads * (rest_CN > 0).sum(1)
    full_time_C, rest_time_C = length_C + ITEM_PAGES, rest_CN.max(1) + ITEM_PAGES
    waves_C = -(-full_C // ctas)
    room_C = (waves_C * ctas - full_C) * (full_time_C // rest_time_C)
    more_waves_C = -(-jnp.maximum(rests_C - room_C, 0) // ctas)
    return waves_C * full_time_C + more_waves_C * rest_time_C


def _owner(seen_X: jax.Array, count: int) -> jax.Array:
    """For 0 .. count-1, the first x whose running total exceeds it; the last x for what is beyond all."""
    found = jnp.searchsorted(seen_X, jnp.arange(count), side="right", method="compare_all")
    return jnp.minimum(found, seen_X.shape[0] - 1)
