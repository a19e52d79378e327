"""A sweep at a small size: what each run gave is written at once, kept and drawn; hopeless loads end a variant."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments import load_measures, load_sweep
from experiments.load_sweep import LoadSweepConfig
from experiments.results import row

TRACE = "num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{50 + 131 * i % 3000},{1 + 7 * i % 20}\n" for i in range(40)
)


@pytest.fixture
def args(tmp_path):
    (tmp_path / "lengths.csv").write_text(TRACE)
    return [
        *("--config_path", "configs/load_sweep.yaml", "--replay.trace", str(tmp_path / "lengths.csv")),
        *("--replay.duration_s", "6", "--replay.drain_s", "10", "--only", "[lars,fcfs_exclusive]"),
        *("--replay.long_lengths.prompt_p50_tokens", "140000", "--replay.long_lengths.prompt_p90_tokens", "150000"),
        *("--out", str(tmp_path / "sweep.json"), "--plot", str(tmp_path / "sweep.png")),
    ]


def test_a_sweep_is_recorded_drawn_and_taken_up_again(args, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load_sweep, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    assert load_sweep.main([*args, "--queries_per_s", "[1.0,2.0]"]) == 0
    first = json.loads((tmp_path / "sweep.json").read_text())
    found = load_measures.table(first["rows"])
    assert {label: set(loads) for label, loads in found.items()} == {v: {1.0, 2.0} for v in ("lars", "fcfs_exclusive")}
    numbers = found["lars"][2.0]
    assert numbers["TTFT p50"] <= numbers["TTFT p99"] and 0 <= numbers["TTFT in time"] <= 1 and numbers["requests"] > 4
    names = {row["name"] for row in first["rows"]}
    assert {
        "sustained load",
        "TTFT p50 ratio",
        "TBT p99",
        "goodput",
        "ticks",
    } <= names and "TTFT p99 of trace" in numbers
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "sweep.png").unlink()
    assert load_sweep.main([*args, "--queries_per_s", "[1.0,2.0,0.5]"]) == 0  # runs what is new, keeps the rest
    second = json.loads((tmp_path / "sweep.json").read_text())
    kept = [r for r in first["rows"] if r["name"] == "replay"]
    assert all(r in second["rows"] for r in kept)  # wall times: not run again
    assert set(load_measures.table(second["rows"])["lars"]) == {0.5, 1.0, 2.0} and len(second["commands"]) == 2
    assert (tmp_path / "sweep.png").exists()

    before = (tmp_path / "sweep.json").read_bytes()
    assert load_sweep.main([*args, "--redraw"]) == 0 and (tmp_path / "sweep.json").read_bytes() == before
    assert load_sweep.main([*args, "--replay.seed", "7"]) == 2 and "replay" in capsys.readouterr().err
    assert load_sweep.main([*args, "--only", "[larz]"]) == 2 and "larz" in capsys.readouterr().err


def test_runs_have_processes_of_their_own(args, tmp_path):
    assert load_sweep.main([*args, "--queries_per_s", "[1.0]", "--only", "[lars]"]) == 0
    assert load_measures.table(json.loads((tmp_path / "sweep.json").read_text())["rows"])["lars"].keys() == {1.0}


def run_rows(variant, load, in_time, ttft_s=1.0, tbt_s=0.03):
    where = dict(variant=variant, queries_per_s=load)
    values = {"TTFT in time": in_time, "TTFT p50": ttft_s, "TTFT p99": 2 * ttft_s, "TBT p99": tbt_s}
    return [row(name, value, "1", **where) for name, value in values.items()]


def test_a_variant_ends_after_two_hopeless_loads():
    config = LoadSweepConfig(variants={"a": {}, "b": {}}, queries_per_s=(0.1, 0.2, 0.3, 0.4), baseline="b")
    rows = [*run_rows("a", 0.1, 0.95), *run_rows("a", 0.2, 0.4), *run_rows("b", 0.1, 0.4), *run_rows("b", 0.2, 0.49)]
    assert load_sweep.next_load(config, "a", rows) == 0.3 and not load_sweep.is_hopeless("a", 0.3, rows)
    assert load_sweep.next_load(config, "b", rows) == 0.3 and load_sweep.is_hopeless("b", 0.3, rows)
    (said,) = (r for r in load_sweep.conclusions(config, rows) if "hopeless" in r["name"])
    assert (said["variant"], said["value"]) == ("b", 0.3)


def test_sustained_needs_both_bounds_and_ratios_are_against_the_baseline():
    config = LoadSweepConfig(
        variants={"a": {}, "b": {}}, queries_per_s=(0.1, 0.6), baseline="b", aims_at=0.1,
        aims={"TTFT p50 ratio": ">= 30", "sustained load ratio": ">= 5.7"},
    )  # fmt: skip
    rows = [
        *run_rows("a", 0.1, 1.0, ttft_s=0.1), *run_rows("a", 0.6, 0.9), *run_rows("a", 0.7, 0.99, tbt_s=0.031),
        *run_rows("b", 0.1, 0.9, ttft_s=4.0), *run_rows("b", 0.6, 0.89),
    ]  # fmt: skip
    made = {(r["name"], r["variant"], r.get("queries_per_s")): r for r in load_sweep.conclusions(config, rows)}
    assert made["sustained load", "a", None]["value"] == 0.6 and made["sustained load", "b", None]["value"] == 0.1
    assert made["sustained load ratio", "a", None]["value"] == 6 and made["sustained load ratio", "a", None]["aim"]
    assert made["TTFT p50 ratio", "a", 0.1]["value"] == 40 and made["TTFT p50 ratio", "a", 0.1]["aim"] == ">= 30"
    assert "aim" not in made["TTFT p50 ratio", "a", 0.6]


def test_what_never_came_is_infinite():
    rows = [row("TTFT p99", None, "s", variant="a", queries_per_s=1.0, part="all", absent="inf: never came")]
    assert load_measures.table(rows) == {"a": {1.0: {"TTFT p99": float("inf")}}}
    assert load_measures.figure(load_measures.table(run_rows("a", 1.0, 0.5)), 0.03).axes
