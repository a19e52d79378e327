"""One tick: every stage runs its own batch through its own layers, then activations move one stage on.

The only jit and the only shard_map of the data plane.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from mnemosyne_jax.config import ModelConfig
from mnemosyne_jax.mesh import partition, partitions
from mnemosyne_jax.model import attention, cache
from mnemosyne_jax.model.cache import KVCache, State
from mnemosyne_jax.model.inputs import StepInputs, StepShape, positions_of, unpack, unpack_draws
from mnemosyne_jax.model.layers import (
    all_logits,
    draw,
    embed,
    from_last_stage,
    greedy,
    project_out,
    project_qkv,
    rms_norm,
    swiglu,
    unembed,
)
from mnemosyne_jax.model.params import LayerParams, Params
from mnemosyne_jax.model.params import abstract as abstract_params
from mnemosyne_jax.model.rope import rotary_tables

INPUTS = "stage/spp group/kvp word"


def block(layer: LayerParams, kv, index, x_TD, placement, cos, sin, *, config: ModelConfig, shape: StepShape):
    """One decoder layer on this stage's rows: (kv, x_TD)."""
    layer = jax.tree.map(lambda w: w[0], layer)
    with jax.named_scope("attention"):
        q, k, v = project_qkv(rms_norm(x_TD, layer.attn_norm, config.norm_eps), layer, config, cos, sin)
        kv, out_TNH = attention.attend(kv, index, q, k, v, placement, shape)
        x_TD = x_TD + project_out(out_TNH.astype(x_TD.dtype), layer)
    with jax.named_scope("swiglu"):
        return kv, x_TD + swiglu(rms_norm(x_TD, layer.mlp_norm, config.norm_eps), layer)


def enter(params: Params, state: State, inputs: StepInputs, shape: StepShape) -> jax.Array:
    """The rows each stage works on, [T, D]: stage 0 embeds the entering batch, the others take what was passed on."""
    tokens_T, R = inputs.entering.tokens, shape.slots
    decode_ids = jnp.where(inputs.entering.known > 0, tokens_T[:R], state.tokens[0])
    ids_T = jnp.concatenate([decode_ids, tokens_T[R:]])
    hidden = state.hidden[0, 0]
    passed_TD = jnp.concatenate([hidden[first : first + rows] for first, rows in shape.areas])
    return jnp.where(lax.axis_index("spp") == 0, embed(ids_T, params).astype(passed_TD.dtype), passed_TD)


def pass_on(state: State, x_TD: jax.Array, shape: StepShape) -> State:
    """The State with every stage's rows moved to the next stage, the last stage's to stage 0."""
    stages = lax.axis_size("spp")
    if stages > 1:
        x_TD = lax.ppermute(x_TD, "spp", [(s, (s + 1) % stages) for s in range(stages)])
    hidden, begin = state.hidden, 0
    for first, rows in shape.areas:
        hidden = lax.dynamic_update_slice(hidden, x_TD[None, None, begin : begin + rows], (0, 0, first, 0))
        begin += rows
    return replace(state, hidden=hidden)


