"""What a CTA does with one item of the work list: a tile of queries meets a run of pages.

One warpgroup feeds pages through a ring of shared memory by TMA, reading their ids from the page table; the others, 64
query rows each, run the online softmax, each while the tensor core works for another.
"""

from __future__ import annotations

import functools
from math import e, log2
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tensor_core as tc
from pallas_kernels.reference import MASKED
from pallas_kernels.tiling import Tiling
from pallas_kernels.work import Item

REGISTERS = {2: (232, 40), 3: (160, 32)}  # of a thread that attends, and of one that feeds: 65,536 in all
NOTHING_SEEN = -1e28  # a running maximum below this has met masked keys only


def attend_item(
    layer_ref,
    table_ref,
    items_ref,
    full_items_ref,
    positions_ref,
    q_ref,
    kv_ref,
    out_ref,
    lse_ref,
    *,
    q_smem,
    k_smem,
    v_smem,
    q_landed,
    k_landed,
    v_landed,
    k_consumed,
    v_consumed,
    zeroed,
    out_smem: Any = None,
    kv_shape,
    tile_rows: int,
    tiling: Tiling,
    dtype,
    interpret,
):
    """What a CTA does with the refs and the shared memory that `attend.partials` gives it."""
    _, P, _, K, B, H = kv_shape
    groups, stages = tiling.warpgroups, tiling.stages
    warpgroup = lax.axis_index("warpgroup")
    index, head = tiling.place(lax.axis_index("index"), full_items_ref[0], K)
    item = Item(*(items_ref[index, w] for w in range(len(Item._fields))))
    pages = item.end_page - item.begin_page
    part: Any = lax.axis_index("part") if tiling.ctas > 1 else 0
    head_each = tiling.head_each(item.rows, K)
    if tiling.ctas > 1:  # the cluster of the first head takes those of the next ones, too
        pages = jnp.where(head_each & (lax.rem(head, jnp.int32(tiling.ctas)) != 0), 0, pages)
        head, part = head + jnp.where(head_each, part, 0), jnp.where(head_each, 0, part)
    last = lax.rem(pages - 1, jnp.int32(stages))
    fetched = min(64, tile_rows)

    def row_of(warpgroup):
        """The first of the tile's rows that a warpgroup attends with."""
        return 64 * (groups * part + warpgroup)

    @pl.when((pages > 0) & (warpgroup == groups))
    def _feed():
        if groups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")

        for g in range(groups):

            @pl.when(item.rows > row_of(g))
            def _feed_queries(g=g):
                source = q_ref.at[head, pl.ds(item.first_row + row_of(g), fetched)]
                plgpu.copy_gmem_to_smem(source, q_smem.at[g, pl.ds(0, fetched)], q_landed.at[g])

        def fetch(source, into, landed):
            if tiling.ctas == 1:
                plgpu.copy_gmem_to_smem(source, into, landed)
                return
            pl.when(head_each)(lambda: plgpu.copy_gmem_to_smem(source, into, landed))
            # Each CTA fetches a part, for all.
            pl.when(~head_each)(lambda: plgpu.copy_gmem_to_smem(source, into, landed, collective_axes="part"))

        def await_free(i, consumed):
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[lax.rem(i, jnp.int32(stages))]))

        def feed_page(i, page):
            # Read ahead: the next id is here by the time a stage is free.
            next_page = table_ref[item.slot, jnp.minimum(item.begin_page + i + 1, item.end_page - 1)]
            keys = ((layer_ref[0] * P + page) * 2) * K + head
            stage = lax.rem(i, jnp.int32(stages))
            await_free(i, k_consumed)
            fetch(kv_ref.at[keys], k_smem.at[stage], k_landed.at[stage])
            await_free(i, v_consumed)
            fetch(kv_ref.at[keys + K], v_smem.at[stage], v_landed.at[stage])
            return next_page

        def drain(i, _):  # every arrival at a barrier is waited for
            await_free(i, k_consumed)
            await_free(i, v_consumed)

        lax.fori_loop(0, pages, feed_page, table_ref[item.slot, item.begin_page])
        lax.fori_loop(pages, pages + stages, drain, None)

    def zero_what_does_not_exist():
        """Of the last page: it may hold NaN, and 0 * NaN is NaN. All that attend, or let pass, take their part."""
        keys = item.kv_len - (item.end_page - 1) * B

        @pl.when(keys < B)
        def _zero():
            for half in range(B // 64):

                @pl.when(warpgroup == half % groups)
                def _zero_half(half=half):
                    ref = v_smem.at[last, pl.ds(64 * half, 64)]
                    exists = tc.iota((64, H), 0, interpret) < keys - 64 * half
                    ref[...] = jnp.where(exists, tc.load(ref, tc.MATRIX, interpret), jnp.zeros((), dtype))

            plgpu.commit_smem()
            plgpu.barrier_arrive(zeroed)
            plgpu.barrier_wait(zeroed)

    @pl.when((pages > 0) & (warpgroup < groups) & (item.rows <= row_of(warpgroup)))
    def _let_pass():  # the tensor core is left to those who have queries
        def let_go(i, _):
            stage = lax.rem(i, jnp.int32(stages))
            plgpu.barrier_wait(k_landed.at[stage])
            plgpu.barrier_arrive(k_consumed.at[stage])
            plgpu.barrier_wait(v_landed.at[stage])
            pl.when(i == pages - 1)(zero_what_does_not_exist)
            plgpu.barrier_arrive(v_consumed.at[stage])

        lax.fori_loop(0, pages, let_go, None)

    @pl.when((pages > 0) & (warpgroup < groups) & (item.rows > row_of(warpgroup)))
    def _attend():
        if groups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[groups][0], action="increase")
        row_slice = pl.ds(row_of(warpgroup), 64)
        positions = tc.load(positions_ref.at[pl.ds(item.first_row + row_of(warpgroup), 64)], tc.ROWS, interpret)
        column = tc.iota((64, B), 1, interpret)
        scale = H**-0.5 * log2(e)
        q = q_smem.at[warpgroup]

        def softmax(i, s, m, total, masked: bool):
            """(p, new m, new total, what older sums shrink by), exact where a mask hides keys."""
            if masked:
                page = item.begin_page + i
                last = jnp.minimum(
                    positions - (item.key_start + item.key_stride * page) * B, item.kv_len - page * B - 1
                )
                s = jnp.where(column <= lax.broadcast_in_dim(last, s.shape, [0]), s, MASKED)
            new_m = jnp.maximum(m, s.max(axis=1) * scale)
            p = jnp.exp2(s * scale - lax.broadcast_in_dim(new_m, s.shape, [0]))
            shrink = jnp.exp2(m - new_m)
            return p.astype(dtype), new_m, total * shrink + p.sum(axis=1), shrink

        def rescale(out, shrink):
            return out * lax.broadcast_in_dim(shrink, out.shape, [0])

        def step(i, carry, masked: bool):
            out, m, total, p = carry
            stage, before = lax.rem(i, jnp.int32(stages)), lax.rem(i - 1, jnp.int32(stages))
            plgpu.barrier_wait(v_landed.at[before])
            plgpu.barrier_wait(k_landed.at[stage])
            out, s = tc.accumulate_and_score(out, p, v_smem.at[before], q, k_smem.at[stage], interpret)
            plgpu.barrier_arrive(v_consumed.at[before])
            plgpu.barrier_arrive(k_consumed.at[stage])
            p, m, total, shrink = softmax(i, s, m, total, masked)
            return rescale(out, shrink), m, total, p

        plgpu.barrier_wait(q_landed.at[warpgroup])
        plgpu.barrier_wait(k_landed.at[0])
        s = tc.scores(q, k_smem.at[0], interpret)
        plgpu.barrier_arrive(k_consumed.at[0])
        m, total = (tc.full((64,), start, tc.ROWS, interpret) for start in (MASKED, 0.0))
        p, m, total, _ = softmax(0, s, m, total, masked=True)
        carry = (tc.full((64, H), 0.0, tc.MATRIX, interpret), m, total, p)
        whole = jnp.clip(item.whole_pages - item.begin_page, 1, pages)
        carry = lax.fori_loop(1, whole, functools.partial(step, masked=False), carry)
        out, m, total, p = lax.fori_loop(whole, pages, functools.partial(step, masked=True), carry)

        plgpu.barrier_wait(v_landed.at[last])
        zero_what_does_not_exist()
        out = tc.accumulate(out, p, v_smem.at[last], interpret)
        plgpu.barrier_arrive(v_consumed.at[last])

        unseen = (m <= NOTHING_SEEN) & (total == total)  # a NaN counts as seen: it must not vanish from its own logits
        total = jnp.where(unseen, 1.0, total)
        lse_ref[item.partial, head, row_slice] = jnp.where(unseen, MASKED, m + jnp.log(total) * log2(e))
        none = lax.broadcast_in_dim(unseen, out.shape, [0])
        out = jnp.where(none, 0.0, out * lax.broadcast_in_dim(1 / total, out.shape, [0]))
        if out_smem is None:
            out_ref[item.partial, head, row_slice] = out
        else:

            @pl.when(warpgroup == 0)
            def _keep_few():
                out_smem[...] = out
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, tile_rows)], out_ref.at[item.partial, head])
                plgpu.wait_smem_to_gmem(0)
