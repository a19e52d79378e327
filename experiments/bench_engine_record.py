"""The record of `bench_engine`: what is counted and how, targets, a measured rival's figures, and its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from experiments.bench_engine_runs import TimedExecutor, kv_bytes, peak_bytes
from experiments.kernel_record import OURS, Found, words
from mnemosyne_jax.config import MeshSpec, ModelConfig
from mnemosyne_jax.model.params import weight_bytes_per_device

GIB = 2**30
CONVENTION = (
    "TTFT is from submission to the first token read by the host, TBT the gaps between tokens as read, one request "
    "alone. A prefill's operations count once what causality lets be seen: 2 * weights of the layers for each token, "
    "4 * query heads * head dim for each visible (query, key) pair of a layer, and the unembedding of the one sampled "
    "row. MFU is their rate over the matmul's of the same run, MBU the bytes of weights (no embedding table that is "
    "only looked up) and of keys and values, each read once for a token, over TBT times the copy's rate (bytes read "
    "and written) of the same run; both over all devices. Host time is what a tick takes the host without waiting for "
    "tokens. Weights are random, N(0, 0.02), token ids uniform; start-up and compilation are outside of all times. A "
    "filled cache holds random keys and values that no prefill made."
)
# TTFT in s and TBT p50 in ms by shape and context: batch 1, bfloat16, greedy, random weights N(0, 0.02), chunk 8192,
# FlashAttention 3, CUDA graphs, no prefix cache, in process. Of ranges the better end.
RIVAL = "vLLM 0.24.0 on H100, measured"
RIVAL_POINTS = {
    "llama-3.2-1b": {
        8_192: (0.039, 1.8), 32_768: (0.264, 1.9), 131_072: (2.82, 2.98), 524_288: (39.7, 7.44),
        1_048_576: (155.3, 13.3),
    },
    "llama-3-8b": {8_192: (0.210, 6.91), 32_768: (1.20, 8.00), 131_072: (10.4, 12.3), 393_216: (77.0, 23.9)},
}  # fmt: skip
TTFT, TBT, RATIO, PEAK = "TTFT", "TBT p50", "TTFT over that of the largest chunk", "peak memory over weights and cache"
LARGE_CHUNKS, SMALL_CHUNKS = (8192, 8184, 8312), (512, 504)  # alone, or with 8 decode rows to a multiple of 128
# (name, shape, context) -> (must, aim) on one H100 or H200.
BOUNDS = {
    (TTFT, "llama-3-8b", 131_072): ("<= 10.2", "<= 9.4"),
    (TTFT, "llama-3-8b", 393_216): ("<= 76", "<= 69"),
    (TTFT, "llama-3.2-1b", 131_072): ("<= 2.75", "<= 2.45"),
    (TTFT, "llama-3.2-1b", 524_288): ("<= 38.5", "<= 34"),
    (TBT, "llama-3-8b", 8_192): ("<= 6.4", "<= 5.8"),
    (TBT, "llama-3-8b", 131_072): ("<= 11.9", "<= 11.3"),
    (TBT, "llama-3-8b", 393_216): ("<= 23.5", "<= 22.9"),
    (TBT, "llama-3.2-1b", 8_192): ("<= 1.6", "<= 1.1"),
    (TBT, "llama-3.2-1b", 131_072): ("<= 2.8", "<= 2.5"),
    (TBT, "llama-3.2-1b", 524_288): ("<= 7.2", "<= 6.9"),
    (RATIO, "llama-3-8b", 393_216): ("<= 1.12", "<= 1.06"),
}
H200_BOUNDS = {(TBT, "qwen2.5-0.5b", 10_000_000): ("<= 34", "<= 30.5")}


def bounds(name: str, device_kind: str, mesh: MeshSpec, **where: Any) -> dict[str, str]:
    """The must and the aim of a number of ours on one H100 or H200, as results.row takes them; few have any."""
    if mesh.devices > 1 or not any(card in device_kind for card in ("H100", "H200")):
        return {}
    if name == PEAK:
        return dict(must="<= 4", aim="<= 2")
    chunk, over = where.get("chunk"), where.get("over")
    if name == TTFT and chunk not in (*LARGE_CHUNKS, "adaptive"):
        return {}
    if name == RATIO and (chunk not in SMALL_CHUNKS or over not in LARGE_CHUNKS):
        return {}
    known = BOUNDS | (H200_BOUNDS if "H200" in device_kind else {})
    found = known.get((name, where.get("shape", ""), where.get("context", 0)))
    return {} if found is None else dict(must=found[0], aim=found[1])


# Operations and bytes.


def layer_weights(model: ModelConfig) -> int:
    """Weights of all layers' matrices."""
    qkv_and_out = model.width * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    return model.layers * (qkv_and_out + 3 * model.width * model.ffn)


