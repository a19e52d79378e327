"""Weights as dataclass pytrees: every field says, in the notation, what its dimensions are and where they live."""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from mnemosyne_jax.config import MeshSpec, ModelConfig
from mnemosyne_jax.mesh import array, optional_array, shardings, spec_of


@flax.struct.dataclass
class LayerParams:
    """Weights of layer j of every stage: local layer j of stage s is global layer s * layers_per_stage + j."""

    attn_norm: jax.Array = array("stage/spp model")
    wq: jax.Array = array("stage/spp model head/tp head_dim")
    wk: jax.Array = array("stage/spp model kv_head/tp head_dim")
    wv: jax.Array = array("stage/spp model kv_head/tp head_dim")
    wo: jax.Array = array("stage/spp head/tp head_dim model")
    mlp_norm: jax.Array = array("stage/spp model")
    w_gate: jax.Array = array("stage/spp model ffn/tp")
    w_up: jax.Array = array("stage/spp model ffn/tp")
    w_down: jax.Array = array("stage/spp ffn/tp model")
    bq: jax.Array | None = optional_array("stage/spp head/tp head_dim")
    bk: jax.Array | None = optional_array("stage/spp kv_head/tp head_dim")
    bv: jax.Array | None = optional_array("stage/spp kv_head/tp head_dim")
    bo: jax.Array | None = optional_array("stage/spp model")
    q_norm: jax.Array | None = optional_array("stage/spp head_dim")
    k_norm: jax.Array | None = optional_array("stage/spp head_dim")


@flax.struct.dataclass
class Params:
    """All weights. `layers` has one entry per local layer; the vocabulary is split over stages and shards."""

    layers: tuple[LayerParams, ...]
    embed: jax.Array = array("vocab/spp/tp model")
    final_norm: jax.Array = array("model")
    unembed: jax.Array | None = optional_array("vocab/spp/tp model")


def padded_vocab(config: ModelConfig, mesh: MeshSpec) -> int:
    """Rows of the embedding on `mesh`: the vocabulary rounded up to a multiple of spp * tp."""
    parts = mesh.spp * mesh.tp
    return -(-config.vocab // parts) * parts


def layer_shapes(config: ModelConfig, kv_heads: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of one layer; weights the model lacks are absent."""
    D, F, N, H = config.width, config.ffn, config.heads, config.head_dim
    K = config.kv_heads if kv_heads is None else kv_heads
    shapes = {
        "attn_norm": (D,), "wq": (D, N, H), "wk": (D, K, H), "wv": (D, K, H), "wo": (N, H, D),
        "mlp_norm": (D,), "w_gate": (D, F), "w_up": (D, F), "w_down": (F, D),
    }  # fmt: skip
    if config.qkv_bias:
        shapes |= {"bq": (N, H), "bk": (K, H), "bv": (K, H)}
    if config.out_bias:
        shapes |= {"bo": (D,)}
    if config.qk_norm:
        shapes |= {"q_norm": (H,), "k_norm": (H,)}
    return shapes


def abstract(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> Params:
    """Params of ShapeDtypeStructs with their shardings on `mesh`: what to allocate, before anything is.

    Raises: RequestError if the model does not divide over the mesh.
    """
    spec = spec_of(mesh)
    config.refuse_mesh(spec)

    def leaf(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    vocab = leaf(padded_vocab(config, spec), config.width)
    shapes = layer_shapes(config, kv_heads=max(config.kv_heads, spec.tp))
    layer = LayerParams(**{name: leaf(spec.spp, *shape) for name, shape in shapes.items()})
    layers = (layer,) * (config.layers // spec.spp)
    params = Params(embed=vocab, layers=layers, final_norm=leaf(config.width), unembed=None if config.tied else vocab)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings(mesh, params)
    )


def init(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, seed: int = 0, scale: float = 0.02) -> Params:
    """Random Params, N(0, scale) with norms at one, made on the devices: for benchmarks and tests of shape."""
    leaves, tree = jax.tree.flatten_with_path(abstract(config, mesh, dtype))

    @functools.cache  # a program for each shape: one for all of them takes a GPU's compiler minutes
    def normal(shape: tuple[int, ...], sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda key: scale * jax.random.normal(key, shape, dtype), out_shardings=sharding)

    def made(path: Any, x: Any, key: jax.Array) -> jax.Array:
        return (
            jnp.ones(x.shape, dtype, device=x.sharding) if "norm" in str(path[-1]) else normal(x.shape, x.sharding)(key)
        )

    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [made(path, x, key) for key, (path, x) in zip(keys, leaves, strict=True)])


def weight_bytes_per_device(params: Params) -> int:
    """Bytes of weights held by each device."""
    return sum(prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(params))
