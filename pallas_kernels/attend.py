"""Paged attention on Hopper in Mosaic GPU: the semantics of `reference`, at the speed of the tensor cores.

A CTA takes one item of the work list (`work`): a tile of queries of one kv head, token-major with the heads that share
it folded in, and a run of pages. One warpgroup feeds pages through a ring of shared memory by TMA, reading their ids
from the page table; the others, 64 query rows each, run the online softmax, each while the tensor core works for
another. What comes out of an item is a partial in float32 with its log-sum-exp; `merge` joins the partials of a tile.

What was tried on an H100, and how fast it was, is in TRIED.md.
"""

from __future__ import annotations

import dataclasses
import functools
from math import e, log2
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tensor_core as tc
from pallas_kernels.reference import MASKED
from pallas_kernels.work import Item, Tiling, Work

REGISTERS = {2: (232, 40), 3: (160, 32)}  # of a thread that attends, and of one that feeds: 65,536 in all
NOTHING_SEEN = -1e28  # a running maximum below this has met masked keys only


def partials(
    q_NKMH: jax.Array,
    kv_LP2KBH: jax.Array,
    layer: jax.Array | int,
    page_table_SJ: jax.Array,
    work: Work,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The partials of all items: (out_IKMH float32, lse_IKM float32 base 2), defined where the list has an item.

    q_NKMH holds the tiles in as many rows as are used (a multiple of 8): row = token * query heads of a kv head + head.
    """
    K, rows_in, H = q_NKMH.shape[1:]
    B = kv_LP2KBH.shape[4]
    # The interpreter of a CPU knows no clusters: there one CTA takes a whole tile, in four warpgroups if need be.
    tiling = dataclasses.replace(work.tiling, ctas=1) if interpret else work.tiling
    items, groups = work.items_IW.shape[0], tiling.warpgroups
    dtype = kv_LP2KBH.dtype
    kv_XBH = kv_LP2KBH.reshape(-1, B, H)
    body = functools.partial(
        _attend_item,
        kv_shape=kv_LP2KBH.shape,
        rows_in=rows_in,
        tiling=tiling,
        dtype=dtype,
        interpret=interpret,
    )

    def shared(shape, dtype):
        """In tiles that the tensor core reads, and that registers reach without bank conflicts."""
        tile = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, dtype, transforms=() if interpret else (tile, plgpu.SwizzleTransform(128)))  # pyright: ignore[reportAbstractUsage]

    page = shared((tiling.stages, B, H), dtype)
    # A decode row fills a few of a warpgroup's rows: only those are worth their way to memory.
    few = rows_in < 64
    kept = rows_in if few else tiling.rows
    scratch = dict(out_smem=shared((64, H), jnp.float32)) if few else {}
    landed = plgpu.Barrier(num_barriers=tiling.stages)
    arrivals: Any = dict(num_arrivals=groups, num_barriers=tiling.stages)
    cluster: dict[str, Any] = {}
    consumed = plgpu.Barrier(**arrivals)
    if tiling.ctas > 1:  # a page is overwritten in all CTAs at once, when none needs it any more
        cluster = dict(cluster=(tiling.ctas,), cluster_names=("part",))
        consumed = plgpu.ClusterBarrier(collective_axes=("part",), **arrivals)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((items, K, kept, H), jnp.float32),
            jax.ShapeDtypeStruct((items, K, tiling.rows), jnp.float32),
        ),
        grid=(items * K,),
        grid_names=("index",),
        **cluster,
        kernel_name="attend_items",
        num_threads=groups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            q_smem=shared((groups, 64, H), dtype),
            k_smem=page,
            v_smem=page,
            q_landed=plgpu.Barrier(num_barriers=groups),
            k_landed=landed,
            v_landed=landed,
            k_consumed=consumed,
            v_consumed=consumed,
            zeroed=plgpu.Barrier(num_arrivals=groups),
            **scratch,
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=False
        ),
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        page_table_SJ,
        work.items_IW,
        work.full_items_1,
        work.positions_NM,
        q_NKMH,
        kv_XBH,
    )


def _attend_item(
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
    rows_in: int,
    tiling: Tiling,
    dtype,
    interpret,
):
    _, P, _, K, B, H = kv_shape
    groups, stages = tiling.warpgroups, tiling.stages
    warpgroup = lax.axis_index("warpgroup")
    index, head = tiling.place(lax.axis_index("index"), full_items_ref[0], K)
    part: Any = lax.axis_index("part") if tiling.ctas > 1 else 0
    to_all: Any = dict(collective_axes="part") if tiling.ctas > 1 else {}  # each CTA fetches a part, for all
    item = Item(*(items_ref[index, w] for w in range(len(Item._fields))))
    pages = item.end_page - item.begin_page

    @pl.when((pages > 0) & (warpgroup == groups))
    def _feed():
        if groups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")

        def feed_queries(first_row: int):
            for g in range(groups):
                first = first_row + 64 * g
                if rows_in <= first:  # tiles of one query each leave warpgroups without any
                    plgpu.barrier_arrive(q_landed.at[g])
                    continue
                rows = min(64, rows_in - first)
                source = q_ref.at[item.tile, head, pl.ds(first, rows)]
                plgpu.copy_gmem_to_smem(source, q_smem.at[g, pl.ds(0, rows)], q_landed.at[g])

        for c in range(tiling.ctas):
            pl.when(part == c)(functools.partial(feed_queries, 64 * groups * c))

        def await_free(i, consumed):
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[lax.rem(i, jnp.int32(stages))]))

        def feed_page(i, page):
            # Read ahead: the next id is here by the time a stage is free.
            next_page = table_ref[item.slot, jnp.minimum(item.begin_page + i + 1, item.end_page - 1)]
            keys = ((layer_ref[0] * P + page) * 2) * K + head
            stage = lax.rem(i, jnp.int32(stages))
            await_free(i, k_consumed)
            plgpu.copy_gmem_to_smem(kv_ref.at[keys], k_smem.at[stage], k_landed.at[stage], **to_all)
            await_free(i, v_consumed)
            plgpu.copy_gmem_to_smem(kv_ref.at[keys + K], v_smem.at[stage], v_landed.at[stage], **to_all)
            return next_page

        def drain(i, _):  # every arrival at a barrier is waited for
            await_free(i, k_consumed)
            await_free(i, v_consumed)

        lax.fori_loop(0, pages, feed_page, table_ref[item.slot, item.begin_page])
        lax.fori_loop(pages, pages + stages, drain, None)

    @pl.when((pages > 0) & (warpgroup < groups))
    def _attend():
        if groups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[groups][0], action="increase")
        row_slice = pl.ds(64 * (groups * part + warpgroup), 64)
        positions = tc.load(positions_ref.at[item.tile, row_slice], tc.ROWS, interpret)
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

        last = lax.rem(pages - 1, jnp.int32(stages))
        plgpu.barrier_wait(v_landed.at[last])
        keys = item.kv_len - (item.end_page - 1) * B

        @pl.when(keys < B)
        def _zero_what_does_not_exist():  # it may hold NaN, and 0 * NaN is NaN
            for half in range(B // 64):

                @pl.when(warpgroup == half % groups)
                def _zero_half(half=half):
                    ref = v_smem.at[last, pl.ds(64 * half, 64)]
                    exists = tc.iota((64, H), 0, interpret) < keys - 64 * half
                    ref[...] = jnp.where(exists, tc.load(ref, tc.MATRIX, interpret), jnp.zeros((), dtype))

            plgpu.commit_smem()
            plgpu.barrier_arrive(zeroed)
            plgpu.barrier_wait(zeroed)

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
                plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows_in)], out_ref.at[item.partial, head])
                plgpu.wait_smem_to_gmem(0)
