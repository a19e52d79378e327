"""What a run keeps on the devices between ticks: paged keys and values, page tables, tokens, activations."""

from __future__ import annotations

from math import prod
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mnemosyne_jax.config import ModelConfig, ServeConfig
from mnemosyne_jax.mesh import array, shardings, spec_of
from mnemosyne_jax.model.inputs import Deltas, Rows, hidden_areas, positions_of, row_of_token


@flax.struct.dataclass
class KVCache:
    """Paged keys and values (index 0 and 1 of dimension '2'), and where each slot's pages are.

    `page_table[stage, group, slot, j]` is the page of local page j of the sequence in `slot`. Each stage
    has its own table, since it learns of new pages when their batch reaches it. `offset` is a
    token's place within its page; places beyond a sequence's length hold anything.
    """

    kv: jax.Array = array("layer/spp page/kvp 2 kv_head/tp offset head_dim")
    page_table: jax.Array = array("stage/spp group/kvp slot index")


@flax.struct.dataclass
class State:
    """Everything a tick updates in place (donated).

    `tokens` is the register of each slot's newest token. `hidden` are the activations that entered
    each stage from the one before it: rows of decodes, of shared chunks, of private chunks, each
    area at its largest. After a tick those of stage 0 are what the last stage put out.
    """

    cache: KVCache
    tokens: jax.Array = array("group/kvp slot")
    hidden: jax.Array = array("stage/spp group/kvp row model")


def abstract(config: ModelConfig, serve: ServeConfig, mesh: Mesh, dtype: jnp.dtype, pool_pages: int) -> State:
    """State of ShapeDtypeStructs with their shardings: `pool_pages` pages in each group."""
    spec = spec_of(mesh)
    slots = serve.slots(spec)
    kv_heads = max(config.kv_heads, spec.tp)

    def leaf(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = hidden_areas(serve, spec)[-1] + serve.buckets[-1]
    state = State(
        cache=KVCache(
            kv=leaf(config.layers, pool_pages * spec.kvp, 2, kv_heads, serve.page_tokens, config.head_dim),
            page_table=leaf(spec.spp, spec.kvp, slots, pool_pages, dtype=jnp.int32),
        ),
        tokens=leaf(spec.kvp, slots, dtype=jnp.int32),
        hidden=leaf(spec.spp, spec.kvp, rows, config.width),
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(mesh, state))


def state_bytes_per_device(target: State) -> int:
    """Bytes of a State held by each device."""
    return sum(prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(target))


def apply_deltas(page_table_SJ: jax.Array, deltas: Deltas) -> jax.Array:
    """The page table with this batch's new pages entered; entries whose slot is out of range are padding."""
    return page_table_SJ.at[deltas.slots, deltas.indices].set(deltas.pages, mode="drop")


def write_targets(
    page_table_SJ: jax.Array, rows: Rows, T: int, page_tokens: int, pages: int
) -> tuple[jax.Array, jax.Array]:
    """Where each of the T tokens of `rows` is stored here: (page_T, offset_T), page == `pages` for "not here".

    A token belongs to this group if its page is one of the row's affine pages and lies within the
    row's local length.
    """
    row_T = row_of_token(rows, T)
    position_T, _ = positions_of(rows, T)
    start_T, stride_T = jnp.take(rows.key_start, row_T), jnp.take(rows.key_stride, row_T)
    beyond_T = position_T // page_tokens - start_T
    index_T, offset_T = beyond_T // stride_T, position_T % page_tokens
    here_T = (
        (beyond_T >= 0)
        & (beyond_T % stride_T == 0)
        & (index_T * page_tokens + offset_T < jnp.take(rows.kv_lens, row_T))
    )
    here_T &= jnp.arange(T) < rows.cu_q_lens[-1]
    page_T = page_table_SJ.at[jnp.take(rows.slots, row_T), index_T].get(mode="clip")
    return jnp.where(here_T, page_T, pages), offset_T


def write(
    kv_LP2KBH: jax.Array, layer: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, page_T: jax.Array, offset_T: jax.Array
) -> jax.Array:
    """The cache with the keys and values of T tokens of `layer` stored in place; pages out of range are dropped.

    No two tokens have the same page and offset, those dropped included: a GPU need not store one after the other.
    """
    kv_T2KH = jnp.stack([k_TKH, v_TKH], axis=1)
    return kv_LP2KBH.at[layer, page_T, :, :, offset_T].set(kv_T2KH, mode="drop", unique_indices=True)
