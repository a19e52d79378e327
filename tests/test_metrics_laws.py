"""What holds for the metrics of any requests."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import metrics
from experiments.metrics import Served
from tests.test_metrics import of_all, served

TIMES = st.floats(0.001, 100).map(lambda x: round(x, 3))


@st.composite
def happened(draw):
    """A request of any reason, its tokens at any times after its arrival."""
    arrival_s, reason = (
        draw(TIMES),
        draw(st.sampled_from([*metrics.REASONS[:2], "refused: full", *metrics.REASONS[3:]])),
    )
    least = 1 if reason in ("length", "stop") else 0
    after_s = sorted(draw(st.lists(TIMES, min_size=least, max_size=0 if reason.startswith("refused") else 8)))
    return served(
        arrival_s + np.array(after_s),
        prompt_tokens=draw(st.integers(1, 3_000_000)),
        new_tokens=len(after_s) + draw(st.integers(0, 5)),
        arrival_s=arrival_s,
        deadline_s=draw(st.none() | TIMES),
        isolated_s=draw(TIMES),
        reason=reason,
    )


RUNS = st.lists(happened(), min_size=1, max_size=8)
SHARES = ("TTFT met", "TBT met", "every SLO met", "fluidity index", "fluidity index, stalls in full")
law = settings(deadline=None, max_examples=60, derandomize=True)


@law
@given(RUNS, TIMES)
def test_numbers_are_in_their_bounds(requests, slo_s):
    found = metrics.summary(requests, slo_s, 5.0)
    assert found["per second"]["goodput"] <= found["per second"]["requests"] <= found["per second"]["offered"]
    groups = found["by length"]
    for name in metrics.LATENCIES:
        assert sum(groups[g][name]["count"] for g in groups if g != "all") == groups["all"][name]["count"]
        for numbers in groups.values():
            order = [numbers[name][q] for q in ("p50", "p90", "p99", "max")]
            assert order == sorted(order) or all(map(math.isnan, order))
    for numbers in groups.values():
        assert all(0 <= numbers[name] <= 1 for name in SHARES)
        assert numbers["fluidity index, stalls in full"] <= numbers["fluidity index"]
        assert numbers["every SLO met"] <= min(numbers["TTFT met"], numbers["TBT met"])
    for index in found["fairness"].values():
        assert math.isnan(index) or 1 / (len(groups) - 1) - 1e-9 <= index <= 1 + 1e-9
    assert json.dumps(metrics.rows(found), allow_nan=False)


@law
@given(RUNS, TIMES, TIMES)
def test_a_looser_slo_is_met_more(requests, slo_s, more_s):
    strict, loose = of_all(requests, slo_s), of_all(requests, slo_s + more_s)
    assert all(strict[name] <= loose[name] for name in SHARES)


@law
@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=30), TIMES, TIMES)
def test_tokens_on_time_are_fluid(early_s, slo_s, arrival_s):
    due_s = 0.5 + slo_s * np.arange(len(early_s))
    request = served(arrival_s + np.sort(due_s - early_s), arrival_s=arrival_s)
    assert of_all([request], slo_s)["fluidity index"] == of_all([request], slo_s)["fluidity index, stalls in full"] == 1


@law
@given(happened(), TIMES)
def test_token_deadlines_step_by_step(request_, slo_s):
    """The definition as a loop."""
    due_s, on_time, late, passed = request_.arrival_s + request_.ttft_deadline_s, 0, 0, 0
    for now_s in request_.token_s:
        if now_s <= due_s + 1e-6:
            on_time += 1
        else:
            late += 1
            while due_s + 1e-6 < now_s:
                passed, due_s = passed + 1, due_s + slo_s
            due_s = now_s
        due_s += slo_s
    missing = metrics.deadlines(request_, slo_s)[1] - late
    assert metrics.deadlines(request_, slo_s) == (on_time, late + missing, passed + missing)
    assert missing == 0 or request_.reason not in ("length", "stop")


@law
@given(RUNS, TIMES)
def test_when_the_clock_began_does_not_matter(requests, later_s):
    def moved(r):
        times = r.token_s + later_s
        return Served(
            r.id,
            r.prompt_tokens,
            r.new_tokens,
            r.arrival_s + later_s,
            r.deadline_s,
            r.isolated_ttft_s,
            times,
            r.reason,
            r.kind,
        )

    before, after = of_all(requests), of_all([moved(r) for r in requests])
    for name in metrics.LATENCIES:
        assert after[name] == pytest.approx(before[name], nan_ok=True, abs=1e-9)
    assert [after[name] for name in SHARES] == [before[name] for name in SHARES]
