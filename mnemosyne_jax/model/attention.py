"""Exact attention of a tick: store keys and values, attend to what this group holds, merge over groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from mnemosyne_jax.config import ModelConfig, ServeConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.model import cache
from mnemosyne_jax.model.inputs import Rows, StepInputs, StepShape
from mnemosyne_jax.model.partial import Partial, merge_over_kvp
from pallas_kernels import mosaic, reference
from pallas_kernels.work import Work


@flax.struct.dataclass
class Placement:
    """What every layer of a tick shares: where its tokens are stored, and whose keys its rows attend to."""

    page_T: jax.Array
    offset_T: jax.Array
    page_table_SJ: jax.Array
    decodes: Rows
    chunks: Rows
    chunk_positions: jax.Array
    work: Work | None = None  # how the Mosaic kernels share out all rows; None: the reference kernels run


def refuse_impl(impl: str) -> None:
    """Raises RequestError if these devices cannot run the kernels asked for: what is known before a model is."""
    if impl == "mosaic" and not _on_hopper():
        raise RequestError("serve.impl", impl, f"needs sm_90 (H100, H200): this is {jax.devices()[0].device_kind}")


def choose_impl(serve: ServeConfig, config: ModelConfig, tp: int, dtype: Any) -> str:
    """The kernels that `serve.impl` comes to on these devices: "mosaic" or "reference".

    Raises: RequestError if Mosaic kernels are asked for and the devices or the model do not allow them.
    """
    refuse_impl(serve.impl)
    kv_heads = max(config.kv_heads // tp, 1)
    reason = mosaic.unsupported(config.head_dim, config.heads // tp // kv_heads, serve.page_tokens, dtype)
    if serve.impl == "mosaic" and reason:
        raise RequestError("serve.impl", serve.impl, f"cannot serve this model: {reason}; use auto or reference")
    return "mosaic" if serve.impl != "reference" and not reason and _on_hopper() else "reference"


def _on_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def place(
    inputs: StepInputs, page_table_SJ: jax.Array, chunk_positions: jax.Array, kv_LP2KBH: jax.Array, shape: StepShape
) -> Placement:
    """The Placement of a tick: token rows in the order decodes, chunks."""
    pages = kv_LP2KBH.shape[1]
    targets = [cache.write_targets(page_table_SJ, inputs.decodes, shape.slots, shape.page_tokens, pages)]
    if shape.chunk_tokens:
        targets.append(cache.write_targets(page_table_SJ, inputs.chunks, shape.chunk_tokens, shape.page_tokens, pages))
    page_T, offset_T = (jnp.concatenate(parts) for parts in zip(*targets, strict=True))
    page_T = jnp.where(page_T < pages, page_T, pages + jnp.arange(len(page_T)))  # `write` wants no place twice
    return Placement(page_T, offset_T, page_table_SJ, inputs.decodes, inputs.chunks, chunk_positions)


def share_out(placement: Placement, kv_LP2KBH: jax.Array, heads: int) -> Placement:
    """The Placement with the work list of the Mosaic kernels, made once for all layers. `heads`: query heads here."""
    kv_heads, head_dim = kv_LP2KBH.shape[3], kv_LP2KBH.shape[5]
    decodes, chunks = placement.decodes, placement.chunks
    cut: dict[str, Any] = dict(heads_per_kv=heads // kv_heads, kv_heads=kv_heads)
    if not placement.chunk_positions.shape[0]:
        return replace(placement, work=mosaic.decode_work(decodes.positions, **cut, **_keys_of(decodes)))
    R = decodes.positions.shape[0]
    rows = jax.tree.map(lambda *parts: jnp.concatenate(parts), _keys_of(decodes), _keys_of(chunks))
    ragged = (
        jnp.concatenate([jnp.arange(R), R + chunks.cu_q_lens]),
        jnp.concatenate([decodes.positions, placement.chunk_positions]),
    )
    return replace(placement, work=mosaic.prefill_work(*ragged, head_dim=head_dim, decodes=R, **cut, **rows))


def attend(kv_LP2KBH: jax.Array, layer: jax.Array, q_TNH, k_TKH, v_TKH, placement: Placement, shape: StepShape):
    """(the cache with this tick's keys and values, out_TNH over all keys of every group).

    Only shared rows are merged over kvp. Private rows are whole as they are: row i of one group and
    row i of another are different requests.
    """
    chex.assert_shape([k_TKH, v_TKH], (shape.tokens, kv_LP2KBH.shape[3], kv_LP2KBH.shape[5]))
    chex.assert_shape(q_TNH, (shape.tokens, None, kv_LP2KBH.shape[5]))
    kv_LP2KBH = cache.write(kv_LP2KBH, layer, k_TKH, v_TKH, placement.page_T, placement.offset_T)
    R, alone = shape.slots, lax.axis_size("kvp") == 1  # what is merged over groups is merged in float32
    held = (kv_LP2KBH, layer, placement.page_table_SJ)
    if placement.work is None:
        part = _by_reference(q_TNH, held, placement)
    else:
        dtype = q_TNH.dtype if alone else jnp.float32
        part = Partial(*mosaic.attend_work(q_TNH, *held, placement.work, dtype=dtype))
    if alone:
        return kv_LP2KBH, part.out_TNH
    shared = [slice(0, shape.shared_slots), slice(R, R + shape.shared_tokens)]
    private = [slice(shape.shared_slots, R), slice(R + shape.shared_tokens, None)]
    merged_TNH = merge_over_kvp(jax.tree.map(lambda x: jnp.concatenate([x[rows] for rows in shared]), part)).out_TNH
    whole = jnp.split(merged_TNH, [shape.shared_slots])
    rows = [x for both in zip(whole, (part.out_TNH[rows] for rows in private), strict=True) for x in both]
    return kv_LP2KBH, jnp.concatenate(rows)


def _by_reference(q_TNH: jax.Array, held: tuple, placement: Placement) -> Partial:
    decodes, chunks = placement.decodes, placement.chunks
    R = decodes.positions.shape[0]
    part = Partial(*reference.paged_decode(q_TNH[:R], *held, q_positions_R=decodes.positions, **_keys_of(decodes)))
    if not placement.chunk_positions.shape[0]:
        return part
    ragged: dict[str, Any] = dict(cu_q_lens_R1=chunks.cu_q_lens, q_positions_T=placement.chunk_positions)
    more = Partial(*reference.chunked_prefill(q_TNH[R:], *held, **ragged, **_keys_of(chunks)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), part, more)


def _keys_of(rows: Rows) -> dict[str, Any]:
    return dict(slots_R=rows.slots, kv_lens_R=rows.kv_lens, key_start_R=rows.key_start, key_stride_R=rows.key_stride)