def tick(
    params: Params,
    state: State,
    buffer: jax.Array,
    *,
    config: ModelConfig,
    shape: StepShape,
    rope_precision: str,
    impl: str,
):
    """One tick on one device: (State, tokens [group, X] of the batch that left the last stage)."""
    inputs = unpack(shape, buffer[0, 0])
    page_table_SJ = cache.apply_deltas(state.cache.page_table[0, 0], inputs.deltas)
    _, decode_turns = positions_of(inputs.decodes, shape.slots)
    chunk_positions = chunk_turns = decode_turns[:0]  # sliced: jax 0.11.2 crashes on an empty constant
    if shape.chunk_tokens:
        chunk_positions, chunk_turns = positions_of(inputs.chunks, shape.chunk_tokens)
    with jax.named_scope("rope"):
        turns_T = jnp.concatenate([decode_turns, chunk_turns])
        cos, sin = rotary_tables(turns_T, config.rope, config.head_dim, rope_precision)
    with jax.named_scope("embed"):
        x_TD = enter(params, state, inputs, shape)
    kv = state.cache.kv
    placement = attention.place(inputs, page_table_SJ, chunk_positions, kv, shape)
    if impl == "mosaic":
        with jax.named_scope("work"):
            placement = attention.share_out(placement, kv, config.heads // lax.axis_size("tp"))
    # Made once: XLA would work it out again in every kernel of every layer that reads it.
    placement = lax.optimization_barrier(placement)
    # One inner program for all layers: tracing and kernels are shared, and no weight is sliced from a stack.
    one_block = jax.jit(functools.partial(block, config=config, shape=shape))
    for index, layer in enumerate(params.layers):
        kv, x_TD = one_block(layer, kv, jnp.int32(index), x_TD, placement, cos, sin)
    state = replace(state, cache=KVCache(kv, page_table_SJ[None, None]))
    with jax.named_scope("sample"):
        rows_XD = from_last_stage(jnp.take(x_TD, inputs.leaving.rows, axis=0))
        token_X = greedy(unembed(rows_XD, params, config), config.vocab)
        state = replace(state, tokens=state.tokens.at[0, inputs.leaving.slots].set(token_X, mode="drop"))
    return pass_on(state, x_TD, shape), lax.all_gather(token_X, "kvp")


def readout(params: Params, state: State, rows: jax.Array, groups: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Logits [X, vocab] float32 of rows of the batch that the last tick put out, each of its own group.

    `rows` index State.hidden.
    """
    x_XD = jnp.take(state.hidden[0, 0], rows, axis=0)
    x_XD = lax.psum(jnp.where(lax.axis_index("spp") == 0, x_XD, 0), "spp")
    x_XD = lax.psum(jnp.where((lax.axis_index("kvp") == groups)[:, None], x_XD, 0), "kvp")
    return all_logits(unembed(x_XD, params, config), config.vocab)


def redraw(params: Params, state: State, buffer: jax.Array, *, config: ModelConfig) -> tuple[State, jax.Array]:
    """(State, tokens [X]): drawn tokens in the registers that took greedy ones in the last tick.

    A program of its own: a branch within the tick would have the host wait for what decides it.
    """
    draws = unpack_draws(buffer)
    token_X = draw(readout(params, state, draws.rows, draws.groups, config=config), draws)
    here_X = (draws.shared != 0) | (draws.groups == lax.axis_index("kvp"))
    slots_X = jnp.where(here_X, draws.slots, state.tokens.shape[1])
    return replace(state, tokens=state.tokens.at[0, slots_X].set(token_X, mode="drop")), token_X


def make_step(
    mesh: Mesh,
    config: ModelConfig,
    shape: StepShape,
    dtype: Any,
    rope_precision: str = "exact",
    impl: str = "reference",
) -> Callable:
    """The jitted tick of one StepShape: (params, state, buffer) -> (state, tokens [kvp, X]), `state` donated.

    `impl` is what `attention.choose_impl` found: "reference" or "mosaic".
    `buffer` is int32 [spp, kvp, words] as `inputs.views` fills it. Tokens are those of the batch
    leaving the pipe, -1 where a logit was not finite.
    """
    body = functools.partial(tick, config=config, shape=shape, rope_precision=rope_precision, impl=impl)
    params, state = _partitions(mesh, config)
    return _compile_on(mesh, body, (params, state, partition(INPUTS)), (state, PartitionSpec()), dtype, donate=(1,))


def make_readout(mesh: Mesh, config: ModelConfig, dtype: Any) -> Callable:
    """The jitted readout: (params, state, rows [X], groups [X]) -> logits [X, vocab] float32."""
    params, state = _partitions(mesh, config)
    ins = (params, state, PartitionSpec(), PartitionSpec())
    return _compile_on(mesh, functools.partial(readout, config=config), ins, PartitionSpec(), dtype, donate=())


def make_redraw(mesh: Mesh, config: ModelConfig, dtype: Any) -> Callable:
    """The jitted redraw: (params, state, buffer) -> (state, tokens [X]), `state` donated.

    `buffer` is int32 [8, X] as `packing.pack_draws` fills it. A token is -1 where a logit was not finite.
    """
    params, state = _partitions(mesh, config)
    body = functools.partial(redraw, config=config)
    return _compile_on(mesh, body, (params, state, PartitionSpec()), (state, PartitionSpec()), dtype, donate=(1,))


def make_state(target: State) -> Callable[[], State]:
    """The jitted allocation of a zeroed State like `target`."""
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target)  # noqa: E731
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda x: x.sharding, target))


def _partitions(mesh: Mesh, config: ModelConfig) -> tuple[Any, Any]:
    return partitions(abstract_params(config, mesh, jnp.float32)), partitions(State(KVCache(0, 0), 0, 0))  # type: ignore[arg-type]


def _compile_on(mesh: Mesh, body: Callable, ins: Any, outs: Any, dtype: Any, donate: tuple[int, ...]) -> Callable:
    def run(*args):
        # Float32 models compute in float32 everywhere: a GPU would otherwise use TF32 for its matrix products.
        with jax.default_matmul_precision("highest") if dtype == jnp.float32 else nullcontext():
            return body(*args)

    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False), donate_argnums=donate)
