"""Exact attention of a tick: store keys and values, attend to what this group holds, merge over groups."""

from __future__ import annotations

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp

from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.model import cache
from mnemosyne_jax.model.inputs import Rows, StepInputs, StepShape
from mnemosyne_jax.model.partial import Partial, merge_over_kvp
from pallas_kernels.reference import chunked_prefill, paged_decode


@flax.struct.dataclass
class Placement:
    """What every layer of a tick shares: where its tokens are stored, and whose keys its rows attend to."""

    page_T: jax.Array
    offset_T: jax.Array
    page_table_SJ: jax.Array
    decodes: Rows
    chunks: Rows
    chunk_positions: jax.Array


def refuse_impl(impl: str) -> None:
    """Raises RequestError for kernels that this version does not have."""
    if impl == "mosaic":
        raise RequestError(
            "serve.impl", impl, "the Mosaic GPU kernels are not part of this version; use auto or reference"
        )


def place(
    inputs: StepInputs, page_table_SJ: jax.Array, chunk_positions: jax.Array, shape: StepShape, pages: int
) -> Placement:
    """The Placement of a tick: token rows in the order decodes, chunks."""
    targets = [cache.write_targets(page_table_SJ, inputs.decodes, shape.slots, shape.page_tokens, pages)]
    if shape.chunk_tokens:
        targets.append(cache.write_targets(page_table_SJ, inputs.chunks, shape.chunk_tokens, shape.page_tokens, pages))
    page_T, offset_T = (jnp.concatenate(parts) for parts in zip(*targets, strict=True))
    return Placement(page_T, offset_T, page_table_SJ, inputs.decodes, inputs.chunks, chunk_positions)


def attend(kv_LP2KBH: jax.Array, layer: jax.Array, q_TNH, k_TKH, v_TKH, placement: Placement, shape: StepShape):
    """(the cache with this tick's keys and values, out_TNH float32 over all keys of every group).

    Only shared rows are merged over kvp. Private rows are whole as they are: row i of one group and
    row i of another are different requests.
    """
    chex.assert_shape([k_TKH, v_TKH], (shape.tokens, kv_LP2KBH.shape[3], kv_LP2KBH.shape[5]))
    chex.assert_shape(q_TNH, (shape.tokens, None, kv_LP2KBH.shape[5]))
    kv_LP2KBH = cache.write(kv_LP2KBH, layer, k_TKH, v_TKH, placement.page_T, placement.offset_T)
    decodes, chunks, R = placement.decodes, placement.chunks, shape.slots

    def keys_of(rows: Rows) -> dict[str, Any]:
        return dict(
            slots_R=rows.slots, kv_lens_R=rows.kv_lens, key_start_R=rows.key_start, key_stride_R=rows.key_stride
        )

    held = (kv_LP2KBH, layer, placement.page_table_SJ)
    parts = [Partial(*paged_decode(q_TNH[:R], *held, q_positions_R=decodes.positions, **keys_of(decodes)))]
    if shape.chunk_tokens:
        ragged: dict[str, Any] = dict(cu_q_lens_R1=chunks.cu_q_lens, q_positions_T=placement.chunk_positions)
        parts.append(Partial(*chunked_prefill(q_TNH[R:], *held, **ragged, **keys_of(chunks))))

    counts = (shape.shared_slots, shape.shared_tokens)[: len(parts)]
    shared = [jax.tree.map(lambda x, n=n: x[:n], part) for part, n in zip(parts, counts, strict=True)]
    merged = merge_over_kvp(jax.tree.map(lambda *x: jnp.concatenate(x), *shared)).out_TNH
    split = jnp.split(merged, [shape.shared_slots])
    rows = [x for part, whole, n in zip(parts, split, counts, strict=False) for x in (whole, part.out_TNH[n:])]
    return kv_LP2KBH, jnp.concatenate(rows)
