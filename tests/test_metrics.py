"""Metrics of requests, by hand."""

import json
import math

import numpy as np
import pytest

from experiments import metrics, results
from experiments.metrics import Served

SLO_S = 0.1


def served(
    token_s=(),
    *,
    prompt_tokens=1000,
    new_tokens=None,
    arrival_s=0.0,
    deadline_s=None,
    isolated_s=0.1,
    reason="length",
    id="a",
):
    times = np.array(token_s, float)
    new_tokens = max(1, times.size) if new_tokens is None else new_tokens
    return Served(id, prompt_tokens, new_tokens, arrival_s, deadline_s, isolated_s, times, reason, "chat")


def refused(**what):
    return served(reason="refused: prompt + max_new_tokens: too long", new_tokens=what.pop("new_tokens", 8), **what)


def of_all(requests, tbt_slo_s=SLO_S, span_s=10.0):
    return metrics.summary(requests, tbt_slo_s, span_s)["by length"]["all"]


# Latencies.


def test_latencies_of_one_request():
    found = of_all([served([10.5, 10.6, 10.9], arrival_s=10.0, isolated_s=0.25)])
    values = {name: found[name]["p50"] for name in metrics.LATENCIES}
    assert values == pytest.approx({"TTFT": 0.5, "TBT": 0.1, "TPOT": 0.2, "E2E": 0.9, "TTFT / isolated": 2.0})
    assert found["TBT"] == pytest.approx({"p50": 0.1, "p90": 0.3, "p99": 0.3, "max": 0.3, "mean": 0.2, "count": 2})


def test_percentiles_are_nearest_ranks():
    found = metrics.statistics(np.arange(200, 0, -1.0))
    assert found == {"p50": 100, "p90": 180, "p99": 198, "max": 200, "mean": 100.5, "count": 200}


def test_gaps_are_pooled_over_tokens():
    long, short = served(np.arange(99) * 0.1), served([0, 5.0])
    assert of_all([long, short])["TBT"]["count"] == 99 and of_all([long, short])["TBT"]["max"] == 5
    assert of_all([long, short])["TPOT"] == pytest.approx(
        {"p50": 0.1, "p90": 5, "p99": 5, "max": 5, "mean": 2.55, "count": 2}
    )


def test_what_never_came_is_infinite_and_not_dropped():
    found = metrics.summary(
        [served([1.0, 1.1]), refused(), served(reason="cancelled"), served(reason="unfinished")], 1, 2
    )
    everyone = found["by length"]["all"]
    assert everyone["TTFT"]["count"] == everyone["E2E"]["count"] == 4 and everyone["TBT"]["count"] == 1
    assert everyone["TTFT"]["p50"] == everyone["TTFT"]["p99"] == everyone["TTFT"]["mean"] == math.inf
    assert found["requests"] == {
        **{"offered": 4, "length": 1, "stop": 0, "refused": 1, "cancelled": 1, "unfinished": 1, "no first token": 3}
    }
    assert everyone["TTFT met"] == 0 and everyone["TBT met"] == 0.25


def test_an_answer_that_was_not_finished_has_no_end():
    found = of_all([served([1.0, 1.1], reason="cancelled"), served([1.0, 1.1], reason="stop")])
    assert found["TTFT"]["max"] == 1 and found["E2E"]["p50"] == 1.1 and found["E2E"]["p90"] == math.inf


def test_other_reasons_are_counted():
    found = metrics.summary([served(reason="error: a logit was not finite")], SLO_S, 1)["requests"]
    assert found["error"] == 1 and found["offered"] == 1


@pytest.mark.parametrize(
    "tokens, length",
    [
        *((1, "<=4K"), (4096, "<=4K"), (4097, "4K-32K"), (32_768, "4K-32K"), (32_769, "32K-128K")),
        *((131_072, "32K-128K"), (131_073, "128K-1M"), (1_048_576, "128K-1M"), (1_048_577, ">1M"), (10**7, ">1M")),
    ],
)
def test_classes_of_length(tokens, length):
    assert list(metrics.summary([served([1.0], prompt_tokens=tokens)], SLO_S, 1)["by length"]) == ["all", length]


# Service levels.


