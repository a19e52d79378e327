"""The trace is what ui.perfetto.dev reads: it parses, names everything, and slices of a thread follow each other."""

import gzip
import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import perfetto
from experiments.perfetto import TickSpan

NAMED = {"process": ("process_name", "process_sort_index"), "thread": ("thread_name", "thread_sort_index")}


def span(tick=0, group=0, stage=0, begin_s=0.0, end_s=0.01, rows=(), predicted_s=None, budget_s=None, waiting=0):
    return TickSpan(tick, group, stage, begin_s, end_s, tuple(rows), predicted_s, budget_s, waiting)


def read(path):
    return json.loads((gzip.open if path.suffix == ".gz" else open)(path, "rt").read())["traceEvents"]


def slices(found):
    return [e for e in found if e["ph"] == "X"]


def the_slice(**what):
    (one,) = slices(perfetto.events([span(**what)]))
    return one


def check(found):
    """What holds for every trace: known phases, names before use, and slices of a thread in order, apart."""
    named, ends = defaultdict(set), {}
    for e in found:
        assert e["ph"] in "MXC" and e["name"]
        if e["ph"] == "M":
            named[e["name"], e["pid"], e.get("tid")].add(json.dumps(e["args"]))
            continue
        assert e["ts"] >= 0
        assert all(len(named[name, e["pid"], None]) == 1 for name in NAMED["process"])
        if e["ph"] == "C":
            assert e["args"] and all(isinstance(value, int | float) for value in e["args"].values())
            continue
        assert all(len(named[name, e["pid"], e["tid"]]) == 1 for name in NAMED["thread"])
        begin_ns, dur_ns = round(1000 * e["ts"]), round(1000 * e["dur"])  # as Perfetto reads them
        assert begin_ns >= ends.get((e["pid"], e["tid"]), 0) and dur_ns >= 0
        ends[e["pid"], e["tid"]] = begin_ns + dur_ns


def test_a_trace_of_two_groups_and_two_stages(tmp_path):
    rows = [("chunk", "long", 8192, 4096), ("decode", "a", 70, 1), ("decode", "b", 9, 1)]
    limits = dict(predicted_s=0.018, budget_s=0.02, waiting=3)
    ticks = [
        span(7, g, s, 0.5, 0.51 + 0.01 * (g + s), rows if s == 0 else (), **limits) for g in (0, 1) for s in (0, 1)
    ]
    found = read(perfetto.trace(ticks, tmp_path / "deep" / "trace.json"))
    check(found)
    names = {(e["pid"], e.get("tid"), e["args"]["name"]) for e in found if e["name"] in ("process_name", "thread_name")}
    assert {(pid, name) for pid, tid, name in names if tid is None} == {(1, "engine"), (2, "group 0"), (3, "group 1")}
    assert {(tid, name) for _, tid, name in names if tid} == {
        *((2000, "stage 0"), (2001, "stage 1")),
        *((3000, "stage 0"), (3001, "stage 1")),
    }
    first, idle, *_ = slices(found)
    assert first["name"].startswith("chunk long [8192..12288) + 2 decodes (") and first["cname"] in perfetto.COLOURS
    assert first["args"] == {
        **{"tick": 7, "tokens": 4098, "requests": ["long", "a", "b"]},
        **{"predicted_ms": pytest.approx(18), "budget_ms": pytest.approx(20)},
    }
    assert (first["ts"], first["dur"], idle["dur"]) == (500_000, 10_000, 20_000)
    assert (idle["name"], idle["cname"], idle["args"]["requests"]) == ("idle", perfetto.IDLE, [])
    requests, tick = [e for e in found if e["ph"] == "C"]
    assert requests["ts"] == tick["ts"] == 500_000 and requests["args"] == {"waiting": 3}
    assert tick["args"] == {
        name: pytest.approx(ms) for name, ms in dict(took_ms=30, predicted_ms=18, budget_ms=20).items()
    }


