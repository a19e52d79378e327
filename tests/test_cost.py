"""The cost model: monotone in every load, right at its limits, beside floors that are known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, from_yaml
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.serve.cost import CostModel

LLAMA_8B = from_yaml(ModelConfig, "configs/model/llama-3-8b.yaml")
H100 = from_yaml(HardwareConfig, "configs/hardware/h100.yaml")
MESHES = [MeshSpec(), MeshSpec(tp=8), MeshSpec(spp=4), MeshSpec(2, 2, 2), MeshSpec(kvp=4)]
PERFECT = replace(
    H100, matmul_share=1.0, weight_read_share=1.0, attention_share=1.0, kv_read_share=1.0, link_share=1.0,
    chunk_rows=0.0, layer_overhead_s=0.0, tick_overhead_s=0.0, link_latency_s=0.0,
)  # fmt: skip
loads = st.tuples(*[st.integers(1, 20_000)] * 2, *[st.integers(0, 10_000_000)] * 2)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(one=loads, other=loads)
def test_more_load_never_costs_less(mesh, one, other):
    cost = CostModel(LLAMA_8B, H100, mesh)
    less, more = (np.array(x) for x in (np.minimum(one, other), np.maximum(one, other)))
    for a, b in ((less, more), (more, more)):
        assert cost.program_s(a[0], a[2] % 64, a[1]) <= cost.program_s(b[0], a[2] % 64, b[1]) * (1 + 1e-12)
        assert cost.chunk_s(a[0], a[2]) <= cost.chunk_s(b[0], b[2]) * (1 + 1e-12)
        assert 0 <= cost.decode_s(a[3]) <= cost.decode_s(b[3])


def test_floors_of_a_perfect_device():
    """At full rates the model is the arithmetic of the roofline: 8B weights read once, 131,072 bytes of KV a token."""
    cost = CostModel(LLAMA_8B, PERFECT, MeshSpec())
    weights = 32 * cost.layer_weights + LLAMA_8B.vocab * LLAMA_8B.width
    assert cost.program_s(1) == pytest.approx(weights * 2 / PERFECT.hbm_bytes_per_s)
    assert weights == pytest.approx(LLAMA_8B.weights - LLAMA_8B.vocab * LLAMA_8B.width, rel=1e-3)
    assert cost.decode_s(1_000_000) == pytest.approx(131_072e6 / PERFECT.hbm_bytes_per_s)
    causal = 4 * 32 * 128 * 32 * (1_000_000**2 / 2)
    chunks = sum(cost.chunk_s(8192, start) for start in range(0, 1_000_000, 8192))
    assert chunks == pytest.approx(causal / PERFECT.matmul_flops_per_s, rel=0.02)


def test_a_small_chunk_is_bound_by_reading_keys():
    """Below the ridge, 74 tokens for the 8B model, a chunk costs what its context does; above, what its queries do."""
    cost = CostModel(LLAMA_8B, PERFECT, MeshSpec())
    assert cost.chunk_s(32, 1_000_000) == pytest.approx(cost.decode_s(1_000_032))
    assert cost.chunk_s(512, 1_000_000) == pytest.approx(4 * cost.chunk_s(128, 1_000_000), rel=1e-3)
    ridge = PERFECT.matmul_flops_per_s / PERFECT.hbm_bytes_per_s / 4
    low, high = (cost.chunk_s(int(ridge * x), 1_000_000) / cost.decode_s(1_000_000) for x in (0.9, 1.1))
    assert low == pytest.approx(1, abs=1e-3) and high == pytest.approx(1.1, abs=0.02)


def test_axes_divide_what_they_share():
    one = CostModel(LLAMA_8B, PERFECT, MeshSpec())
    assert CostModel(LLAMA_8B, PERFECT, MeshSpec(spp=4)).decode_s(8e6) == pytest.approx(one.decode_s(8e6) / 4)
    assert CostModel(LLAMA_8B, PERFECT, MeshSpec(tp=8)).chunk_s(512, 1e6) == pytest.approx(one.chunk_s(512, 1e6) / 8)
    assert CostModel(LLAMA_8B, PERFECT, MeshSpec(tp=16)).kv_heads == 1  # replicated beyond the kv heads
    assert CostModel(LLAMA_8B, H100, MeshSpec(kvp=2)).program_s(8, 8) > CostModel(LLAMA_8B, H100, MeshSpec()).program_s(
        8
    )


def test_arrays_cost_what_their_numbers_cost():
    scalar, array = (CostModel(LLAMA_8B, H100, MeshSpec(2, 2, 2), maximum=f) for f in (max, np.maximum))
    tokens, keys = np.array([1, 32, 512, 8192]), np.array([0, 10, 100_000, 10_000_000])
    for got, want in (
        (array.chunk_s(tokens, keys), [scalar.chunk_s(t, k) for t, k in zip(tokens, keys, strict=True)]),
        (array.program_s(tokens, keys % 7), [scalar.program_s(t, k % 7) for t, k in zip(tokens, keys, strict=True)]),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(("field", "value"), [("matmul_share", 1.5), ("hbm_bytes_per_s", 0.0), ("chunk_rows", -1.0),
                                              ("link_share", float("nan"))])  # fmt: skip
def test_impossible_hardware_is_refused(field, value):
    with pytest.raises(RequestError, match=field):
        replace(H100, **{field: value})
