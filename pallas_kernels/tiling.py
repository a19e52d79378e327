"""How attention is cut: the rows of a tile, and the length of an item that has all SMs end together.

Shapes: N tiles, L lengths that are tried.
"""

from __future__ import annotations

import dataclasses
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SMS = 132  # of an H100 SXM or an H200
MOST_PARTS = 33  # of the longest tile, among the cuts that are tried
STRETCHED_BY = (96, 48, 24, 12)  # and parts longer by one in so many: room for what is short, beside the last of them
ITEM_PAGES = 2  # what it takes to begin and end an item, in pages


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work. `rows` of queries (tokens x heads of one kv head) make a tile, 64 a warpgroup.

    `stages` pages of keys and values are in flight; `waves` CTAs for each SM are aimed at, no item below `least_pages`.
    Where CTAs are few, some SMs could have one more than others: `even` aims at up to `waves`, as many as end together.
    Full items of `heads_together` kv heads (all if None) run side by side before the next heads' turn: fewer keys in
    the L2 cache at a time. A tile is shared by the `ctas` of a cluster, each of which reads a part of a page for all;
    if one of them can hold its queries, each takes a head of its own (`head_each`).
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

    def head_each(self, rows: Any, kv_heads: int) -> Any:
        """Whether the CTAs of a cluster take a kv head each, for a tile of which so many rows hold a query."""
        return (self.ctas > 1 and kv_heads % self.ctas == 0) & (rows <= 64 * self.warpgroups)

    def clusters(self, rows: Any, kv_heads: int) -> Any:
        """How many take an item of such a tile, for all kv heads together."""
        return jnp.where(self.head_each(rows, kv_heads), kv_heads // self.ctas, kv_heads)


def longest_item(pages_N: jax.Array, clusters_N: jax.Array, kv_heads: int, tiling: Tiling) -> jax.Array:
    """Pages of the longest item, where tiles see so many, and an item of theirs takes so many clusters."""
    aimed_at = tiling.items_of_a_head(kv_heads, tiling.waves)
    least = jnp.maximum(-(-pages_N.sum() // aimed_at), tiling.least_pages)
    if not tiling.even:
        return least
    items_W = jnp.array([tiling.items_of_a_head(kv_heads, waves + 1) for waves in range(tiling.waves)])
    parts_P = -(-pages_N.max() // (jnp.arange(MOST_PARTS) + 1))
    stretched = [parts_P + parts_P // part for part in STRETCHED_BY]
    in_waves_W = -(-(clusters_N * pages_N).sum() // (kv_heads * items_W))
    length_L = jnp.maximum(jnp.concatenate([in_waves_W, parts_P, *stretched]), least)
    return length_L[jnp.argmin(_pages_until_all_end(pages_N, clusters_N, length_L, SMS // tiling.ctas))]


def _pages_until_all_end(pages_N: jax.Array, clusters_N: jax.Array, length_L: jax.Array, at_a_time: int) -> jax.Array:
    """How long clusters, so many at a time, take for items of at most `length_L` pages.

    First full ones, in waves; then what is left of tiles, in the room of the last wave, and in waves of their own: long
    rests one after the other, short ones wherever there is room.
    """

    def taken(items_LN):
        return (items_LN * clusters_N).sum(1)

    rest_LN = pages_N % length_L[:, None]
    time_LN = jnp.where(rest_LN > 0, rest_LN + ITEM_PAGES, 0)
    full_L, full_time_L = taken(pages_N // length_L[:, None]), length_L + ITEM_PAGES
    waves_L = -(-full_L // at_a_time)
    free_L = waves_L * at_a_time - full_L
    is_long_LN = 2 * time_LN > full_time_L[:, None]
    long_L, long_time_L = taken(is_long_LN), jnp.max(time_LN, axis=1, where=is_long_LN, initial=1)
    is_short_LN = (time_LN > 0) & ~is_long_LN
    short_L, short_time_L = taken(is_short_LN), jnp.max(time_LN, axis=1, where=is_short_LN, initial=1)
    more_waves_L = -(-jnp.maximum(long_L - free_L, 0) // at_a_time)
    beside_L = jnp.minimum(long_L, free_L)
    room_L = (free_L - beside_L) * (full_time_L // short_time_L)
    room_L += beside_L * (jnp.maximum(full_time_L - long_time_L, 0) // short_time_L)
    room_L += (more_waves_L * at_a_time - (long_L - beside_L)) * (long_time_L // short_time_L)
    short_waves_L = -(-jnp.maximum(short_L - room_L, 0) // at_a_time)
    all_L = full_L * full_time_L + taken(time_LN)
    end_L = waves_L * full_time_L + more_waves_L * long_time_L + short_waves_L * short_time_L
    return jnp.maximum(end_L, -(-all_L // at_a_time))
