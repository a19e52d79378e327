"""What a tick costs: seconds of a stage, from what it computes and what it moves.

    stage = tick overhead + layers x (layer overhead
            + linear layers: the slower of products and reading the weights, at the rows of the compiled program
            + chunk attention: the slower of products and reading keys, for each chunk, at its real tokens
            + decode attention: reading keys
            + messages: two all-reduces over tp, one merge over kvp)
            + unembedding of the sampled rows + the hop to the next stage

A rate is a peak figure of the hardware times a share, fitted by `calibrate`; every term grows with every load. The same
code runs on floats (the scheduler), on numpy arrays and, differentiated, on jax's: `maximum` is what tells them apart.

Source: the roofline argument of arXiv 2409.17264 section 3; shapes of the terms follow this engine's tick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig

type Number = Any  # a float, or an array: the arithmetic is the same


@dataclass(frozen=True)
class CostModel:
    """Seconds, for a model on a mesh of one kind of device. All loads are those of one group of the mesh."""

    model: ModelConfig
    hardware: HardwareConfig
    mesh: MeshSpec
    dtype_bytes: int = 2
    maximum: Callable[[Number, Number], Number] = max
    layer_weights: float = field(init=False)  # of one layer, in one device
    heads: int = field(init=False)  # query heads in one device
    kv_heads: int = field(init=False)
    layers: int = field(init=False)  # of one stage
    # Of attention, which is asked for many times a tick: facts that do not change.
    _pair_flops: float = field(init=False)  # of one query and one key
    _attention_flops_per_s: Number = field(init=False)
    _key_bytes: float = field(init=False)
    _key_bytes_per_s: Number = field(init=False)

    def __post_init__(self):
        m, h, tp = self.model, self.hardware, self.mesh.tp
        kv_heads = max(m.kv_heads // tp, 1)
        heads = m.heads // tp
        weights = m.width * m.head_dim * (2 * heads + 2 * kv_heads) + 3 * m.width * m.ffn // tp
        derived = {
            "layer_weights": float(weights),
            "heads": heads,
            "kv_heads": kv_heads,
            "layers": m.layers // self.mesh.spp,
            "_pair_flops": 4.0 * heads * m.head_dim,
            "_attention_flops_per_s": h.matmul_flops_per_s * h.attention_share,
            "_key_bytes": 2.0 * kv_heads * m.head_dim * self.dtype_bytes,
            "_key_bytes_per_s": h.hbm_bytes_per_s * h.kv_read_share,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def program_s(self, rows: Number, merged_rows: Number = 0, sampled_rows: Number = 1) -> Number:
        """Everything but attention, for a program of so many `rows`, of which `merged_rows` are merged over kvp."""
        h, m, tp, kvp = self.hardware, self.model, self.mesh.tp, self.mesh.kvp
        compute = h.matmul_flops_per_s * h.matmul_share
        read = h.hbm_bytes_per_s * h.weight_read_share
        link = h.link_bytes_per_s * h.link_share
        layer = h.layer_overhead_s + self.maximum(
            2.0 * self.layer_weights * rows / compute, self.layer_weights * self.dtype_bytes / read
        )
        row_bytes = m.width * self.dtype_bytes
        if tp > 1:  # a ring all-reduce sends 2 (tp - 1) / tp of the rows
            layer += 2 * (h.link_latency_s + rows * row_bytes * 2 * (tp - 1) / tp / link)
        if kvp > 1:  # all partials are gathered: float32 outputs and a log-sum-exp for each head
            layer += h.link_latency_s + merged_rows * 4.0 * self.heads * (m.head_dim + 1) * (kvp - 1) / link
        vocab_weights = m.vocab * m.width / (self.mesh.spp * tp)
        head = self.maximum(2.0 * vocab_weights * sampled_rows / compute, vocab_weights * self.dtype_bytes / read)
        hop = h.link_latency_s + rows * row_bytes / link if self.mesh.spp > 1 else 0.0
        return h.tick_overhead_s + self.layers * layer + head + hop

    def chunk_s(self, tokens: Number, keys_before: Number, keys_own: Number | None = None) -> Number:
        """Attention of one chunk in a stage: `tokens` queries over the keys held here of what came before.

        `keys_own` are those of the chunk's own tokens that are held here (None: all). A query sees half of them.
        """
        own = tokens if keys_own is None else keys_own
        rows = tokens * (self.heads / self.kv_heads)
        products = self._pair_flops * tokens * (keys_before + 0.5 * own)
        # A tile that is not full of queries costs as much as a full one: products as if there were `chunk_rows` more.
        filled = rows / (rows + self.hardware.chunk_rows)
        compute_s = products / (self._attention_flops_per_s * filled)
        return self.layers * self.maximum(compute_s, (keys_before + own) * self._key_bytes / self._key_bytes_per_s)

    def decode_s(self, keys: Number) -> Number:
        """Attention of decode rows in a stage: `keys` held here of all of them together."""
        return self.layers * (keys * self._key_bytes / self._key_bytes_per_s)
