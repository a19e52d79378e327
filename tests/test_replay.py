"""A replay end to end at a small size: every request accounted for, the same numbers for the same seed."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import command_line, replay
from experiments.replay import ReplayConfig
from mnemosyne_jax.config import HardwareConfig, from_yaml
from mnemosyne_jax.errors import RequestError

TRACE = "num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{50 + 131 * i % 3000},{1 + 7 * i % 40}\n" for i in range(40)
)


@pytest.fixture
def args(tmp_path):
    (tmp_path / "lengths.csv").write_text(TRACE)
    return [
        *("--config_path", "configs/replay.yaml", "--trace", str(tmp_path / "lengths.csv"), "--duration_s", "20"),
        *("--queries_per_s", "2", "--long_share", "0.1", "--out", str(tmp_path / "replay.json")),
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
