"""The work list of a tick: ragged attention cut into items that keep every SM busy, whatever the mix.

Queries are cut into tiles, the keys of each tile into runs of pages of one common length: the mean over what the chip
can hold, or what has all SMs end together. One long row, a thousand short ones, or both: no item is longer than that
(or `least_pages`), so no SM works much longer than another. All of it is a few sorts and sums over rows + items on the
device, made once a tick and shared by all layers; bounds are data, so one compiled program serves every context length.

Shapes: N tiles, of S single queries and C of up to t, M rows of all tiles, I items, W int32 words of an item, and those
of `reference`.
"""

from __future__ import annotations

import dataclasses
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SMS = 132  # of an H100 SXM or an H200
MOST_PARTS = 33  # of the longest tile, among the cuts that are tried
STRETCHED_BY = (96, 48, 24, 12)  # and these, by a part of them
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

    first_row: jax.Array  # of its tile, among the rows of all tiles
    rows: jax.Array  # how many of them hold a query
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

    The first `full_items_1` of them are of the common length. A tile has `tile_rows` rows, and those of one query fewer
    if there are others.
    """

    items_IW: jax.Array
    full_items_1: jax.Array
    token_M: jax.Array  # whose query lies in each row of all tiles, and which of the heads that share keys
    head_M: jax.Array
    position_M: jax.Array  # -1 where there is no query; 64 more rows than there are
    merges_TW: jax.Array
    tile_rows: int = dataclasses.field(metadata=dict(static=True))
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
    singles: int = 0,
) -> Work:
    """The Work of these rows; arguments as in `reference.chunked_prefill`, the first row starting at query 0.

    Queries behind the last row get no tile. The first `singles` queries have a tile each, others share one with those
    of their row: if there are others, the first `singles` rows hold one query each.
    """
    T, R, B, G, S = q_positions_T.shape[0], slots_R.shape[0], page_tokens, heads_per_kv, singles
    t = tiling.rows // G
    C = (T - S) // t + R - S if T > S else 0  # tiles that queries share
    # Tiles of one query, then shared ones: the row they are of, their first query and how many they have.
    single_S, shared_C = jnp.arange(S), jnp.arange(C)
    shared_R1 = jnp.maximum(cu_q_lens_R1 - S, 0)
    tiles_R = -(-(shared_R1[1:] - shared_R1[:-1]) // t)
    tiles_seen_R = jnp.cumsum(tiles_R)
    row_C = _owner(tiles_seen_R, C)
    first_C = S + shared_R1[row_C] + (shared_C - (tiles_seen_R - tiles_R)[row_C]) * t
    count_C = jnp.where(shared_C < tiles_seen_R[-1], jnp.clip(S + shared_R1[row_C + 1] - first_C, 0, t), 0)
    row_N = jnp.concatenate([_owner(cu_q_lens_R1[1:], S), row_C])
    first_N = jnp.concatenate([single_S, first_C])
    count_N = jnp.concatenate([(single_S < cu_q_lens_R1[-1]).astype(jnp.int32), count_C])

    # Rows of tiles, which a kernel fetches eight at a time.
    single_rows = -(-G // 8) * 8
    first_row_N = np.append(np.arange(S) * single_rows, S * single_rows + np.arange(C) * tiling.rows)
    tile_M = np.repeat(np.arange(S + C), np.append(np.full(S, single_rows), np.full(C, tiling.rows)))
    row_in_tile_M = np.arange(len(tile_M)) - first_row_N[tile_M]
    token_M = jnp.clip(first_N[tile_M] + row_in_tile_M // G, 0, T - 1)
    in_tile_M = row_in_tile_M < (count_N * G)[tile_M]
    position_M = jnp.where(in_tile_M, q_positions_T[token_M], -1)

    def of_tiles(reduce, x_M):
        singles, shared = x_M[: S * single_rows].reshape(S, single_rows), x_M[S * single_rows :].reshape(C, tiling.rows)
        return jnp.concatenate([reduce(singles, axis=1), reduce(shared, axis=1)])

    start_N, stride_N, kv_len_N = key_start_R[row_N], key_stride_R[row_N], kv_lens_R[row_N]
    highest_N = of_tiles(jnp.max, position_M)
    lowest_N = of_tiles(jnp.min, jnp.where(in_tile_M, position_M, jnp.iinfo(jnp.int32).max - 1))
    reach_N = (highest_N // B - start_N) // stride_N + 1
    pages_N = jnp.clip(jnp.minimum(reach_N, -(-kv_len_N // B)), 0)
    whole_N = jnp.minimum(((lowest_N + 1) // B - 1 - start_N) // stride_N + 1, kv_len_N // B)

    longest = _longest(pages_N, kv_heads, tiling)
    partials_N = -(-pages_N // longest)
    partials_seen_N = jnp.cumsum(partials_N)
    first_partial_N = partials_seen_N - partials_N
    i_I = jnp.arange(S + C + tiling.items_of_a_head(kv_heads, tiling.waves))
    tile_I = _owner(partials_seen_N, len(i_I))
    split_I = i_I - first_partial_N[tile_I]
    begin_I = split_I * longest
    end_I = jnp.where(i_I < partials_seen_N[-1], jnp.minimum(begin_I + longest, pages_N[tile_I]), begin_I)
    items = Item(
        first_row=jnp.asarray(first_row_N, jnp.int32)[tile_I],
        rows=(count_N * G)[tile_I],
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

    shared_T = jnp.arange(S, T) - S
    row_T = _owner(shared_R1[1:], T - S)
    place_T = shared_T - shared_R1[row_T]
    tile_T = jnp.concatenate([single_S, S + (tiles_seen_R - tiles_R)[row_T] + place_T // t])
    partials_T = jnp.where(jnp.arange(T) < cu_q_lens_R1[-1], partials_N[tile_T], 0)
    place_T = jnp.concatenate([jnp.zeros(S, jnp.int32), place_T % t])
    merges_TW = jnp.stack(Merge(first_partial_N[tile_T], partials_T, place_T), axis=1)
    return Work(
        items_IW,
        full_I.sum(dtype=jnp.int32)[None],
        token_M,
        jnp.asarray(row_in_tile_M % G),
        jnp.pad(position_M, (0, 64), constant_values=-1),
        merges_TW,
        tiling.rows if C else single_rows,
        tiling,
    )


def _longest(pages_N: jax.Array, kv_heads: int, tiling: Tiling) -> jax.Array:
    """Pages of the longest item."""
    aimed_at = tiling.items_of_a_head(kv_heads, tiling.waves)
    least = jnp.maximum(-(-pages_N.sum() // aimed_at), tiling.least_pages)
    if not tiling.even:
        return least
    items_W = jnp.array([tiling.items_of_a_head(kv_heads, waves + 1) for waves in range(tiling.waves)])
    parts_P = -(-pages_N.max() // (jnp.arange(MOST_PARTS) + 1))
    stretched = [parts_P + parts_P // part for part in STRETCHED_BY]  # room for what is short, beside the last parts
    length_C = jnp.maximum(jnp.concatenate([-(-pages_N.sum() // items_W), parts_P, *stretched]), least)
    return length_C[jnp.argmin(_pages_until_all_end(pages_N, length_C, kv_heads, SMS // tiling.ctas))]


def _pages_until_all_end(pages_N: jax.Array, length_C: jax.Array, kv_heads: int, ctas: int) -> jax.Array:
    """How long so many CTAs at a time take for items of at most `length_C` pages.

    First full ones, in waves; then what is left of tiles, in the room of the last wave, and in waves of their own: long
    rests one after the other, short ones wherever there is room.
    """
    rest_CN = pages_N % length_C[:, None]
    time_CN = jnp.where(rest_CN > 0, rest_CN + ITEM_PAGES, 0)
    full_C, full_time_C = kv_heads * (pages_N // length_C[:, None]).sum(1), length_C + ITEM_PAGES
    waves_C = -(-full_C // ctas)
    free_C = waves_C * ctas - full_C
    is_long_CN = 2 * time_CN > full_time_C[:, None]
    long_C, long_time_C = kv_heads * is_long_CN.sum(1), jnp.max(time_CN, axis=1, where=is_long_CN, initial=1)
    is_short_CN = (time_CN > 0) & ~is_long_CN
    short_C, short_time_C = kv_heads * is_short_CN.sum(1), jnp.max(time_CN, axis=1, where=is_short_CN, initial=1)
    more_waves_C = -(-jnp.maximum(long_C - free_C, 0) // ctas)
    beside_C = jnp.minimum(long_C, free_C)
    room_C = (free_C - beside_C) * (full_time_C // short_time_C)
    room_C += beside_C * (jnp.maximum(full_time_C - long_time_C, 0) // short_time_C)
    room_C += (more_waves_C * ctas - (long_C - beside_C)) * (long_time_C // short_time_C)
    short_waves_C = -(-jnp.maximum(short_C - room_C, 0) // ctas)
    all_C = full_C * full_time_C + kv_heads * time_CN.sum(1)
    end_C = waves_C * full_time_C + more_waves_C * long_time_C + short_waves_C * short_time_C
    return jnp.maximum(end_C, -(-all_C // ctas))


def _owner(seen_X: jax.Array, count: int) -> jax.Array:
    """For 0 .. count-1, the first x whose running total exceeds it; the last x for what is beyond all."""
    found = jnp.searchsorted(seen_X, jnp.arange(count), side="right", method="compare_all")
    return jnp.minimum(found, seen_X.shape[0] - 1)
