"""The benchmark of decisions measures a live system: as many waiting as asked, requests that come, run and end."""

import json

import pytest

from experiments import bench_scheduler
from experiments.bench_scheduler import BenchSchedulerConfig

TRACE = "num_prefill_tokens,num_decode_tokens,arrived_at\n" + "".join(
    f"{50 + 131 * i % 900},{1 + i % 4},{i / 10}\n" for i in range(12)
)


def test_requests_are_of_mixed_lengths_and_the_same_for_the_same_seed():
    config = BenchSchedulerConfig(longest_tokens=50_000)
    drawn = [[next(made) for _ in range(500)] for made in (bench_scheduler.requests(config) for _ in range(2))]
    lengths = [[(len(r.prompt), r.max_new_tokens, r.deadline_s) for r in one] for one in drawn]
    assert lengths[0] == lengths[1]
    prompts = sorted(n for n, _, _ in lengths[0])
    assert prompts[0] < 500 < prompts[250] < 5000 and prompts[-1] == 50_000


@pytest.mark.parametrize("scarce", ["slots", "pages"])
@pytest.mark.parametrize("mesh", bench_scheduler.MESHES, ids=str)
def test_the_system_is_live(mesh, scarce):
    config = BenchSchedulerConfig(waiting=60, decisions=40, warm_ticks=60, new_tokens=20, prompt_tokens=200)
    loop = bench_scheduler.live(config, mesh, scarce)
    took_us, sizes = bench_scheduler.measure(config, loop)
    assert took_us.shape == (40, 2) and (took_us > 0).all()
    assert 50 < sizes["waiting"] <= 60 and sizes["running"] > 8 and sizes["decode rows"] > 0 < sizes["chunk rows"]
    ended = max(loop.scheduler.sequences) + 1 - len(loop.scheduler.sequences)
    assert ended > 0


def test_record_holds_every_must(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scheduler, "MESHES", bench_scheduler.MESHES[:1])
    (tmp_path / "trace.csv").write_text(TRACE)
    args = ["--trace", str(tmp_path / "trace.csv"), "--out", str(tmp_path / "out.json"), "--waiting", "20"]
    assert bench_scheduler.main([*args, "--decisions", "20", "--warm_ticks", "20"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    musts = [(r["name"], r.get("scarce"), r["must"]) for r in rows if "must" in r]
    each = [(f"next_batch {q}", s, f"<= {us}") for s in ("slots", "pages") for q, us in (("p50", 100), ("p99", 1000))]
    assert musts == [*each, ("replay", None, "<= 60"), ("requests that ended", None, "== 12")]
    assert next(r["value"] for r in rows if r["name"] == "requests that ended") == 12
