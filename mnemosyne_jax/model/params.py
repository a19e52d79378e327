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

# What models keep apart and a LayerParams joins: names and dimensions in one layer.
APART = {
    "wqkv": {"wq": "model head/tp head_dim", "wk": "model kv_head/tp head_dim", "wv": "model kv_head/tp head_dim"},
    "bqkv": {"bq": "head/tp head_dim", "bk": "kv_head/tp head_dim", "bv": "kv_head/tp head_dim"},
    "w_gate_up": {"w_gate": "model ffn/tp", "w_up": "model ffn/tp"},
}


@flax.struct.dataclass
class LayerParams:
    """Weights of layer j of every stage: local layer j of stage s is global layer s * layers_per_stage + j.

    What is multiplied with the same rows lies in one array: the few rows of a tick keep a GPU busy in one large product
    and not in three small ones. The members of a kv head are its query heads, its key, its value.
    """

    attn_norm: jax.Array = array("stage/spp model")
    wqkv: jax.Array = array("stage/spp model kv_head/tp member head_dim")
    wo: jax.Array = array("stage/spp head/tp head_dim model")
    mlp_norm: jax.Array = array("stage/spp model")
    w_gate_up: jax.Array = array("stage/spp model 2 ffn/tp")
    w_down: jax.Array = array("stage/spp ffn/tp model")
    bqkv: jax.Array | None = optional_array("stage/spp kv_head/tp member head_dim")
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


def join(field: str, *parts: Any) -> Any:
    """The array of `field` from what `APART` names, NumPy's or JAX's; leading dimensions may be cut off or added.

    Shapes: [..., N, H] and twice [..., K, H] -> [..., K, N / K + 2, H]; twice [..., F] -> [..., 2, F]; else the part.
    """
    if field not in APART:
        return parts[0]
    xp = parts[0].__array_namespace__()
    if field == "w_gate_up":
        return xp.stack(parts, axis=-2)
    q_NH, k_KH, v_KH = parts
    q_KGH = q_NH.reshape(*k_KH.shape[:-1], q_NH.shape[-2] // k_KH.shape[-2], k_KH.shape[-1])
    return xp.concatenate([q_KGH, k_KH[..., None, :], v_KH[..., None, :]], axis=-2)


def split(field: str, joined: Any) -> tuple[Any, ...]:
    """What `join` joined."""
    if field not in APART:
        return (joined,)
    if field == "w_gate_up":
        return joined[..., 0, :], joined[..., 1, :]
    *before, K, members, H = joined.shape
    q_NH = joined[..., :-2, :].reshape(*before, K * (members - 2), H)
    return q_NH, joined[..., -2, :], joined[..., -1, :]


def layer_shapes(config: ModelConfig, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of one layer with so many kv heads; weights the model lacks are absent."""
    D, F, N, K, H = config.width, config.ffn, config.heads, kv_heads, config.head_dim
    shapes = {
        "attn_norm": (D,), "wqkv": (D, K, N // K + 2, H), "wo": (N, H, D),
        "mlp_norm": (D,), "w_gate_up": (D, 2, F), "w_down": (F, D),
    }  # fmt: skip
    if config.qkv_bias:
        shapes |= {"bqkv": (K, N // K + 2, H)}
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
    """Random Params, N(0, scale) with norms at one, made on the devices: one seed is one model on every mesh."""
    target, copies = abstract(config, mesh, dtype), max(1, spec_of(mesh).tp // config.kv_heads)
    per_layer, vocab = layer_shapes(config, config.kv_heads), (config.vocab, config.width)
    shapes = {"embed": vocab, "unembed": vocab} | per_layer

    def draw(field: str, layer: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), layer), list(shapes).index(field))
        x = scale * jax.random.normal(key, shapes[field], dtype)
        if field not in ("wqkv", "bqkv"):
            return x
        q, *kv = split(field, x)
        return join(field, q, *(jnp.repeat(part, copies, axis=-2) for part in kv))

    @functools.cache  # a program for each field: one for all of them takes a GPU's compiler minutes
    def program(field: str, rows: int, sharding: Sharding) -> Callable[[np.ndarray], jax.Array]:
        def table(layers_S: jax.Array) -> jax.Array:
            return jnp.pad(draw(field, layers_S[0]), ((0, rows - config.vocab), (0, 0)))

        of_stages = jax.vmap(functools.partial(draw, field))
        return jax.jit(of_stages if field in per_layer else table, out_shardings=sharding)

    def made(field: str, x: Any, *layers_S: int) -> jax.Array:
        if "norm" in field:
            return jnp.ones(x.shape, dtype, device=x.sharding)
        return program(field, x.shape[0], x.sharding)(np.array(layers_S))

    def layer(local: int, of: LayerParams) -> LayerParams:
        numbers = range(local, config.layers, len(target.layers))
        return LayerParams(**{field: made(field, getattr(of, field), *numbers) for field in per_layer})

    return Params(
        layers=tuple(layer(local, of) for local, of in enumerate(target.layers)),
        embed=made("embed", target.embed, 0),
        final_norm=made("final_norm", target.final_norm),
        unembed=None if target.unembed is None else made("unembed", target.unembed, 0),
    )


def weight_bytes_per_device(params: Params) -> int:
    """Bytes of weights held by each device."""
    return sum(prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(params))
