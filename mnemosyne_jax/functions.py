"""The jitted step as plain functions, for one's own loop: no scheduler, no queue, one batch in the pipe at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnemosyne_jax.config import ModelConfig, ServeConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.mesh import partition, spec_of
from mnemosyne_jax.model import cache as state_of
from mnemosyne_jax.model.attention import choose_impl
from mnemosyne_jax.model.cache import State
from mnemosyne_jax.model.inputs import hidden_areas, step_shapes
from mnemosyne_jax.model.params import Params
from mnemosyne_jax.model.step import INPUTS, make_readout, make_state, make_step
from mnemosyne_jax.packing import pack, smallest_shape
from mnemosyne_jax.serve.batch import Batch, ChunkRow, DecodeRow
from mnemosyne_jax.serve.pages import Span, striped_layout
from mnemosyne_jax.serve.request import Request


@flax.struct.dataclass
class Cache:
    """Device state for `slots` sequences of up to `context_tokens` each, striped over the kvp groups of `mesh`."""

    state: State
    config: ModelConfig = flax.struct.field(pytree_node=False)
    serve: ServeConfig = flax.struct.field(pytree_node=False)
    mesh: Mesh = flax.struct.field(pytree_node=False)
    context_tokens: int = flax.struct.field(pytree_node=False)

    @property
    def slots(self) -> int:
        return self.serve.shared_rows if spec_of(self.mesh).kvp > 1 else self.serve.private_rows

    def _group(self) -> int | None:
        return None if spec_of(self.mesh).kvp > 1 else 0

    def _spans(self, slot: int) -> tuple[Span, ...]:
        """The fixed pages of a slot: an equal run in every group."""
        groups = spec_of(self.mesh).kvp
        pages = -(-self.context_tokens // self.serve.page_tokens)
        local = -(-pages // groups)
        layout = striped_layout(pages, groups)
        return tuple(
            Span(g, start, stride, np.arange(slot * local, slot * local + count, dtype=np.int32))
            for g, (start, stride, count) in enumerate(layout)
        )


def init_cache(
    config: ModelConfig,
    mesh: Mesh,
    dtype: Any = None,
    slots: int = 1,
    context_tokens: int = 4096,
    page_tokens: int = 128,
    chunk_tokens: int = 512,
) -> Cache:
    """An empty Cache on `mesh`, of `dtype` (None: the model's), for chunks of up to `chunk_tokens`.

    Raises: RequestError if the model does not divide over the mesh.
    """
    spec = spec_of(mesh)
    config.refuse_mesh(spec)
    groups = spec.kvp
    pages = -(-context_tokens // page_tokens)
    serve = ServeConfig(
        page_tokens=page_tokens,
        pool_pages=slots * -(-pages // groups),
        private_rows=slots if groups == 1 else 1,
        shared_rows=slots,
        private_chunks=1,
        chunk_tokens=chunk_tokens,
        span_tokens=page_tokens,
    )
    target = state_of.abstract(config, serve, mesh, jnp.dtype(dtype or config.dtype), serve.pool_pages or 0)
    cache = Cache(make_state(target)(), config, serve, mesh, context_tokens)
    table = np.zeros(target.cache.page_table.shape, np.int32)
    for slot in range(slots):
        for span in cache._spans(slot):
            table[:, span.group, slot, : len(span.pages)] = span.pages
    page_table = _to_devices(table, target.cache.page_table.sharding)
    return replace(cache, state=replace(cache.state, cache=replace(cache.state.cache, page_table=page_table)))


def prefill_chunk(params: Params, cache: Cache, tokens_T: Sequence[int] | np.ndarray, slot: int = 0, start: int = 0):
    """(cache, logits): the prompt tokens at positions start .. start+T of one slot, written and attended to.

    `logits` is float32 [vocab], those that follow the chunk's last token. Positions before `start`
    must have been written by earlier calls. The cache passed in is donated: use the one returned.

    Raises: RequestError for an id, slot or position out of range, or a chunk beyond the cache's `chunk_tokens`.
    """
    tokens = np.asarray(tokens_T)
    _check_range("tokens_T", tokens, cache.config.vocab)
    _check_range("slot", np.array([slot]), cache.slots)
    _check_range("start", np.array([start, start + len(tokens) - 1]), cache.context_tokens)
    if len(tokens) > cache.serve.chunk_tokens:
        raise RequestError(
            "tokens_T", len(tokens), f"a chunk has at most chunk_tokens = {cache.serve.chunk_tokens} tokens"
        )
    prompt = np.zeros(start + len(tokens), np.int32)
    prompt[start:] = tokens
    row = ChunkRow(Request("chunk", prompt), slot, cache._group(), cache._spans(slot), start, len(tokens))
    cache, _ = _run(params, cache, Batch(0, chunks=(row,)))
    _, shared, private = hidden_areas(cache.serve, spec_of(cache.mesh))
    index = np.array([(shared if row.group is None else private) + len(tokens) - 1], np.int32)
    replicated = NamedSharding(cache.mesh, PartitionSpec())
    sent = _to_devices(index, replicated), _to_devices(np.zeros(1, np.int32), replicated)
    logits = _readout(cache.mesh, cache.config, params.embed.dtype)(params, cache.state, *sent)
    return cache, np.asarray(logits.addressable_data(0))[0]


def decode_step(
    params: Params,
    cache: Cache,
    tokens_R: Sequence[int] | np.ndarray,
    slots_R: Sequence[int] | np.ndarray,
    positions_R: Sequence[int] | np.ndarray,
) -> tuple[Cache, np.ndarray]:
    """(cache, tokens [R] int32): the greedy token that follows each of R tokens, one for each of R different slots.

    Token i stands at positions_R[i] of slot slots_R[i]. A token of -1 marks logits that were not finite. The
    cache passed in is donated: use the one returned. Raises: RequestError as `prefill_chunk`.
    """
    tokens, slots, positions = np.asarray(tokens_R), np.asarray(slots_R), np.asarray(positions_R)
    _check_range("tokens_R", tokens, cache.config.vocab)
    _check_range("slots_R", slots, cache.slots)
    _check_range("positions_R", positions, cache.context_tokens)
    if not len(tokens) == len(slots) == len(positions) == len(set(slots.tolist())):
        raise RequestError("slots_R", slots.tolist(), "tokens, slots and positions go together, and slots must differ")
    request, group = Request("decode", [0]), cache._group()
    rows = tuple(
        DecodeRow(request, int(slot), group, cache._spans(int(slot)), int(position), int(token))
        for token, slot, position in zip(tokens, slots, positions, strict=True)
    )
    cache, tokens_GX = _run(params, cache, Batch(0, decodes=rows))
    return cache, tokens_GX[0, slots]


def _run(params: Params, cache: Cache, batch: Batch) -> tuple[Cache, np.ndarray]:
    """Takes one batch through all stages: (cache, tokens [kvp, X])."""
    spec = spec_of(cache.mesh)
    shape = smallest_shape(step_shapes(cache.serve, spec), [batch], spec.kvp)
    impl = choose_impl(cache.serve, cache.config, spec.tp, params.embed.dtype)
    step = _step(cache.mesh, cache.config, shape, params.embed.dtype, impl=impl)
    state, tokens = cache.state, None
    for stage in range(spec.spp):
        history = [Batch(-1)] * spec.spp
        history[stage] = batch
        buffer = _to_devices(pack(shape, history, spec.kvp), NamedSharding(cache.mesh, partition(INPUTS)))
        state, tokens = step(params, state, buffer)
        jax.block_until_ready(tokens)
    return replace(cache, state=state), np.asarray(tokens.addressable_data(0))  # type: ignore[union-attr]


_step = functools.cache(make_step)
_readout = functools.cache(make_readout)


def _to_devices(x: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _check_range(name: str, values: np.ndarray, size: int) -> None:
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
        raise RequestError(name, values.tolist(), "must be a non-empty 1-D list or array of integers")
    for extreme in (int(values.min()), int(values.max())):
        if not 0 <= extreme < size:
            raise RequestError(name, extreme, f"must be in [0, {size})")
