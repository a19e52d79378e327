"""What is known before anything is loaded: the facts of a device by its name, and what they predict."""

from dataclasses import replace

import pytest

import mnemosyne_jax as mn
from mnemosyne_jax.config import HardwareConfig
from mnemosyne_jax.planning import hardware_of

LLAMA_8B = mn.from_yaml(mn.ModelConfig, "configs/model/llama-3-8b.yaml")


@pytest.mark.parametrize(
    "kind, name", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H200", "h200")]
)
def test_devices_are_known_by_their_names(kind, name):
    found = hardware_of(kind)
    assert found.name == name and found == mn.from_yaml(HardwareConfig, f"configs/hardware/{name}.yaml")


def test_an_unknown_device_is_a_small_one():
    assert hardware_of("cpu") == HardwareConfig() == hardware_of("TPU v9")


def test_plan_predicts_times_of_calibrated_hardware_alone():
    h100 = hardware_of("NVIDIA H100 80GB HBM3")
    assert mn.plan(LLAMA_8B, replace(h100, fitted=False), mn.MeshSpec(), 131_072).ttft_s is None
    fitted = replace(h100, fitted=True)
    one, eight = (mn.plan(LLAMA_8B, fitted, mesh, 131_072) for mesh in (mn.MeshSpec(), mn.MeshSpec(tp=8)))
    assert one.ttft_s and one.tbt_s and eight.ttft_s and eight.tbt_s
    assert 4 < one.ttft_s / eight.ttft_s <= 8 and 2 < one.tbt_s / eight.tbt_s <= 8
    floor_s = 2 * LLAMA_8B.weights * 131_072 / h100.matmul_flops_per_s
    assert floor_s < one.ttft_s < 10 * floor_s
    groups = mn.plan(LLAMA_8B, fitted, mn.MeshSpec(kvp=4), 1_000_000)
    assert groups.tbt_s and groups.tbt_s < mn.plan(LLAMA_8B, fitted, mn.MeshSpec(), 1_000_000).tbt_s


@pytest.mark.parametrize("shape, context, ttft_s, tbt_s, within", [
    ("llama-3.2-1b", 8_192, 0.0400, 1.43e-3, 0.05), ("llama-3.2-1b", 131_072, 2.74, 2.72e-3, 0.05),
    ("llama-3.2-1b", 524_288, 37.5, 6.75e-3, 0.06), ("llama-3-8b", 8_192, 0.222, 6.20e-3, 0.05),
    ("llama-3-8b", 131_072, 10.1, 11.4e-3, 0.05), ("llama-3-8b", 393_216, 72.4, 22.3e-3, 0.05),
])  # fmt: skip
def test_plan_tells_what_one_h100_took(shape, context, ttft_s, tbt_s, within):
    """Measured by bench_engine in large chunks, programs with eight decode rows; none of it took part in the fit."""
    h100, model = hardware_of("NVIDIA H100 80GB HBM3"), mn.from_yaml(mn.ModelConfig, f"configs/model/{shape}.yaml")
    found = mn.plan(model, h100, mn.MeshSpec(), context)
    assert found.ttft_s == pytest.approx(ttft_s, rel=within) and found.tbt_s == pytest.approx(tbt_s, rel=within)


@pytest.mark.parametrize("shape, mesh, ttft_512k_s, tbt_1m_s", [
    ("llama-3-8b", mn.MeshSpec(), 123, None), ("llama-3-8b", mn.MeshSpec(spp=2), 64.3, 34.2e-3),
    ("llama-3-8b", mn.MeshSpec(tp=2), 64.9, 18.8e-3), ("llama-3-8b", mn.MeshSpec(kvp=2), 72.2, 20.1e-3),
    ("llama-3.2-1b", mn.MeshSpec(), 37.0, 8.60e-3), ("llama-3.2-1b", mn.MeshSpec(spp=2), 19.3, 8.67e-3),
    ("llama-3.2-1b", mn.MeshSpec(tp=2), 19.5, 5.11e-3), ("llama-3.2-1b", mn.MeshSpec(kvp=2), 20.5, 5.14e-3),
], ids=str)  # fmt: skip
def test_plan_tells_what_two_h200_took(shape, mesh, ttft_512k_s, tbt_1m_s):
    """Measured by experiments.scaling; the fit was to ticks of one card of at most 0.15 s, links are guessed."""
    h200, model = hardware_of("NVIDIA H200"), mn.from_yaml(mn.ModelConfig, f"configs/model/{shape}.yaml")
    assert mn.plan(model, h200, mesh, 524_288).ttft_s == pytest.approx(ttft_512k_s, rel=0.09)
    if tbt_1m_s:
        assert mn.plan(model, h200, mesh, 1_048_576).tbt_s == pytest.approx(tbt_1m_s, rel=0.04)


@pytest.mark.parametrize("name", ["tbt_slo_s", "idle_tick_s", "least_yield", "long_yield"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_budgets_and_shares_that_make_no_sense_are_refused(name, value):
    with pytest.raises(mn.RequestError, match=f"serve.{name}"):
        mn.ServeConfig(**{name: value})


def test_engines_go_by_policy_and_time_unless_told_otherwise():
    assert (mn.ServeConfig().policy, mn.ServeConfig().chunking) == ("lars", "adaptive")
