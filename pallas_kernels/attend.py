"""Paged attention on Hopper in Mosaic GPU: the semantics of `reference`, at the speed of the tensor cores.

A CTA takes one item of the work list (`work`) through `attend_item`: a tile of queries of one kv head, token-major with
the heads that share it folded in, and a run of pages. What comes out of an item is a partial in float32 with its
log-sum-exp; `merge` joins the partials of a tile.

What was tried on an H100, and how fast it was, is in TRIED.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attend_item import attend_item
from pallas_kernels.work import Work


def partials(
    q_KMH: jax.Array,
    kv_LP2KBH: jax.Array,
    layer: jax.Array | int,
    page_table_SJ: jax.Array,
    work: Work,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The partials of all items: (out_IKMH float32, lse_IKM float32 base 2), defined where the list has an item.

    q_KMH holds the rows of all tiles, as `Work.token_M` and `head_M` say; M of what comes back are the rows of a tile.
    """
    K, _, H = q_KMH.shape
    B = kv_LP2KBH.shape[4]
    # The interpreter of a CPU knows no clusters: there one CTA takes a whole tile, in four warpgroups if need be.
    tiling = dataclasses.replace(work.tiling, ctas=1) if interpret else work.tiling
    items, groups = work.items_IW.shape[0], tiling.warpgroups
    dtype = kv_LP2KBH.dtype
    kv_XBH = kv_LP2KBH.reshape(-1, B, H)
    body = functools.partial(
        attend_item,
        kv_shape=kv_LP2KBH.shape,
        tile_rows=work.tile_rows,
        tiling=tiling,
        dtype=dtype,
        interpret=interpret,
    )

    def shared(shape, dtype):
        """In tiles that the tensor core reads, and that registers reach without bank conflicts."""
        tile = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, dtype, transforms=() if interpret else (tile, plgpu.SwizzleTransform(128)))  # pyright: ignore[reportAbstractUsage]

    page = shared((tiling.stages, B, H), dtype)
    # A tile of one query fills a few of a warpgroup's rows: where all are such, only those make their way to memory.
    scratch = dict(out_smem=shared((64, H), jnp.float32)) if work.tile_rows < 64 else {}
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
            jax.ShapeDtypeStruct((items, K, work.tile_rows, H), jnp.float32),
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
        work.position_M,
        q_KMH,
        kv_XBH,
    )
