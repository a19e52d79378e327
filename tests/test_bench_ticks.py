"""The benchmark of single ticks, at tiny sizes on a CPU."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

from experiments import bench_ticks, command_line, power
from experiments.tick_loads import TickLoads
from tests.test_bench_engine import YAML

TINY = [
    *("--ticks", "[[0, 0], [5, 64], [16, 16]]", "--decodes", "1", "--decode_keys", "9"),
    *("--heat_s", "0.001", "--seconds", "0.001", "--serve.page_tokens", "8", "--serve.pool_pages", "16"),
    *("--serve.private_rows", "3", "--serve.private_chunks", "1"),
    *("--serve.chunk_tokens", "16", "--serve.chunk_buckets", "[8, 16]"),
]


def test_every_tick_has_a_row_a_turn(tmp_path, capsys):
    model, out = tmp_path / "tiny.yaml", tmp_path / "ticks.json"
    model.write_text(YAML)
    assert bench_ticks.main([*TINY, "--model", str(model), "--mesh.kvp", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["chunk"], r["context"], r["turn"]) for r in rows] == [
        (tokens, keys, turn) for turn in (0, 1) for tokens, keys in ((0, 0), (5, 64), (16, 16))
    ]
    assert all(r["value"] > 0 and r["predicted_ms"] > 0 and "watts" not in r for r in rows)
    assert "5 after 59: " in capsys.readouterr().out


@pytest.mark.parametrize("kvp", [1, 2])
def test_rows_of_a_batch_have_slots_of_their_own(kvp):
    config = command_line.read(bench_ticks.BenchTicksConfig, [*TINY, "--mesh.kvp", str(kvp)])
    make = TickLoads(config.serve, config.mesh, config.serve.pool_pages, vocab=96)
    one = bench_ticks.batch(make, 5, 64, 2, 9)
    places = [(row.slot, row.group) for row in (*one.decodes, *one.chunks)]
    assert len(one.decodes) == 2 * kvp and len(one.chunks) == kvp and len(set(places)) == 3 * kvp
    assert {(row.start, row.end) for row in one.chunks} == {(59, 64)} and {row.position for row in one.decodes} == {8}
    assert not bench_ticks.batch(make, 0, 0, 1, 9).chunks


@pytest.mark.parametrize(("args", "reason"), [
    (["--decodes", "3"], "decodes: got 3"),
    (["--ticks", "[[17, 64]]"], "at most 16 tokens"),
    (["--ticks", "[[5, 4]]"], "at most 16 tokens"),
    (["--ticks", "[[5, 999]]"], "serve.pool_pages"),
    (["--decode_keys", "129"], "serve.pool_pages"),
])  # fmt: skip
def test_refuses(args, reason, capsys):
    with pytest.raises(SystemExit):
        command_line.read(bench_ticks.BenchTicksConfig, [*TINY, *args])
    assert reason in capsys.readouterr().err


def test_samples_what_nvml_reads(monkeypatch):
    """A pretended NVML: the mean of what it reads while the block runs."""
    read = iter([(1000, 400_000), (1500, 600_000)])
    now = {}

    def clock(handle, which):
        now["pair"] = next(read, (1250, 500_000))
        return now["pair"][0]

    told = SimpleNamespace(value=SimpleNamespace(uiVal=500_000), nvmlReturn=0)
    values = lambda handle, fields: [told]  # noqa: E731
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetFieldValues=values, NVML_CLOCK_SM=1, NVML_SUCCESS=0,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with power.Sampled() as sampled:
        time.sleep(0.2)
    assert sampled.means == {"sm_mhz": pytest.approx(1250, abs=40), "watts": 500}
    told.nvmlReturn = 3
    with power.Sampled() as sampled:
        time.sleep(0.05)
    assert sampled.means == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with power.Sampled() as sampled:
        time.sleep(0.05)
    assert sampled.means == {}
