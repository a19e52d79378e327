"""Whether all layouts compute the same: tokens and logits of a small random model, beside those of one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

import mnemosyne_jax as mn
from experiments.bench_engine_runs import pool_pages, random_prompt
from experiments.kernel_record import OURS
from experiments.scaling_record import LayoutBench
from mnemosyne_jax.checkpoint import disk_shapes, place
from mnemosyne_jax.mesh import make_mesh

# Every layout of up to eight devices divides it, and its head dim is one that the Mosaic kernels serve in bfloat16.
SMALL = mn.ModelConfig(width=64, ffn=128, vocab=512, layers=8, heads=8, kv_heads=2, head_dim=64, dtype="float32")
# Attention that is not uniform, in a stream that embeddings rule: answers have many tokens, rounding grows little.
WEIGHT_SPREAD, EMBEDDING_SPREAD = 0.175, 1.0
POSITIONS = 16  # of which logits are compared
SAME_TOKENS, LOGIT_DIFFERENCE = "tokens equal", "logit difference"
LARGEST_DIFFERENCE = {"float32": "<= 0.0001", "bfloat16": "<= 0.05"}  # over the largest logit


@dataclass(frozen=True)
class CompareConfig:
    """A prompt of so many tokens (0: nothing is compared) in chunks of `chunk_tokens`, and so many greedy tokens.

    A prompt longer than `span_tokens` is spread over all kvp groups. Logits are compared in each of `dtypes`, tokens in
    float32 only: rounded to bfloat16, near ties part.
    """

    prompt_tokens: int = 3000
    new_tokens: int = 32
    chunk_tokens: int = 504
    span_tokens: int = 1024
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def compare(config: CompareConfig, serve: mn.ServeConfig, benches: Sequence[LayoutBench]) -> None:
    """Adds, for each layout, the share of tokens equal to those of one device, and how far logits are apart."""
    if not config.prompt_tokens:
        return
    weights = random_weights()
    for dtype in config.dtypes:
        tokens, logits = answers(config, serve, mn.MeshSpec(), dtype, weights)
        for bench in (bench for bench in benches if bench.mesh.devices > 1):
            where = dict(shape="small", context=config.prompt_tokens, dtype=dtype)
            if not bench.may_begin(**where):
                continue
            with bench.found.guarded(OURS, **where, **bench.place):
                here, logits_here = answers(config, serve, bench.mesh, dtype, weights)
                apart = float(np.abs(logits_here - logits).max() / np.abs(logits).max())
                bench.add(LOGIT_DIFFERENCE, apart, "1", **where, must=LARGEST_DIFFERENCE[dtype])
                same = float(np.mean(np.equal(here, tokens)))
                if dtype == "float32":
                    bench.add(SAME_TOKENS, same, "1", **where, must="== 1", distinct=len(set(tokens)))
                print(f"{bench.mesh}, {dtype}: {same:.0%} of tokens equal, logits {apart:.2g} apart", flush=True)


def answers(
    config: CompareConfig, serve: mn.ServeConfig, mesh: mn.MeshSpec, dtype: str, weights: dict[str, np.ndarray]
) -> tuple[list[int], np.ndarray]:
    """(greedy tokens, logits at some positions of the prompt) of the small model on this layout."""
    device_mesh, model = make_mesh(mesh), replace(SMALL, dtype=dtype)
    serve = replace(serve, chunk_tokens=config.chunk_tokens, chunk_buckets=(config.chunk_tokens,))
    serve = replace(serve, span_tokens=config.span_tokens, chunking="fixed")
    serve = replace(serve, pool_pages=pool_pages(serve, mesh, config.prompt_tokens + config.new_tokens))
    params = place(model, device_mesh, jnp.dtype(dtype), lambda name, index: weights[name][index])
    engine = mn.Engine(model, params, device_mesh, serve)
    prompt = random_prompt(config.prompt_tokens, model.vocab, seed=0)
    positions = np.linspace(0, config.prompt_tokens - 1, POSITIONS, dtype=int).tolist()
    logits = engine.logits(prompt, positions)
    (result,) = engine.generate([prompt], config.new_tokens, stop_ids=())
    return result.tokens, logits


def random_weights() -> dict[str, np.ndarray]:
    """Those of SMALL under their names on disk, norms around one."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        spread = EMBEDDING_SPREAD if "embed" in name else WEIGHT_SPREAD
        return (len(shape) == 1) + spread * rng.standard_normal(shape, np.float32)

    return {name: draw(name, shape) for name, shape in disk_shapes(SMALL).items()}
