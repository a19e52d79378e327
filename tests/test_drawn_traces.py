"""What is drawn from traces follows its seed and shares, and has the percentiles asked for."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.traces import (
    Arrival,
    LongLengths,
    describe,
    long_requests,
    mix,
    with_poisson_arrivals,
)
from mnemosyne_jax.errors import RequestError
from tests.test_traces import lengths, times_s

SHORT = [Arrival(str(n), n / 4, 100 + n, 10 + n % 7) for n in range(1000)]


def test_poisson_arrivals_are_drawn_from_the_trace():
    made = with_poisson_arrivals(SHORT, 5.0, 3, 4000.0)
    assert made == with_poisson_arrivals(SHORT, 5.0, 3, 4000.0) != with_poisson_arrivals(SHORT, 5.0, 4, 4000.0)
    gaps_s = np.diff([0.0, *times_s(made)])
    assert gaps_s.min() > 0 and made[-1].arrival_s < 4000
    assert gaps_s.mean() == pytest.approx(0.2, rel=0.03) and gaps_s.std() == pytest.approx(0.2, rel=0.05)
    by_id = {one.id: one for one in SHORT}
    for n, one in enumerate(made):
        count, _, drawn = one.id.partition(":")
        assert int(count) == n and replace(one, id=drawn, arrival_s=by_id[drawn].arrival_s) == by_id[drawn]
    assert len({one.id.partition(":")[2] for one in made}) > 990  # all of them, and again: 20,000 draws of 1,000


def test_no_arrivals_within_too_short_a_time():
    assert with_poisson_arrivals(SHORT, 1e-9, 0, 1.0) == []


def test_long_requests_have_the_percentiles_asked_for():
    made = long_requests(2.0, 0.05, 7, 200_000.0)
    assert len(made) == pytest.approx(20_000, rel=0.03)
    prompt, new = np.array(lengths(made)).T
    assert np.percentile(prompt, [50, 90]) == pytest.approx([393_000, 839_000], rel=0.03)
    assert np.percentile(new, [50, 90]) == pytest.approx([518, 808], rel=0.03)
    assert prompt.min() == 131_072 and prompt.max() <= 10_000_000 and new.min() >= 1
    assert abs(np.corrcoef(prompt, new)[0, 1]) < 0.03
    gaps_s = np.diff(times_s(made))
    assert gaps_s.mean() == pytest.approx(10, rel=0.03) and gaps_s.std() == pytest.approx(10, rel=0.05)
    assert {one.kind for one in made} == {"long"} and len({one.id for one in made}) == len(made)


def test_long_requests_follow_seed_and_lengths():
    own = LongLengths(2_000, 4_000, 10, 10, shortest_prompt_tokens=1_500, longest_prompt_tokens=5_000)
    made = long_requests(1.0, 0.5, 1, 2000.0, own)
    assert made == long_requests(1.0, 0.5, 1, 2000.0, own) != long_requests(1.0, 0.5, 2, 2000.0, own)
    prompt, new = zip(*lengths(made), strict=True)
    assert min(prompt) == 1_500 and max(prompt) == 5_000 and set(new) == {10}
    assert long_requests(1.0, 0.0, 1, 2000.0) == []


def test_one_seed_does_not_tie_long_arrivals_to_short_ones():
    short, long = with_poisson_arrivals(SHORT, 1.0, 5, 5000.0), long_requests(1.0, 1.0, 5, 5000.0)
    n = min(len(short), len(long))
    assert abs(np.corrcoef(np.diff(times_s(short)[:n]), np.diff(times_s(long)[:n]))[0, 1]) < 0.06


@pytest.mark.parametrize("share,count", [(0.0, 0), (0.05, 50), (0.0504, 50), (1.0, 1000)])
def test_mix_replaces_a_share_at_the_same_times(share, count):
    made = mix(SHORT, share, 11)
    assert made == mix(SHORT, share, 11)
    assert times_s(made) == times_s(SHORT)
    assert describe(made)["long_requests"] == count
    for one, before in zip(made, SHORT, strict=True):
        assert one == before or (one.id == f"long-{before.id}" and one.prompt_tokens >= 131_072 and one.kind == "long")


def test_mix_follows_its_seed_and_takes_lengths_alone():
    assert mix(SHORT, 0.05, 11) != mix(SHORT, 0.05, 12)
    assert mix([], 0.5, 0) == []
    untimed = [replace(one, arrival_s=math.nan) for one in SHORT]
    assert sum(math.isnan(one.arrival_s) and one.kind == "long" for one in mix(untimed, 0.05, 0)) == 50


@pytest.mark.parametrize(
    "asked,field",
    [
        (lambda: with_poisson_arrivals([], 1.0, 0, 1.0), "arrivals"),
        (lambda: with_poisson_arrivals(SHORT, 0.0, 0, 1.0), "queries_per_s"),
        (lambda: with_poisson_arrivals(SHORT, math.nan, 0, 1.0), "queries_per_s"),
        (lambda: with_poisson_arrivals(SHORT, 1.0, 0, math.inf), "duration_s"),
        (lambda: long_requests(-1.0, 0.5, 0, 1.0), "queries_per_s"),
        (lambda: long_requests(1.0, 1.5, 0, 1.0), "long_share"),
        (lambda: long_requests(1.0, 0.5, 0, 0.0), "duration_s"),
        (lambda: mix(SHORT, -0.1, 0), "long_share"),
        (lambda: mix(SHORT, math.nan, 0), "long_share"),
        (lambda: LongLengths(prompt_p50_tokens=900_000), "prompt_p50_tokens"),
        (lambda: LongLengths(shortest_prompt_tokens=0), "shortest_prompt_tokens"),
        (lambda: LongLengths(shortest_prompt_tokens=400_000), "shortest_prompt_tokens"),
        (lambda: LongLengths(longest_prompt_tokens=800_000), "prompt_p90_tokens"),
        (lambda: LongLengths(longest_prompt_tokens=2**31), "prompt_p90_tokens"),
        (lambda: LongLengths(new_p50_tokens=809), "new_p50_tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(asked, field):
    with pytest.raises(RequestError) as refused:
        asked()
    assert refused.value.field == field


def test_describe():
    made = [Arrival("a", 0.0, 10, 1), Arrival("b", 4.0, 30, 3, kind="long")]
    assert describe(made) == {
        "requests": 2,
        "long_requests": 1,
        "prompt_tokens_p50": 20,
        "prompt_tokens_p99": pytest.approx(29.8),
        "prompt_tokens_max": 30,
        "new_tokens_p50": 2,
        "new_tokens_p99": pytest.approx(2.98),
        "new_tokens_max": 3,
        "span_s": 4.0,
        "requests_per_s": 0.5,
    }
    assert describe(made[:1])["requests_per_s"] is None
    assert describe([])["prompt_tokens_p50"] is describe([])["span_s"] is None