def prefill_flops(model: ModelConfig, tokens: int) -> float:
    """Operations of a prompt, by CONVENTION."""
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * model.layers * model.heads * model.head_dim * pairs
    return float(2 * layer_weights(model) * tokens + attention + 2 * model.vocab * model.width)


def decode_bytes(model: ModelConfig, context: int, dtype_bytes: int = 2) -> float:
    """Bytes of weights, and of keys and values of `context` tokens, that a token needs to be read once."""
    looked_up = 0 if model.tied else model.vocab * model.width
    return float((model.weights - looked_up) * dtype_bytes + context * model.kv_bytes_per_token(dtype_bytes))


def floors(model: ModelConfig, context: int, ceilings: Mapping[str, float], devices: int) -> tuple[float, float]:
    """(s of TTFT, ms of TBT) that so many devices with these ceilings cannot beat."""
    ttft_s = prefill_flops(model, context) / (1e12 * ceilings["matmul_tflops"] * devices)
    tbt_s = decode_bytes(model, context) / (1e12 * ceilings["copy_tb_per_s"] * devices)
    return ttft_s, 1e3 * tbt_s


# Rows.


@dataclass(frozen=True, eq=False)
class Bench:
    """A run under way: what was found so far, the device's ceilings, how to save, and when to begin nothing more."""

    mesh: MeshSpec
    found: Found
    ceilings: Mapping[str, float]
    save: Callable[[], Any]
    end_s: float

    def add(self, name: str, value: float, unit: str, **where: Any) -> None:
        """A row on this mesh, with its must and aim if it has any."""
        limits = bounds(name, jax.devices()[0].device_kind, self.mesh, **where)
        self.found.add(name, float(value), unit, **where, mesh=str(self.mesh), **limits)

    def leave_out(self, reason: str, **where: Any) -> None:
        self.found.leave_out(OURS, reason, **where)

    def may_begin(self, **where: Any) -> bool:
        if time.monotonic() <= self.end_s:
            return True
        self.leave_out("no time left", **where)
        return False


def memory_rows(bench: Bench, executor: TimedExecutor, peak_before: int | None, **where: Any) -> None:
    """Adds rows of a device's memory: weights, keys and values, the largest program's temporaries, and the peak."""
    weights, kv = weight_bytes_per_device(executor.params), kv_bytes(executor.target)
    temporaries = executor.memory_analysis(executor.shapes[-1]).temp_size_in_bytes
    for name, size in (("weights", weights), ("keys and values", kv), ("temporaries of a tick", temporaries)):
        bench.add(name, size / GIB, "GiB", **where)
    peak = peak_bytes()
    if peak is None or peak_before is None:
        bench.leave_out("the device does not count its memory", **where, what="peak memory")
    elif peak <= peak_before:
        bench.leave_out(f"{peak_before / GIB:.1f} GiB were in use before", **where, what="peak memory")
    else:
        bench.add("peak memory", peak / GIB, "GiB", **where)
        bench.add(PEAK, (peak - weights - kv) / GIB, "GiB", **where)
        print(f"{words(**where)}: peak {peak / GIB:.1f} GiB, of it weights {weights / GIB:.1f}, cache {kv / GIB:.1f}")
