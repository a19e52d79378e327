"""The layers of a decoder on one shard: what each device computes of the rows of its stage.

Shapes: T rows, D width, F ffn, N query heads, K kv heads, H head dim, V vocabulary; inside
shard_map N, K, F and V are the local sizes. X rows are sampled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mnemosyne_jax.config import ModelConfig
from mnemosyne_jax.model.inputs import Draws
from mnemosyne_jax.model.params import LayerParams, Params, split
from mnemosyne_jax.model.rope import rotate

VOCAB_AXES = ("spp", "tp")


def rms_norm(x_TD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Rows scaled to unit mean square, in float32, then by the weight (over the last dimension)."""
    x = x_TD.astype(jnp.float32)
    x *= lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return weight_D * x.astype(x_TD.dtype)


def project_qkv(x_TD: jax.Array, layer: LayerParams, config: ModelConfig, cos: jax.Array, sin: jax.Array):
    """(q_TNH, k_TKH, v_TKH) of this shard's heads, normed where the model does, rotated to their positions."""

    qkv_TKMH = jnp.einsum("td,dkmh->tkmh", x_TD, layer.wqkv)
    if layer.bqkv is not None:
        qkv_TKMH += layer.bqkv
    q_TNH, k_TKH, v_TKH = split("wqkv", qkv_TKMH)
    if layer.q_norm is not None and layer.k_norm is not None:
        q_TNH = rms_norm(q_TNH, layer.q_norm, config.norm_eps)
        k_TKH = rms_norm(k_TKH, layer.k_norm, config.norm_eps)
    return rotate(q_TNH, cos, sin), rotate(k_TKH, cos, sin), v_TKH


def project_out(out_TNH: jax.Array, layer: LayerParams) -> jax.Array:
    """Attention output back in the width, summed over shards."""
    y_TD = lax.psum(jnp.einsum("tnh,nhd->td", out_TNH, layer.wo), "tp")
    return y_TD if layer.bo is None else y_TD + layer.bo


def swiglu(x_TD: jax.Array, layer: LayerParams) -> jax.Array:
    """The gated MLP, summed over shards."""
    gate_TF, up_TF = split("w_gate_up", jnp.einsum("td,dcf->tcf", x_TD, layer.w_gate_up))
    return lax.psum((jax.nn.silu(gate_TF) * up_TF) @ layer.w_down, "tp")


def vocab_slice(V: int) -> jax.Array:
    """The token ids whose embedding rows this device holds, [V]."""
    return lax.axis_index(VOCAB_AXES) * V + jnp.arange(V)


def embed(ids_T: jax.Array, params: Params) -> jax.Array:
    """Embeddings of tokens on every stage: each device looks up the ids it holds, the others give zero."""
    V = params.embed.shape[0]
    local_T = ids_T - lax.axis_index(VOCAB_AXES) * V
    held_T = (local_T >= 0) & (local_T < V)
    x_TD = jnp.take(params.embed, jnp.where(held_T, local_T, 0), axis=0)
    return lax.psum(jnp.where(held_T[:, None], x_TD, 0), VOCAB_AXES)


def from_last_stage(x_XD: jax.Array) -> jax.Array:
    """The last stage's rows, on every stage."""
    stages = lax.axis_size("spp")
    return lax.psum(jnp.where(lax.axis_index("spp") == stages - 1, x_XD, 0), "spp")


def unembed(x_XD: jax.Array, params: Params, config: ModelConfig) -> jax.Array:
    """This device's slice of the logits of already broadcast rows, [X, V] float32."""
    x_XD = rms_norm(x_XD, params.final_norm, config.norm_eps)
    table_VD = params.embed if params.unembed is None else params.unembed
    return jnp.einsum("xd,vd->xv", x_XD, table_VD, preferred_element_type=jnp.float32)


def all_logits(logits_XV: jax.Array, vocab: int) -> jax.Array:
    """Logits over the whole vocabulary on every device, [X, vocab]."""
    return lax.all_gather(logits_XV, VOCAB_AXES, axis=1, tiled=True)[:, :vocab]


def greedy(logits_XV: jax.Array, vocab: int) -> jax.Array:
    """The token of the largest logit of each row, of equal ones the lowest, [X] int32, the same on every device.

    From this device's slices of the logits. A row with a logit that is not finite gives -1.
    """
    ids_V = vocab_slice(logits_XV.shape[1])
    real_V = ids_V < vocab
    finite_X = jnp.all(jnp.isfinite(logits_XV) | ~real_V, axis=1)
    logits_XV = jnp.where(real_V, logits_XV, -jnp.inf)
    best_X = jnp.argmax(logits_XV, axis=1)
    value_X = jnp.take_along_axis(logits_XV, best_X[:, None], axis=1)[:, 0]
    values_AX, ids_AX, finite_AX = (lax.all_gather(x, VOCAB_AXES) for x in (value_X, jnp.take(ids_V, best_X), finite_X))
    token_X = jnp.take_along_axis(ids_AX, jnp.argmax(values_AX, axis=0)[None], axis=0)[0]
    return jnp.where(finite_AX.all(0), token_X, -1).astype(jnp.int32)


def draw(logits_XV: jax.Array, draws: Draws) -> jax.Array:
    """A token of each row from its logits over the whole vocabulary, [X] int32, -1 where one is not finite.

    Drawn from the smallest set of most likely tokens whose probability reaches top_p: the draw depends on (seed,
    position) and the logits alone.
    """
    scaled_XV = logits_XV / draws.temperature[:, None]
    sorted_XV = -jnp.sort(-scaled_XV, axis=1)
    before_XV = jnp.cumsum(jax.nn.softmax(sorted_XV, axis=1), axis=1) - jax.nn.softmax(sorted_XV, axis=1)
    in_nucleus_XV = before_XV < draws.top_p[:, None]  # the most likely token always is
    threshold_X = jnp.min(jnp.where(in_nucleus_XV, sorted_XV, jnp.inf), axis=1)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits_XV.shape[1:])

    noisy_XV = scaled_XV + jax.vmap(noise)(draws.seeds, draws.positions)
    token_X = jnp.argmax(jnp.where(scaled_XV >= threshold_X[:, None], noisy_XV, -jnp.inf), axis=1)
    return jnp.where(jnp.isfinite(logits_XV).all(axis=1), token_X, -1).astype(jnp.int32)