def test_names_say_what_ran():
    decodes = [("decode", f"req{n}", 100 * n, 1) for n in range(12)]
    assert the_slice(rows=decodes)["name"] == "12 decodes"
    assert the_slice(rows=decodes[3:4])["name"].startswith("decode req3 [300..301) (")
    assert the_slice(rows=[("chunk", "x", 0, 5), ("chunk", "y", 5, 5)])["name"].startswith(
        "chunk x [0..5) + chunk y [5..10) + 0 decodes ("
    )


def test_colours_follow_requests():
    """In chrome://tracing by `cname`, in ui.perfetto.dev by the name without digits: the same in every run and tick."""

    def words(event):
        return "".join(c for c in event["name"] if not c.isdigit())

    early = [the_slice(rows=[("chunk", f"req{n}", 0, 512)]) for n in range(200)]
    late = [the_slice(rows=[("chunk", f"req{n}", 512, 9), ("decode", "other", 3, 1)]) for n in range(200)]
    assert [(e["cname"], words(e)) for e in early] == [(e["cname"], words(e)) for e in late]
    assert {e["cname"] for e in early} == set(perfetto.COLOURS) and len({words(e) for e in early}) > 100
    assert early[17]["name"] == "chunk req17 [0..512) + 0 decodes (xp)"  # a hash of the id, not Python's own


def test_limits_that_are_absent_or_infinite_stay_out():
    assert the_slice(budget_s=float("inf"))["args"] == {"tick": 0, "tokens": 0, "requests": []}


@pytest.mark.parametrize(
    "ticks",
    [
        [span(begin_s=0.0, end_s=0.02), span(1, begin_s=0.01, end_s=0.03)],
        [span(begin_s=0.5, end_s=0.6), span(1, begin_s=0.1, end_s=0.2)],
        [span(begin_s=0.2, end_s=0.1)],
        [span(begin_s=-1.0)],
        [span(end_s=float("nan"))],
    ],
    ids=["overlap", "out of order", "ends before it begins", "negative", "NaN"],
)
def test_impossible_times_are_refused_and_leave_no_trace(ticks, tmp_path):
    with pytest.raises(ValueError):
        perfetto.trace(ticks, tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()


def test_an_overlap_of_rounding_is_cut():
    found = list(perfetto.events([span(end_s=0.1 + 0.2), span(1, begin_s=0.3 - 1e-7, end_s=0.3 - 5e-8)]))
    check(found)
    assert slices(found)[1]["dur"] == 0


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_long_trace_streams(name, tmp_path):
    """Most of it is written when the last span is asked for."""
    written = []

    def ticks():
        for tick in range(2_500):
            rows = [("chunk", f"req{tick % 50}", tick, 128), *(("decode", f"other{n}", tick, 1) for n in range(4))]
            for group, stage in ((0, 0), (0, 1), (1, 0), (1, 1)):
                yield span(tick, group, stage, 0.01 * tick, 0.01 * (tick + 1), rows, 0.009, 0.01)
        written.append((tmp_path / f"{name}.part").stat().st_size)

    path = perfetto.trace(ticks(), tmp_path / name)
    assert written[0] > 0.5 * path.stat().st_size
    found = read(path)
    check(found)
    assert len(slices(found)) == 10_000


ROWS = st.tuples(
    st.sampled_from(["chunk", "decode", "restore"]), st.text(max_size=8), st.integers(0, 10**7), st.integers(1, 8192)
)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.lists(ROWS, max_size=4), st.integers(0, 9)), max_size=12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.floats(0, 1e6),
)
def test_every_trace_holds_together(tmp_path_factory, work, groups, stages, start_s):
    ticks, now_s = [], start_s
    for tick, (took_s, rows, waiting) in enumerate(work):
        ends_s = now_s + took_s
        ticks += [
            span(tick, g, s, now_s, ends_s, rows, took_s, None, waiting) for g in range(groups) for s in range(stages)
        ]
        now_s = ends_s
    found = read(perfetto.trace(ticks, tmp_path_factory.mktemp("trace") / "trace.json"))
    check(found)
    assert len(slices(found)) == len(ticks)
    assert [e["args"]["tokens"] for e in slices(found)] == [sum(row[3] for row in t.rows) for t in ticks]
