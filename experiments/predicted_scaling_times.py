"""Seconds of a long prompt and of its tokens under one kind of parallelism or another, by the cost model.

Prefill: lock-step ticks of the sequence pipeline, or steps of a ring of context-parallel ranks. Decode: a tick for each
stage. Floors: FLOPs over peak, bytes over peak bandwidth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig
from mnemosyne_jax.serve.chunking import largest_fitting
from mnemosyne_jax.serve.cost import CostModel

DTYPE_BYTES = 2
SLOTS = 1  # decode rows of a program, which run whether or not anything decodes


@dataclass(frozen=True, eq=False)
class Prefill:
    """One way to run a prompt through the pipe: tokens of each chunk, seconds of each tick."""

    chunks: np.ndarray
    ticks_s: np.ndarray

    @property
    def ttft_s(self) -> float:
        return float(self.ticks_s.sum())


def lock_step(cost: CostModel, chunks: Sequence[int], rows: Sequence[int]) -> Prefill:
    """The Prefill of these chunks in programs of these rows: chunks + spp - 1 ticks.

    A tick runs the largest program among those of the chunks in the pipe, and waits for their slowest attention.
    """
    ends = np.cumsum(chunks).tolist()
    attention_s = [cost.chunk_s(n, end - n) for n, end in zip(chunks, ends, strict=True)]
    fill = cost.mesh.spp - 1
    tick_rows, tick_attention_s = (
        np.lib.stride_tricks.sliding_window_view(np.pad(values, fill), fill + 1).max(1)
        for values in (np.array(rows), np.array(attention_s))
    )
    sizes, which = np.unique(tick_rows, return_inverse=True)
    program_s = np.array([cost.program_s(int(n)) for n in sizes])
    return Prefill(np.array(chunks), program_s[which] + tick_attention_s)


def fixed(cost: CostModel, prompt_tokens: int, chunk: int) -> Prefill:
    """The Prefill in chunks of one size, which the one program that there is fits."""
    chunks = [min(chunk, prompt_tokens - at) for at in range(0, prompt_tokens, chunk)]
    return lock_step(cost, chunks, [chunk + SLOTS] * len(chunks))


def adaptive(cost: CostModel, prompt_tokens: int, tick_s: float, buckets: tuple[int, ...]) -> Prefill | None:
    """The Prefill in the largest chunks that keep a tick's time, as the scheduler chooses them; None if none does."""
    program_s = {b: cost.program_s(b + SLOTS) for b in buckets}
    pipe: deque[tuple[int, float]] = deque([(buckets[0], 0.0)] * cost.mesh.spp, maxlen=cost.mesh.spp)  # newest first
    chunks, programs, done = [], [], 0
    while done < prompt_tokens:
        older = list(pipe)[: cost.mesh.spp - 1]
        most_rows, most_s = max((b for b, _ in older), default=0), max((s for _, s in older), default=0.0)

        def fits(n: int, done: int = done, most_rows: int = most_rows, most_s: float = most_s) -> bool:
            bucket = max(next(b for b in buckets if b >= n), most_rows)
            return program_s[bucket] + max(cost.chunk_s(n, done), most_s) <= tick_s

        chunk = largest_fitting(prompt_tokens - done, buckets[-1], fits)
        if not chunk:
            return None
        bucket = next(b for b in buckets if b >= chunk)
        pipe.appendleft((bucket, cost.chunk_s(chunk, done)))
        chunks.append(chunk)
        programs.append(bucket + SLOTS)
        done += chunk
    return lock_step(cost, chunks, programs)


def ring_step_s(cost: CostModel, ranks: int, prompt_tokens: int, striped: bool) -> tuple[float, float, float]:
    """(attention of a rank's own block, of any other, transfer of a block) in seconds, over all layers.

    Striped, half of every block is visible to every rank; contiguous, there is a rank that sees the whole of it.
    """
    h, tokens = cost.hardware, prompt_tokens / ranks
    own_s = cost.chunk_s(tokens, 0)
    other_s = own_s if striped else cost.chunk_s(tokens, tokens, 0)
    block_bytes = tokens * 2 * cost.kv_heads * cost.model.head_dim * cost.dtype_bytes
    return own_s, other_s, cost.layers * (h.link_latency_s + block_bytes / (h.link_bytes_per_s * h.link_share))


def ring_ttft_s(cost: CostModel, ranks: int, prompt_tokens: int, striped: bool) -> float:
    """Seconds of a prefill under context parallelism, each rank a tp group that holds all layers.

    In each step a rank attends from its own tokens to one block while the next one is on its way.
    """
    own_s, other_s, transfer_s = ring_step_s(cost, ranks, prompt_tokens, striped)
    steps_s = [own_s, *[other_s] * (ranks - 1)]
    attention_s = sum(max(step_s, transfer_s) for step_s in steps_s[:-1]) + steps_s[-1]
    return cost.program_s(prompt_tokens / ranks) + attention_s


def prefill_flops(model: ModelConfig, prompt_tokens: int) -> float:
    """Products of the layers' weights and of causal attention, counted once; one token is unembedded."""
    layers = model.weights - (2 - model.tied) * model.vocab * model.width
    attention = 2.0 * model.heads * model.head_dim * model.layers * prompt_tokens * (prompt_tokens + 1)
    return 2.0 * layers * prompt_tokens + attention + 2.0 * model.vocab * model.width


def tbt_s(cost: CostModel, context_tokens: int) -> float:
    """Seconds between tokens of one request alone, its keys spread evenly over the groups: a tick for each stage."""
    kvp, spp = cost.mesh.kvp, cost.mesh.spp
    return spp * (cost.program_s(SLOTS, SLOTS if kvp > 1 else 0) + cost.decode_s(context_tokens / kvp))


def tbt_floor_s(model: ModelConfig, hardware: HardwareConfig, mesh: MeshSpec, context_tokens: int) -> float:
    """Seconds to read all weights but the embedding table, and one group's keys and values, at peak bandwidth."""
    weight_bytes = (model.weights - (1 - model.tied) * model.vocab * model.width) * DTYPE_BYTES
    kv_bytes = model.kv_bytes_per_token(DTYPE_BYTES, mesh.tp) * context_tokens / mesh.kvp
    return (weight_bytes + kv_bytes) / mesh.tp / hardware.hbm_bytes_per_s