@pytest.mark.parametrize(
    "ttft_s, isolated_s, deadline_s, kept",
    [
        (0.5, 0.1, None, True),  # the floor
        (0.51, 0.1, None, False),
        (3.0, 2.0, None, True),  # 1.5 times isolated
        (3.01, 2.0, None, False),
        (3.0, 2.0, 2.9, False),  # its own deadline, stricter or looser
        (0.6, 0.1, 0.7, True),
    ],
)
def test_ttft_deadline(ttft_s, isolated_s, deadline_s, kept):
    request = served([7 + ttft_s], arrival_s=7.0, isolated_s=isolated_s, deadline_s=deadline_s)
    assert metrics.met(request, SLO_S) == (kept, True, kept)


def test_p99_of_the_gaps_of_a_request():
    """One late gap in a hundred is within it, one in 99 is not."""
    for gaps, kept in ((100, True), (99, False)):
        times = 0.2 + np.cumsum(np.full(gaps + 1, SLO_S))
        times[-1] += 1
        assert metrics.met(served(times), SLO_S) == (True, kept, kept)


def test_goodput_and_throughput():
    good, slow = served([0.4, 0.5, 0.6]), served([0.4, 1.5])
    cut, late = served([0.4, 0.5], reason="cancelled"), served([0.6], prompt_tokens=50)
    found = metrics.summary([good, slow, cut, late, refused()], SLO_S, 10)
    assert found["per second"] == pytest.approx(
        {"offered": 0.5, "requests": 0.3, "goodput": 0.1, "new tokens": 0.8, "prompt tokens": 305}
    )
    everyone = found["by length"]["all"]
    assert (everyone["TTFT met"], everyone["TBT met"], everyone["every SLO met"]) == pytest.approx((0.6, 0.6, 0.2))


# Fluidity.


@pytest.mark.parametrize(
    "token_s, on_time, late, passed",
    [
        ([0.5, 0.6, 0.7, 0.8], 4, 0, 0),  # each at its deadline
        ([0.1, 0.6, 0.7, 0.8], 4, 0, 0),  # slack of the first pays for a stall
        ([0.1, 0.9, 0.91, 1.1], 3, 1, 3),  # 0.6, 0.7 and 0.8 pass in a stall; then due at 1.0 and 1.1
        ([0.75, 0.8, 0.95, 1.05], 3, 1, 3),  # the first is late: the clock restarts, due at 0.85, 0.95, 1.05
        ([0.5, 1.0, 1.1, 1.25], 2, 2, 5),  # a deadline at which the late token comes does not pass
    ],
)
def test_token_deadlines(token_s, on_time, late, passed):
    request = served(np.array(token_s) + 3, arrival_s=3.0)
    assert metrics.deadlines(request, SLO_S) == (on_time, late, passed)
    found = of_all([request])
    assert found["fluidity index"] == on_time / (on_time + late)
    assert found["fluidity index, stalls in full"] == on_time / (on_time + passed)


def test_tokens_that_are_missing_are_late():
    assert metrics.deadlines(refused(new_tokens=8), SLO_S) == (0, 8, 8)
    assert metrics.deadlines(served([0.1, 0.2], new_tokens=5, reason="unfinished"), SLO_S) == (2, 3, 3)
    assert metrics.deadlines(served([0.1, 0.2], new_tokens=5, reason="stop"), SLO_S) == (2, 0, 0)
    assert metrics.deadlines(served([0.1, 0.2], new_tokens=5, reason="cancelled"), SLO_S) == (2, 0, 0)
    assert metrics.deadlines(served([], new_tokens=5, reason="cancelled"), SLO_S) == (0, 1, 1)


def test_fluidity_is_over_all_tokens():
    found = of_all([served([0.1, 0.2, 0.3]), refused(new_tokens=7)])
    assert found["fluidity index"] == pytest.approx(0.3)


# Fairness.


