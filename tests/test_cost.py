"""The cost model: monotone in every load, right at its limits, beside floors that are known."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, from_yaml
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.serve.cost import CostModel
from pallas_kernels import mosaic

LLAMA_1B = from_yaml(ModelConfig, "configs/model/llama-3.2-1b.yaml")
LLAMA_8B = from_yaml(ModelConfig, "configs/model/llama-3-8b.yaml")
H100 = from_yaml(HardwareConfig, "configs/hardware/h100.yaml")
MESHES = [MeshSpec(), MeshSpec(tp=8), MeshSpec(spp=4), MeshSpec(2, 2, 2), MeshSpec(kvp=4)]
PERFECT = replace(
    H100, matmul_share=1.0, weight_read_share=1.0, attention_share=1.0, kv_read_share=1.0, activation_share=1.0,
    link_share=1.0, softmax_dims=0.0, tile_rows=1, layer_overhead_s=0.0, tick_overhead_s=0.0, link_latency_s=0.0,
)  # fmt: skip
loads = st.tuples(*[st.integers(1, 20_000)] * 2, *[st.integers(0, 10_000_000)] * 2)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(one=loads, other=loads)
def test_more_load_never_costs_less(mesh, one, other):
    cost = CostModel(LLAMA_8B, replace(H100, tick_overhead_s=1e-4), mesh)
    less, more = (np.array(x) for x in (np.minimum(one, other), np.maximum(one, other)))
    for a, b in ((less, more), (more, more)):
        assert cost.program_s(a[0], a[2] % 64, a[1]) <= cost.program_s(b[0], a[2] % 64, b[1]) * (1 + 1e-12)
        assert cost.chunk_s(a[0], a[2]) <= cost.chunk_s(b[0], b[2]) * (1 + 1e-12)
        assert cost.chunk_s(a[0], a[2], a[0] // 2) <= cost.chunk_s(b[0], b[2], b[0] // 2) * (1 + 1e-12)
        assert 0 <= cost.decode_s(a[3]) <= cost.decode_s(b[3])


def test_floors_of_a_perfect_device():
    """At full rates the model is the arithmetic of the roofline: 8B weights read once, 131,072 bytes of KV a token."""
    cost = CostModel(LLAMA_8B, PERFECT, MeshSpec())
    weights = 32 * cost.layer_weights + LLAMA_8B.vocab * LLAMA_8B.width
    assert cost.program_s(1) == pytest.approx(weights * 2 / PERFECT.hbm_bytes_per_s, rel=1e-3)
    assert weights == pytest.approx(LLAMA_8B.weights - LLAMA_8B.vocab * LLAMA_8B.width, rel=1e-3)
    assert cost.decode_s(1_000_000) == pytest.approx(131_072e6 / PERFECT.hbm_bytes_per_s)
    causal = 4 * 32 * 128 * 32 * (1_000_000**2 / 2)
    chunks = sum(cost.chunk_s(8192, start) for start in range(0, 1_000_000, 8192))
    assert chunks == pytest.approx(causal / PERFECT.matmul_flops_per_s, rel=0.02)


def test_a_small_chunk_is_bound_by_reading_keys():
    """Far below the ridge, 74 tokens for the 8B model, a chunk costs what its context does; far above, what its queries
    do; at the ridge both, and they overlap in part."""
    cost = CostModel(LLAMA_8B, PERFECT, MeshSpec())
    assert cost.chunk_s(4, 1_000_000) == pytest.approx(cost.decode_s(1_000_004), rel=2e-3)
    assert cost.chunk_s(4096, 1_000_000) == pytest.approx(4 * cost.chunk_s(1024, 1_000_000), rel=5e-3)
    ridge = PERFECT.matmul_flops_per_s / PERFECT.hbm_bytes_per_s / 4
    at_ridge = cost.chunk_s(int(ridge), 1_000_000) / cost.decode_s(1_000_000)
    assert at_ridge == pytest.approx(2**0.5, rel=0.01)


def test_softmax_weighs_on_small_heads():
    """What a pair costs beside its products does not shrink with the head dim: an H100's rate at 64 is 0.8 of that at
    128. With dims 42.7, 64 + 42.7 is 0.625 of 128 + 42.7, at half the products."""
    one, eight = (CostModel(m, replace(PERFECT, softmax_dims=42.7), MeshSpec()) for m in (LLAMA_1B, LLAMA_8B))
    flops = [m.layers * 4 * m.heads * m.head_dim for m in (LLAMA_1B, LLAMA_8B)]
    rates = [f / cost.chunk_s(8192, 10**6) for f, cost in zip(flops, (one, eight), strict=True)]
    assert rates[0] / rates[1] == pytest.approx(0.8, rel=2e-3)
    without = [CostModel(m, PERFECT, MeshSpec()).chunk_s(8192, 10**6) for m in (LLAMA_1B, LLAMA_8B)]
    assert flops[0] / without[0] == pytest.approx(flops[1] / without[1], rel=2e-3)


def test_activations_cost_each_row_its_width():
    """The 8B model's 284 KiB a row and layer: what rows add beyond their products, less on shards of heads and ffn."""
    cost = CostModel(LLAMA_8B, replace(PERFECT, activation_share=0.5), MeshSpec())
    assert cost.activation_bytes == 284 * 1024 == 2 * (10 * 4096 + 3 * 14336 + 2 * (32 + 16) * 128) + 6 * 4 * 32 * 128
    without = CostModel(LLAMA_8B, replace(PERFECT, activation_share=1.0), MeshSpec())
    added_s = cost.program_s(8192) - without.program_s(8192)
    assert added_s == pytest.approx(32 * 8192 * cost.activation_bytes / PERFECT.hbm_bytes_per_s)
    shard = CostModel(LLAMA_8B, PERFECT, MeshSpec(tp=8))
    assert cost.activation_bytes / 8 < shard.activation_bytes < cost.activation_bytes
    assert shard.activation_bytes == pytest.approx(2 * 10 * 4096 + (cost.activation_bytes - 2 * 10 * 4096) / 8)


