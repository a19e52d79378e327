"""The Hopper kernels pass the front end of their compiler, on a machine without a GPU, in every tiling that ships."""

import itertools
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.tiling import Tiling


def shipped() -> list[tuple[Tiling, int, int, int, int]]:
    """(tiling, tokens, heads_per_kv, kv_heads, head_dim) of a call for each way that a chunk can be cut."""
    found = {}
    for tokens in (1, 16, 17, 32, 128, 512, 2048, 8192):
        for G, K, H in itertools.product((1, 4, 7, 16), (1, 8), (64, 128)):
            tiling = mosaic.prefill_tiling(tokens, G, K, H)
            found[tiling, G, H] = tiling, tokens, G, K, H
    return list(found.values())


def ops(op):
    """(name, result shapes) of every operation of a module."""
    for region in op.regions:
        for block in region:
            for inner in block.operations:
                yield inner.operation.name, [tuple(r.type.shape) for r in inner.results if hasattr(r.type, "shape")]
                yield from ops(inner)


def lower(f, *avals, **named):
    lowered = jax.jit(f).trace(*avals, **named).lower(lowering_platforms=("cuda",))
    return lowered.as_text(), list(ops(lowered.compiler_ir("stablehlo").operation))


def words(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)


def lower_attention(f, tokens, G, K, H, dtype, R, **ragged):
    cache = (2, 71, 2, K, mosaic.PAGE_TOKENS, H)  # as large as nothing else
    rows = {name: words(R) for name in ("slots_R", "kv_lens_R", "key_start_R", "key_stride_R")}
    q, kv = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, K * G, H), cache))
    text, found = lower(f, q, kv, words(), words(R, 64), **ragged, **rows)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2  # attend, merge
    assert {name for name, shapes in found if prod(cache) in map(prod, shapes)} == {"stablehlo.reshape"}


# What attends depends on the dtype, what merges on the heads for each kv head: every value of both, not every pair.
@pytest.mark.parametrize(("tiling", "tokens", "G", "K", "H"), shipped())
def test_chunked_prefill_lowers_for_cuda(tiling, tokens, G, K, H):
    dtype, R = jnp.bfloat16 if G in (1, 7) else jnp.float16, min(2, tokens)
    ragged = dict(cu_q_lens_R1=words(R + 1), q_positions_T=words(tokens))
    lower_attention(mosaic.chunked_prefill, tokens, G, K, H, dtype, R, **ragged)


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize(
    ("G", "dtype"), [(1, "bfloat16"), (4, "float16"), (7, "bfloat16"), (16, "bfloat16"), (16, "float16")]
)
def test_paged_decode_lowers_for_cuda(G, dtype, H):
    lower_attention(mosaic.paged_decode, 32, G, 8, H, dtype, 32, q_positions_R=words(32))


@pytest.mark.parametrize(("X", "N", "H"), [(2, 32, 128), (3, 7, 64), (8, 32, 64)])
def test_merge_partials_lowers_for_cuda(X, N, H):
    text, _ = lower(mosaic.merge_partials, *(jax.ShapeDtypeStruct(s, np.float32) for s in ((X, 64, N, H), (X, 64, N))))
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


def test_unsupported_names_the_reason():
    fits = dict(head_dim=128, heads_per_kv=16, page_tokens=mosaic.PAGE_TOKENS, dtype="bfloat16")
    for served in (fits, fits | dict(head_dim=64, dtype="float16")):
        assert mosaic.unsupported(**served) is None
    for name, value, reason in [
        ("head_dim", 96, "head dim 96"),
        ("heads_per_kv", 17, "17 query heads"),
        ("page_tokens", 64, "64 tokens"),
        ("dtype", "float32", "float32"),
    ]:
        assert reason in mosaic.unsupported(**fits | {name: value})
