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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tiling import Tiling, longest_item


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
    position_M: jax.Array  # -1 where there is no query; 64 more, as a warpgroup reads as many from any
    merges_TW: jax.Array
    tile_rows: int = dataclasses.field(metadata=dict(static=True))
    tiling: Tiling = dataclasses.field(metadata=dict(static=True))


class Tiles(NamedTuple):
    """S tiles of one query each, then C that queries of a row share: the row, the first query, how many there are."""

    row_N: jax.Array
    first_N: jax.Array
    count_N: jax.Array
    tile_T: jax.Array  # where each query is
    place_T: jax.Array


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
    C = (T - S) // t + R - S if T > S else 0
    tiles = _tiles(cu_q_lens_R1, T, S, C, t)
    rows_N = tiles.count_N * G

    # Rows of tiles, which a kernel fetches eight at a time.
    single_rows = -(-G // 8) * 8
    first_row_N = np.append(np.arange(S) * single_rows, S * single_rows + np.arange(C) * tiling.rows)
    tile_M = np.repeat(np.arange(S + C), np.append(np.full(S, single_rows), np.full(C, tiling.rows)))
    row_in_tile_M = np.arange(len(tile_M)) - first_row_N[tile_M]
    token_M = jnp.clip(tiles.first_N[tile_M] + row_in_tile_M // G, 0, T - 1)
    in_tile_M = row_in_tile_M < rows_N[tile_M]
    position_M = jnp.where(in_tile_M, q_positions_T[token_M], -1)

    def of_tiles(reduce, x_M):
        singles, shared = x_M[: S * single_rows].reshape(S, single_rows), x_M[S * single_rows :].reshape(C, tiling.rows)
        return jnp.concatenate([reduce(singles, axis=1), reduce(shared, axis=1)])

    start_N, stride_N, kv_len_N = (x_R[tiles.row_N] for x_R in (key_start_R, key_stride_R, kv_lens_R))
    highest_N = of_tiles(jnp.max, position_M)
    lowest_N = of_tiles(jnp.min, jnp.where(in_tile_M, position_M, jnp.iinfo(jnp.int32).max - 1))
    reach_N = (highest_N // B - start_N) // stride_N + 1
    pages_N = jnp.clip(jnp.minimum(reach_N, -(-kv_len_N // B)), 0)
    whole_N = jnp.minimum(((lowest_N + 1) // B - 1 - start_N) // stride_N + 1, kv_len_N // B)

    longest = longest_item(pages_N, tiling.clusters(rows_N, kv_heads), kv_heads, tiling)
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
        rows=rows_N[tile_I],
        partial=i_I,
        slot=slots_R[tiles.row_N[tile_I]],
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
    partials_T = jnp.where(jnp.arange(T) < cu_q_lens_R1[-1], partials_N[tiles.tile_T], 0)
    return Work(
        items_IW=jnp.stack(items, axis=1)[order_I],
        full_items_1=full_I.sum(dtype=jnp.int32)[None],
        token_M=token_M,
        head_M=jnp.asarray(row_in_tile_M % G),
        position_M=jnp.pad(position_M, (0, 64), constant_values=-1),
        merges_TW=jnp.stack(Merge(first_partial_N[tiles.tile_T], partials_T, tiles.place_T), axis=1),
        tile_rows=tiling.rows if C else single_rows,
        tiling=tiling,
    )


def _tiles(cu_q_lens_R1: jax.Array, T: int, S: int, C: int, t: int) -> Tiles:
    single_S, shared_C, shared_U = jnp.arange(S), jnp.arange(C), jnp.arange(T - S)
    shared_R1 = jnp.maximum(cu_q_lens_R1 - S, 0)
    tiles_R = -(-(shared_R1[1:] - shared_R1[:-1]) // t)
    tiles_seen_R = jnp.cumsum(tiles_R)
    tiles_before_R = tiles_seen_R - tiles_R
    row_C, row_U = _owner(tiles_seen_R, C), _owner(shared_R1[1:], T - S)
    first_C = shared_R1[row_C] + (shared_C - tiles_before_R[row_C]) * t
    count_C = jnp.where(shared_C < tiles_seen_R[-1], jnp.clip(shared_R1[row_C + 1] - first_C, 0, t), 0)
    place_U = shared_U - shared_R1[row_U]
    return Tiles(
        row_N=jnp.concatenate([_owner(cu_q_lens_R1[1:], S), row_C]),
        first_N=jnp.concatenate([single_S, S + first_C]),
        count_N=jnp.concatenate([(single_S < cu_q_lens_R1[-1]).astype(jnp.int32), count_C]),
        tile_T=jnp.concatenate([single_S, S + tiles_before_R[row_U] + place_U // t]),
        place_T=jnp.concatenate([jnp.zeros(S, jnp.int32), place_U % t]),
    )


def _owner(seen_X: jax.Array, count: int) -> jax.Array:
    """For 0 .. count-1, the first x whose running total exceeds it; the last x for what is beyond all."""
    found = jnp.searchsorted(seen_X, jnp.arange(count), side="right", method="compare_all")
    return jnp.minimum(found, seen_X.shape[0] - 1)