def test_a_layer_with_few_rows_has_less_overhead():
    slow, none = (CostModel(LLAMA_8B, replace(PERFECT, layer_overhead_s=s, overhead_rows=12.0), MeshSpec())
                  for s in (1e-4, 0.0))  # fmt: skip
    lost_s = [(slow.program_s(rows) - none.program_s(rows)) / 32 for rows in (1, 12, 10**6)]
    assert lost_s == pytest.approx([1e-4 / 13, 0.5e-4, 1e-4], rel=1e-4)


def test_axes_divide_what_they_share():
    one = CostModel(LLAMA_8B, PERFECT, MeshSpec())
    assert CostModel(LLAMA_8B, PERFECT, MeshSpec(spp=4)).decode_s(8e6) == pytest.approx(one.decode_s(8e6) / 4)
    assert CostModel(LLAMA_8B, PERFECT, MeshSpec(tp=8)).chunk_s(512, 1e6) == pytest.approx(one.chunk_s(512, 1e6) / 8)
    assert CostModel(LLAMA_8B, PERFECT, MeshSpec(tp=16)).kv_heads == 1  # replicated beyond the kv heads
    assert CostModel(LLAMA_8B, H100, MeshSpec(kvp=2)).program_s(8, 8) > CostModel(LLAMA_8B, H100, MeshSpec()).program_s(
        8
    )


def test_arrays_cost_what_their_numbers_cost():
    cost = CostModel(LLAMA_8B, H100, MeshSpec(2, 2, 2))
    tokens, keys = np.array([1, 32, 512, 8192]), np.array([0, 10, 100_000, 10_000_000])
    loads = list(zip(tokens.tolist(), keys.tolist(), strict=True))
    for got, want in (
        (cost.chunk_s(tokens, keys), [cost.chunk_s(t, k) for t, k in loads]),
        (cost.program_s(tokens, keys % 7), [cost.program_s(t, k % 7) for t, k in loads]),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    on_device = jax.jit(lambda t, k: cost.program_s(t, k % 7) + cost.chunk_s(t, k))(tokens, keys)
    np.testing.assert_allclose(on_device, cost.program_s(tokens, keys % 7) + cost.chunk_s(tokens, keys), rtol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("matmul_share", 1.5), ("hbm_bytes_per_s", 0.0), ("softmax_dims", -1.0),
                                              ("link_share", float("nan"))])  # fmt: skip
def test_impossible_hardware_is_refused(field, value):
    with pytest.raises(RequestError, match=field):
        replace(H100, **{field: value})


@pytest.mark.parametrize("tokens", [64, 95, 96, 128, 480])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("model", [LLAMA_1B, LLAMA_8B], ids=["head dim 64", "head dim 128"])
def test_attention_is_charged_in_the_tiles_of_the_kernel(model, tp, tokens):
    """One query more than whole tiles costs a tile more; a tile is what one CTA has of a chunk of so many tokens."""
    cost = CostModel(model, replace(H100, hbm_bytes_per_s=1e18), MeshSpec(tp=tp))  # keys are read in no time
    tiling = mosaic.prefill_tiling(tokens, cost.heads // cost.kv_heads, cost.kv_heads, model.head_dim)
    t, many = tiling.rows // tiling.ctas * cost.kv_heads // cost.heads, 10**6
    assert t == cost.tile_tokens + (tokens >= cost.larger_from_tokens) * cost.larger_by_tokens
    if tokens % t == 0:
        assert cost.chunk_s(tokens - 1, many) == pytest.approx(cost.chunk_s(tokens, many), rel=1e-4)
    if tokens % t == 0 and (t == cost.tile_tokens or tokens - t >= cost.larger_from_tokens):  # fewer have such tiles
        assert cost.chunk_s(tokens - t + 1, many) == pytest.approx(cost.chunk_s(tokens, many), rel=1e-4)
        fewer_s = cost.chunk_s(tokens - t, many)
        assert cost.chunk_s(tokens, many) == pytest.approx(tokens / (tokens - t) * fewer_s, rel=0.02)
