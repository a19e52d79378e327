"""Orders, slack and chunk sizes, against brute force and against what each policy is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, from_yaml
from mnemosyne_jax.serve.chunking import STEP, largest_fitting
from mnemosyne_jax.serve.cost import CostModel
from mnemosyne_jax.serve.policy import (
    DEMOTED_DEADLINES,
    LEAST_DEADLINE_S,
    PrefillTimes,
    estimate,
    prefill_times,
    priority,
    relative_slack,
)
from mnemosyne_jax.serve.request import Request, Sequence, Timeline

COST = CostModel(
    from_yaml(ModelConfig, "configs/model/llama-3-8b.yaml"), from_yaml(HardwareConfig, "configs/hardware/h100.yaml"),
    MeshSpec(tp=8),
)  # fmt: skip
LINEAR = PrefillTimes([0, 10_000_000], [0.0, 1000.0])  # 0.1 ms a token


def sequence(tokens, arrival_s=0.0, done=0, deadline_s=None):
    request = Request("r", np.zeros(tokens, np.int32), arrival_s=arrival_s, deadline_s=deadline_s)
    made = Sequence(request, Timeline(arrival_s), prompt_scheduled=done)
    estimate(made, LINEAR)
    return made


def tick_s(done, chunk):
    return COST.program_s(chunk) + COST.chunk_s(chunk, done)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 10_000_000), st.integers(1, 20_000), st.integers(0, 8192), st.floats(1e-4, 1.0))
def test_largest_fitting_is_brute_force(done, left, most, budget_s):
    fits = lambda chunk: tick_s(done, chunk) <= budget_s  # noqa: E731
    sizes = [size for size in range(STEP, min(left, most) + 1, STEP) if fits(size)]
    sizes += [left] if left <= most and fits(left) else []
    assert largest_fitting(left, most, fits) == max(sizes, default=0)


def test_table_is_the_sum_of_the_chunks():
    """Within a percent of running every chunk, at lengths that are not those of the table."""
    chunk_of = lambda done: max(STEP, largest_fitting(8192, 8192, lambda c: tick_s(done, c) <= 0.02))  # noqa: E731
    times = prefill_times(chunk_of, tick_s, 2_000_000)
    assert len(times.lengths) < 2_000 and times.lengths[-1] >= 2_000_000 and (np.diff(times.seconds) > 0).all()
    done, took_s, checked = 0, 0.0, iter((50_000, 333_333, 1_500_000))
    wanted = next(checked)
    while wanted:
        chunk = chunk_of(done)
        done, took_s = done + chunk, took_s + tick_s(done, chunk)
        if done >= wanted:
            assert times.alone_s(done) == pytest.approx(took_s, rel=0.01)
            wanted = next(checked, None)
    lengths = [0, 1, 31, 33, 999_999, times.lengths[-1]]
    assert [times.alone_s(n) for n in lengths] == pytest.approx(np.interp(lengths, times.lengths, times.seconds))


def test_table_of_no_prompt_at_all():
    """As `plan` asks for one where nothing is said of a context."""
    assert prefill_times(lambda done: STEP, tick_s, 0).alone_s(0) == 0


def test_estimates_of_a_request():
    facts = lambda s: (s.due_s, s.left_s, s.work_s)  # noqa: E731
    assert facts(sequence(1_000_000, arrival_s=7.0)) == pytest.approx((7 + 150, 100, 100))
    assert facts(sequence(1_000_000, done=400_000)) == pytest.approx((150, 60, 100))
    assert sequence(10, arrival_s=7.0).due_s == 7 + LEAST_DEADLINE_S
    assert sequence(10, arrival_s=7.0, deadline_s=3.0).due_s == 10


def test_late_requests_are_demoted_for_a_time():
    """Behind all that are on time, in any policy; past ten times the deadline they have their turn again."""
    late, fresh = sequence(1_000_000), sequence(1_000_000, arrival_s=60.0)  # 100 s of work, due after 150
    for policy in ("lars", "edf", "srpt", "fcfs"):
        first = lambda now_s, **how: min((late, fresh), key=lambda s: priority(policy, s, now_s, **how))  # noqa: B023, E731
        assert first(60.0) is late and first(60.0, demote_late=True) is fresh
        assert first(49.0, demote_late=True) is late
        forgiven_s = DEMOTED_DEADLINES * 150.0 + 0.1
        assert priority(policy, late, forgiven_s, True) == priority(policy, late, forgiven_s)


def test_short_requests_are_never_demoted():
    """They are those whose work alone is at most the least deadline, whatever deadline was asked for."""
    for tokens, deadline_s, standing_back in ((5_000, None, False), (5_001, None, True), (1_000, 0.01, False)):
        late = sequence(tokens, deadline_s=deadline_s)
        for now_s in (0.0, 0.7, 1.0):
            behind = priority("lars", late, now_s, True) != priority("lars", late, now_s)
            assert behind == (standing_back and now_s + late.left_s > late.due_s)
    shorts = [sequence(1_000, arrival_s=at) for at in (0.0, 2.0, 2.4)]
    assert sorted(shorts, key=lambda s: priority("lars", s, 2.5, True)) == shorts  # the latest first


def test_lars_lets_a_short_one_pass_and_finishes_what_is_late():
    long, short = sequence(1_000_000), sequence(1_000, arrival_s=10.0)
    assert relative_slack(long, 10.0) == pytest.approx(0.4)  # 150 s due, 10 gone, 100 to do, in units of 100
    order = lambda now_s: priority("lars", long, now_s) < priority("lars", short, now_s)  # noqa: E731
    assert order(10.0)  # a fresh short request has time: half a second for a tenth
    assert not order(10.45)  # soon it has not
    assert priority("lars", long, 50.0) > priority("lars", sequence(1_000_000, done=10), 50.0) - 1e-3


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 10_000_000), st.integers(1, 10_000_000), st.floats(0, 1e4))
def test_lars_starves_nobody(waiting, fresh, behind_s):
    """Whatever it is, a request that has waited long enough goes before any that arrives then."""
    old = sequence(waiting)
    now_s = 2.5 * LINEAR.alone_s(waiting) + LEAST_DEADLINE_S + behind_s
    assert relative_slack(old, now_s) < 0 < relative_slack(sequence(fresh, arrival_s=now_s), now_s)


def test_other_policies():
    early, late = sequence(5_000, arrival_s=1.0), sequence(100, arrival_s=2.0)
    for policy, first in (("fcfs", early), ("fcfs_exclusive", early), ("srpt", late), ("edf", early)):
        assert min((early, late), key=lambda s: priority(policy, s, 2.0)) is first
    assert priority("srpt", sequence(5_000, done=4_990), 2.0) < priority("srpt", late, 2.0)
    urgent = sequence(100, arrival_s=2.0, deadline_s=0.1)
    assert priority("edf", urgent, 2.0) > priority("edf", early, 2.0)
    with pytest.raises(ValueError, match="no such policy"):
        priority("lifo", early, 0.0)
