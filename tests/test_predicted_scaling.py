"""Predicted prefills are those of the scheduler over a simulated mesh; rings and floors are what arithmetic says."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import command_line, predicted_scaling
from experiments import predicted_scaling_times as times
from experiments.predicted_scaling import PredictedScalingConfig
from mnemosyne_jax.config import MeshSpec, ModelConfig, from_yaml
from mnemosyne_jax.serve.cost import CostModel
from tests.test_timed_scheduler import Simulated
from tests.world import guessed

LLAMA_8B, LLAMA_70B = (from_yaml(ModelConfig, f"configs/model/llama-3-{size}.yaml") for size in ("8b", "70b"))
H100 = guessed("h100")
PERFECT = replace(
    H100, matmul_share=1.0, attention_share=1.0, kv_read_share=1.0, weight_read_share=1.0, softmax_dims=0.0,
    activation_share=1.0, layer_overhead_s=0.0, tick_overhead_s=0.0, link_latency_s=0.0, link_bytes_per_s=1e18,
)  # fmt: skip
BUCKETS = (64, 256, 1024, 4096)


@pytest.mark.parametrize("spp", [1, 4])
@pytest.mark.parametrize("tick_s", [0.02, 0.05, None])
def test_prefill_is_what_the_scheduler_makes_of_it(spp, tick_s):
    """The same chunks, and the same time in lock-step ticks, in chunks of one size (None) or of one time."""
    mesh, prompt = MeshSpec(spp=spp, tp=8), 300_001
    buckets = BUCKETS if tick_s else (2048,)
    one = Simulated(
        mesh,
        private_rows=1,
        chunk_tokens=buckets[-1],
        chunk_buckets=buckets,
        span_tokens=2**20,
        idle_tick_s=tick_s or 10.0,
    )
    (sequence,) = one.run([(0.0, prompt, 1)])
    cost = CostModel(LLAMA_8B, H100, mesh)
    made = times.adaptive(cost, prompt, tick_s, BUCKETS) if tick_s else times.fixed(cost, prompt, 2048)
    assert made is not None and len(made.ticks_s) == len(made.chunks) + spp - 1
    assert made.chunks.tolist() == [row.length for batch in one.loop.batches for row in batch.chunks]
    assert made.ttft_s == pytest.approx(sequence.timeline.ttft_s, rel=1e-9)


def test_no_chunk_keeps_a_tick_that_is_too_short():
    assert times.adaptive(CostModel(LLAMA_8B, H100, MeshSpec(tp=8)), 2**20, 0.002, BUCKETS) is None


def test_a_striped_ring_divides_all_work_and_a_contiguous_one_waits_for_the_last_rank():
    """On a perfect device; a ring of one is the prefill in a single chunk."""
    cost, n = CostModel(LLAMA_8B, PERFECT, MeshSpec(tp=8)), 1_000_000
    alone_s = cost.program_s(n) + cost.chunk_s(n, 0)
    attention_s = cost.chunk_s(n, 0)
    for ranks in (1, 2, 16):
        striped_s, contiguous_s = (times.ring_ttft_s(cost, ranks, n, striped) for striped in (True, False))
        assert striped_s == pytest.approx(alone_s / ranks, rel=1e-3)
        late_s = attention_s / ranks**2 * (ranks - 1)  # whole blocks instead of halves, but for the first
        assert contiguous_s == pytest.approx(striped_s + late_s, rel=1e-3)


def test_a_ring_over_slow_links_waits_for_them():
    slow = replace(PERFECT, link_bytes_per_s=1e6)
    cost, n, ranks = CostModel(LLAMA_8B, slow, MeshSpec()), 100_000, 4
    sent_bytes = LLAMA_8B.kv_bytes_per_token(2) * n / ranks * (ranks - 1)
    assert times.ring_ttft_s(cost, ranks, n, True) == pytest.approx(sent_bytes / (1e6 * 0.75), rel=1e-2)


def test_floors():
    """Seconds of arithmetic and of reading that are known."""
    peak = H100.matmul_flops_per_s
    for model, prompt, seconds in ((LLAMA_8B, 10**6, 2.2), (LLAMA_8B, 10**7, 208), (LLAMA_70B, 10**6, 11.5)):
        assert times.prefill_flops(model, prompt) / (128 * peak) == pytest.approx(seconds, rel=0.02)
    weights_s = (LLAMA_8B.weights - LLAMA_8B.vocab * LLAMA_8B.width) * 2 / 8 / H100.hbm_bytes_per_s
    for kvp, seconds in ((1, 48.9e-3), (2, 24.5e-3), (4, 12.2e-3)):
        floor_s = times.tbt_floor_s(LLAMA_8B, H100, MeshSpec(kvp, 4, 8), 10**7)
        assert floor_s == pytest.approx(weights_s + seconds, rel=5e-3)
        assert floor_s < times.tbt_s(CostModel(LLAMA_8B, H100, MeshSpec(kvp, 4, 8)), 10**7) < 1.5 * floor_s
    assert LLAMA_70B.weights == pytest.approx(70.6e9, rel=1e-3) and LLAMA_70B.kv_bytes_per_token(2) == 320 * 2**10


def test_record_table_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    args = ["--config_path", "configs/predicted_scaling.yaml", "--prompts", "[1000000]", "--chunks", "[4096,8192]"]
    args += ["--ticks_s", "[0.25]", "--out", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    assert predicted_scaling.main(args) == 0
    config = command_line.read(PredictedScalingConfig, args)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    ttft_s = {r["devices"]: r["value"] for r in rows if r["name"] == "TTFT of SPP" and r["model"] == "llama-3-8b"}
    assert list(ttft_s) == [8, 16, 32, 64, 128] and (np.diff(list(ttft_s.values())) < 0).all()
    for r in rows:
        if r["name"] in ("MFU of SPP", "efficiency of SPP"):
            assert 0 < r["value"] <= 1.0
    tbt = [r for r in rows if r["name"] == "TBT"]
    assert len(tbt) == 2 * len(config.decode_stages) * len(config.groups) * len(config.contexts)
    assert sum("paper" in r for r in rows) == 2 * 5 + 2 and (tmp_path / "x.png").stat().st_size > 20_000
    text = capsys.readouterr().out
    assert "llama-3-70b" in text and "(1.64)" in text and "(55.0)" in text and "tokens" in text
