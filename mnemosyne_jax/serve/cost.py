"""What a tick costs: seconds of a stage, from what it computes and what it moves.

    stage = tick overhead + layers x (layer overhead, less of it where rows are few
            + linear layers: products beside reading the weights, at the rows of the compiled program
            + activations, read and written between the products, at the same rows
            + chunk attention: products and softmax beside reading keys, for each chunk, at its tokens in whole tiles
            + decode attention: reading keys
            + messages: two all-reduces over tp, one merge over kvp)
            + unembedding of the sampled rows + the hop to the next stage

What stands beside another overlaps with it: the two together take as long as the slower, up to a root of two longer
where they are near. A rate is a peak figure of the hardware times a share, fitted by `calibrate`; every term grows with
every load. The same code runs on floats (the scheduler), on numpy arrays and, differentiated, on jax's.

Source: the roofline argument of arXiv 2409.17264 section 3; shapes of the terms follow this engine's tick, and the
profiles of it that `bench_engine --profile` makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig

type Number = Any  # a float, or an array: the arithmetic is the same
LARGER_TILES_FROM_ROWS = 384  # queries times heads of a kv head, at head dim 64


@dataclass(frozen=True)
class CostModel:
    """Seconds, for a model on a mesh of one kind of device. All loads are those of one group of the mesh."""

    model: ModelConfig
    hardware: HardwareConfig
    mesh: MeshSpec
    dtype_bytes: int = 2
    layer_weights: float = field(init=False)  # of one layer, in one device
    heads: int = field(init=False)  # query heads in one device
    kv_heads: int = field(init=False)
    layers: int = field(init=False)  # of one stage
    activation_bytes: float = field(init=False)  # of one row in a layer: read and written between its products
    tile_tokens: int = field(init=False)  # of a chunk, that attention takes together
    larger_from_tokens: int = field(init=False)  # a chunk of so many has larger tiles
    larger_by_tokens: int = field(init=False)
    # Of attention, which is asked for many times a tick: seconds of all layers of a stage.
    _pair_s: Number = field(init=False)  # of one query and one key, in all heads
    _key_s: Number = field(init=False)  # of reading one key and value

    def __post_init__(self):
        m, h, tp = self.model, self.hardware, self.mesh.tp
        kv_heads, heads, ffn = max(m.kv_heads // tp, 1), m.heads // tp, m.ffn // tp
        layers = m.layers // self.mesh.spp
        # Two norms and two residual sums; silu times up; queries, keys and values rotated; attention's output, merged,
        # gathered and cast: three passes over it in float32.
        values = 10 * m.width + 3 * ffn + 2 * (heads + 2 * kv_heads) * m.head_dim
        tile_tokens, larger_tokens = (max(1, r * kv_heads // heads) for r in (h.tile_rows, h.tile_rows * 3 // 2))
        pair_flops = 4.0 * heads * (m.head_dim + h.softmax_dims)
        derived = {
            "layer_weights": float(m.width * m.head_dim * (2 * heads + 2 * kv_heads) + 3 * m.width * ffn),
            "heads": heads,
            "kv_heads": kv_heads,
            "layers": layers,
            "tile_tokens": tile_tokens,
            "larger_from_tokens": LARGER_TILES_FROM_ROWS * kv_heads // heads,
            "larger_by_tokens": larger_tokens - tile_tokens if m.head_dim == 64 else 0,
            "activation_bytes": float(self.dtype_bytes * values + 3 * 2 * 4 * heads * m.head_dim),
            "_pair_s": layers * pair_flops / (h.matmul_flops_per_s * h.attention_share),
            "_key_s": layers * 2.0 * kv_heads * m.head_dim * self.dtype_bytes / (h.hbm_bytes_per_s * h.kv_read_share),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def program_s(self, rows: Number, merged_rows: Number = 0, sampled_rows: Number = 1) -> Number:
        """Everything but attention, for a program of so many `rows`, of which `merged_rows` are merged over kvp."""
        h, m, tp, kvp = self.hardware, self.model, self.mesh.tp, self.mesh.kvp
        link = h.link_bytes_per_s * h.link_share
        layer = (
            h.layer_overhead_s * rows / (rows + h.overhead_rows)
            + self._products_s(self.layer_weights, rows)
            + rows * self.activation_bytes / (h.hbm_bytes_per_s * h.activation_share)
        )
        row_bytes = m.width * self.dtype_bytes
        if tp > 1:  # a ring all-reduce sends 2 (tp - 1) / tp of the rows
            layer += 2 * (h.link_latency_s + rows * row_bytes * 2 * (tp - 1) / tp / link)
        if kvp > 1:  # all partials are gathered: float32 outputs and a log-sum-exp for each head
            layer += h.link_latency_s + merged_rows * 4.0 * self.heads * (m.head_dim + 1) * (kvp - 1) / link
        head = self._products_s(m.vocab * m.width / (self.mesh.spp * tp), sampled_rows)
        hop = h.link_latency_s + rows * row_bytes / link if self.mesh.spp > 1 else 0.0
        return h.tick_overhead_s + self.layers * layer + head + hop

    def _products_s(self, weights: float, rows: Number) -> Number:
        """Products of `rows` with so many weights, beside reading them."""
        h = self.hardware
        compute_s = 2.0 * weights * rows / (h.matmul_flops_per_s * h.matmul_share)
        return _overlapped_s(compute_s, weights * self.dtype_bytes / (h.hbm_bytes_per_s * h.weight_read_share))

    def chunk_s(self, tokens: Number, keys_before: Number, keys_own: Number | None = None) -> Number:
        """Attention of one chunk in a stage: `tokens` queries over the keys held here of what came before.

        `keys_own` are those of the chunk's own tokens that are held here (None: all). A query sees half of them.
        """
        own = tokens if keys_own is None else keys_own
        tile = self.tile_tokens + (tokens >= self.larger_from_tokens) * self.larger_by_tokens
        queries = -(-tokens // tile) * tile
        return _overlapped_s(self._pair_s * queries * (keys_before + 0.5 * own), self._key_s * (keys_before + own))

    def decode_s(self, keys: Number) -> Number:
        """Attention of decode rows in a stage: `keys` held here of all of them together."""
        return self._key_s * keys


def _overlapped_s(one_s: Number, other_s: Number) -> Number:
    """What two things take that go on at once, each waiting for the other now and then."""
    return (one_s * one_s + other_s * other_s) ** 0.5