def test_fairness_is_over_classes():
    short = [served([0.1 * n], isolated_s=0.1) for n in (1, 1, 4)]
    long = [served([20.0], isolated_s=10.0, prompt_tokens=10**6)]
    found = metrics.summary(short + long, SLO_S, 10)
    assert found["by length"]["<=4K"]["TTFT / isolated"]["p50"] == pytest.approx(1)
    assert found["by length"]["128K-1M"]["TTFT / isolated"]["p99"] == pytest.approx(2)
    p50, p99 = 1.5**2 / (2 * 1.25), 0.75**2 / (2 * (1 / 16 + 1 / 4))  # shares of the isolated speed: 1, 1/2; 1/4, 1/2
    assert found["fairness"] == pytest.approx({"Jain of p50": p50, "Jain of p99": p99})


def test_a_starved_class_is_unfair():
    assert metrics.jain([1, 1, 1]) == 1 and metrics.jain([0, 2]) == 0.5 and math.isnan(metrics.jain([0, 0]))
    found = metrics.summary([served([0.1]), refused(prompt_tokens=2_000_000)], SLO_S, 1)
    assert found["fairness"]["Jain of p50"] == 0.5


# Rows and figures.


def test_rows_are_strict_json():
    found = metrics.summary([served([0.5, 0.61]), refused(prompt_tokens=10_000)], SLO_S, 3)
    rows = metrics.rows(found, policy="lars", qps=0.75)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert all(r["policy"] == "lars" and r["qps"] == 0.75 for r in rows)
    cells = {(r["name"], r.get("length")): r for r in rows}
    assert len(cells) == len(rows)
    assert cells["TTFT p50", "<=4K"] | {"value": 0.5, "unit": "s", "samples": 1} == cells["TTFT p50", "<=4K"]
    assert "value" not in cells["TTFT p99", "all"] and cells["TTFT p99", "all"]["absent"] == "inf: never came"
    assert cells["TBT max", "4K-32K"]["absent"] == "no sample" and cells["TBT max", "4K-32K"]["samples"] == 0
    assert cells["goodput per second", None]["value"] == 0 and cells["requests refused", None]["value"] == 1
    assert cells["requests per second", None]["value"] == 0.333333
    assert not results.check({"rows": [cells["TTFT p99", "all"] | {"must": "<= 1"}]})  # what is absent is missed


def test_an_empty_run_has_no_numbers():
    found = metrics.summary([], SLO_S, 3)
    assert found["requests"]["offered"] == 0 and found["per second"]["goodput"] == 0
    assert json.dumps(metrics.rows(found), allow_nan=False)


def curve(line):
    return [list(map(float, axis)) for axis in (line.get_xdata(), line.get_ydata())]


def test_cdf_figure(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {"lars": [served([0.2, 0.4, 0.5]), served([0.1]), refused(), refused()], "none came": [refused()], "": []}
    drawn = metrics.cdf_figure(runs, SLO_S)
    ttft, tbt = drawn.axes
    assert curve(ttft.lines[0]) == [[0.1, 0.2], [0.25, 0.5]]  # half never came
    assert curve(tbt.lines[0])[1] == [0.5, 1] and ttft.get_xscale() == "log"
    assert curve(ttft.lines[-1])[0] == [0.5] * 5 and curve(tbt.lines[-1])[0] == [SLO_S, SLO_S]
    drawn.savefig(tmp_path / "cdf.png")
    many = metrics.cdf_figure({"many": [served(np.arange(1, 50_000) ** 1.1)]}, SLO_S).axes[1].lines[0]
    x, y = curve(many)
    assert len(x) <= 2_000 and y[-1] == 1 and x[-1] == pytest.approx(np.diff(np.arange(1, 50_000) ** 1.1).max())


def test_load_figure(tmp_path):
    pytest.importorskip("matplotlib")
    fine, starved = metrics.summary([served([0.2])], SLO_S, 1), metrics.summary([refused()], SLO_S, 1)
    drawn = metrics.load_figure({"lars": {1.0: fine, 0.5: fine}, "fcfs": {0.5: fine, 1.0: starved}})
    goodput, ttft = drawn.axes
    assert [curve(line) for line in goodput.lines] == [[[0.5, 1], [1, 1]], [[0.5, 1], [1, 0]]]
    line, cross = ttft.lines[2:]
    assert curve(line)[1] == pytest.approx([0.2, math.nan], nan_ok=True)
    assert curve(cross)[1] == pytest.approx([math.nan, 0.97], nan_ok=True) and line.get_color() == cross.get_color()
    drawn.savefig(tmp_path / "load.png")
