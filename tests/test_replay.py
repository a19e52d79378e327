"""A replay end to end at a small size: every request accounted for, the same numbers for the same seed."""

import dataclasses
import gzip
import json
from collections import defaultdict

import numpy as np
import pytest

from experiments import command_line, replay
from experiments.replay import ReplayConfig
from mnemosyne_jax.config import HardwareConfig, from_yaml
from mnemosyne_jax.errors import RequestError

TRACE = "num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{50 + 131 * i % 3000},{1 + 7 * i % 40}\n" for i in range(40)
)
GROUPS = ["--mesh.kvp", "2", "--mesh.tp", "2", "--serve.chunk_buckets", "[64,512,2048,8192]", "--policies", "[lars]"]


@pytest.fixture
def args(tmp_path):
    (tmp_path / "lengths.csv").write_text(TRACE)
    return [
        *("--config_path", "configs/replay.yaml", "--trace", str(tmp_path / "lengths.csv"), "--duration_s", "20"),
        *("--queries_per_s", "2", "--long_share", "0.1", "--out", str(tmp_path / "replay.json")),
        *("--long_lengths.prompt_p50_tokens", "140000", "--long_lengths.prompt_p90_tokens", "150000"),
    ]


def test_every_request_is_accounted_for(args, tmp_path, capsys):
    assert replay.main(args) == 0
    record = json.loads((tmp_path / "replay.json").read_text())
    assert {row["policy"] for row in record["rows"]} == {"lars", "fcfs_exclusive"}
    assert record["config"]["long_share"] == 0.1 and "TTFT" in capsys.readouterr().out
    config = command_line.read(ReplayConfig, args)
    arrivals = replay.workload(config)
    runs = [replay.replay(config, "lars", arrivals)[0] for _ in range(2)]
    for one, other, arrival in zip(*runs, arrivals, strict=True):
        assert one.id == other.id == arrival.id and np.array_equal(one.token_s, other.token_s)
        assert one.reason == "length" and len(one.token_s) == arrival.new_tokens and one.ttft_s > 0


def test_what_cannot_fit_is_refused_and_what_is_not_done_is_unfinished(args):
    config = dataclasses.replace(command_line.read(ReplayConfig, args), drain_s=-1.0)
    config = dataclasses.replace(config, serve=dataclasses.replace(config.serve, pool_pages=1000))
    served, _ = replay.replay(config, "lars", replay.workload(config))
    reasons = {s.reason.split(":")[0] for s in served}
    assert reasons == {"length", "refused", "unfinished"}
    assert all(s.kind == "long" and s.prompt_tokens > 100_000 for s in served if s.reason.startswith("refused"))


@pytest.mark.parametrize("stages", ["lock_step", "asynchronous"])
def test_perfetto_shows_every_stage_of_every_tick_in_the_window(args, tmp_path, stages):
    args += [*GROUPS, "--perfetto", str(tmp_path / "trace.json.gz"), "--perfetto_s", "[1.0,29.0]", "--stages", stages]
    assert replay.main(args) == 0
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    slices = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"] % 1000].append(event)
    assert len(slices) == 4 and len({len(own) for own in slices.values()}) == 1
    for own in slices.values():
        ticks = [event["args"]["tick"] for event in own]
        assert len(ticks) > 50 and ticks == list(range(ticks[0], ticks[0] + len(ticks)))
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in zip(own, own[1:], strict=False))
        assert own[0]["ts"] >= 1e6 and (own[-1]["ts"] < 29e6 or stages == "asynchronous")
    long, *_ = (event for own in slices.values() for event in own if event["name"].startswith("chunk long-"))
    assert long["args"]["predicted_ms"] > 0 and long["args"]["budget_ms"] > 0


def test_utilisation_and_balance_are_in_the_record(args, tmp_path):
    assert replay.main([*args, *GROUPS]) == 0
    rows = json.loads((tmp_path / "replay.json").read_text())["rows"]
    shares = {(row["group"], row["stage"]): row["value"] for row in rows if row["name"] == "utilisation"}
    assert set(shares) == {(g, s) for g in (0, 1) for s in (0, 1)} and all(0 < x <= 1 for x in shares.values())
    (balance,) = (row["value"] for row in rows if row["name"] == "busiest group / mean")
    busy = [shares[g, 0] + shares[g, 1] for g in (0, 1)]
    assert balance == pytest.approx(max(busy) / np.mean(busy), abs=1e-4) and 1 <= balance <= 2


def test_what_is_cancelled_leaves_nothing_behind(args, monkeypatch, capsys):
    monkeypatch.setattr(replay, "SAY_EVERY_S", 0.0)
    config = dataclasses.replace(command_line.read(ReplayConfig, args), cancel_share=0.4)
    arrivals = replay.workload(config)
    served, loop = replay.replay(config, "lars", arrivals)
    cancelled = [s for s in served if s.reason == "cancelled"]
    assert 0.3 * len(arrivals) <= len(cancelled) <= round(0.4 * len(arrivals))
    assert {s.reason for s in served} == {"cancelled", "length"}
    assert any(s.token_s.size for s in cancelled) and any(not s.token_s.size for s in cancelled)
    assert all(s.token_s.size < s.new_tokens for s in cancelled)
    places = loop.scheduler.places
    assert loop.idle and all(pool.free == pool.size and not pool.quarantined for pool in places.pools)
    assert sum(map(len, places.free_slots.values())) == config.serve.slots(config.mesh)
    assert "s simulated of at most" in capsys.readouterr().err


def test_lengths_alone_need_a_rate(args):
    config = dataclasses.replace(command_line.read(ReplayConfig, args), queries_per_s=None)
    with pytest.raises(RequestError, match="queries_per_s"):
        replay.workload(config)
    assert replay.main(["--config_path", "configs/replay.yaml"]) == 2  # no trace at all


def test_watch_of_the_simulator_is_off_by_the_error_that_is_stated():
    h100 = from_yaml(HardwareConfig, "configs/hardware/h100.yaml")
    off = replay.perturbed(h100, 0.05, seed=1)
    ratios = [getattr(off, name) / getattr(h100, name) for name in replay.SHARES]
    assert all(0.95 <= x <= 1.05 for x in ratios) and len(set(ratios)) == len(ratios)
    assert replay.perturbed(h100, 0.0, seed=1) == h100
