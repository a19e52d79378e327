"""The attention of a prompt under context parallelism, around a striped ring: what the pipeline is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import mnemosyne_jax as mn
from experiments import clocks
from experiments.kernel_record import OURS
from experiments.scaling_record import LayoutBench
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.attention import choose_impl
from mnemosyne_jax.model.ring import ring_attention
from pallas_kernels import mosaic, reference

RING = "striped ring attention of all layers"
AXIS = "kvp"


def time_rings(
    contexts: Sequence[int],
    bench: LayoutBench,
    model: mn.ModelConfig,
    serve: mn.ServeConfig,
    sample_s: float,
    **where: Any,
) -> None:
    """Adds the seconds of attention of these prompts, one layer timed, on the devices of a layout of groups alone."""
    if not 1 < bench.mesh.kvp == bench.mesh.devices:
        return
    pages_tokens = bench.mesh.kvp * serve.page_tokens
    for context in contexts:
        here = where | dict(context=context, what="ring")
        if context % pages_tokens:
            bench.leave_out(f"must be a multiple of {bench.mesh.kvp} pages of {serve.page_tokens} tokens", **here)
        elif bench.may_begin(**here):
            with bench.found.guarded(OURS, **here, mesh=str(bench.mesh)):
                layer_s = ring_layer_s(model, serve, bench.mesh, context, sample_s)
                bench.add(RING, model.layers * layer_s, "s", **where, context=context)
                print(f"{bench.mesh}, {context}: {RING} {model.layers * layer_s:.4g} s", flush=True)


def ring_layer_s(
    model: mn.ModelConfig, serve: mn.ServeConfig, mesh: mn.MeshSpec, context: int, sample_s: float
) -> float:
    """Seconds of one layer's attention of a whole prompt, its pages dealt out to the devices, as many to each."""
    page_tokens, dtype = serve.page_tokens, jnp.dtype(model.dtype)
    kernels = mosaic if choose_impl(serve, model, mesh.tp, dtype) == "mosaic" else reference
    device_mesh, dealt = make_mesh(mesh), PartitionSpec(AXIS)

    def drawn(key: int, heads: int) -> jax.Array:
        normal = lambda: jax.random.normal(jax.random.key(key), (context, heads, model.head_dim), dtype)  # noqa: E731
        return jax.jit(normal, out_shardings=NamedSharding(device_mesh, dealt))()

    def attend(q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> jax.Array:
        attended = ring_attention(
            q_TNH, k_TKH, v_TKH, tokens=context, page_tokens=page_tokens, axis=AXIS,
            chunked_prefill=kernels.chunked_prefill,
        )  # fmt: skip
        return attended.out_TNH.astype(dtype)

    ring = jax.jit(jax.shard_map(attend, mesh=device_mesh, in_specs=(dealt,) * 3, out_specs=dealt, check_vma=False))
    inputs = jax.block_until_ready([drawn(0, model.heads), drawn(1, model.kv_heads), drawn(2, model.kv_heads)])
    return clocks.time_calls(clocks.jax_clock(lambda: ring(*inputs)), 1, sample_s).median_s
