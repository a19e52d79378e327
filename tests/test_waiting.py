"""Who is admitted next: the order of every policy against sorting by its key, and who lets others pass."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne_jax.serve.policy import DEMOTED, PrefillTimes, estimate, priority, relative_slack
from mnemosyne_jax.serve.request import Request, Sequence, Timeline
from mnemosyne_jax.serve.waiting import FEW, WaitingQueue

LINEAR = PrefillTimes([0, 10_000_000], [0.0, 1000.0])
PROMPT = np.zeros(10_000_000, np.int32)
few = st.integers(0, 3).map(float)  # so that many are equal
asked = st.tuples(st.integers(1, 10_000_000) | few.map(lambda x: 1 + int(x)), st.floats(0, 100) | few)
requests = st.lists(asked, min_size=1, max_size=8) | st.lists(asked, min_size=FEW + 1, max_size=3 * FEW)


def filled(policy, asked, demote_late=False):
    queue, sequences = WaitingQueue(policy, demote_late), []
    for i, (tokens, arrival_s) in enumerate(asked):
        sequences.append(Sequence(Request(i, PROMPT[:tokens], arrival_s=arrival_s), Timeline(arrival_s)))
        estimate(sequences[-1], LINEAR)
        queue.append(sequences[-1])
    return queue, sequences


@pytest.mark.parametrize("policy", ["fcfs", "fcfs_exclusive", "edf", "srpt", "lars"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(requests, st.floats(0, 3000), st.booleans(), st.data())
def test_order_is_that_of_the_policy(policy, asked, now_s, demote_late, data):
    queue, sequences = filled(policy, asked, demote_late)
    for sequence in data.draw(st.lists(st.sampled_from(sequences), unique=True, max_size=len(sequences) - 1)):
        queue.remove(sequence)
        sequences.remove(sequence)
    found = list(queue.in_order(now_s))
    assert len(queue) == len(found) == len(sequences)
    assert queue.tokens == sum(len(sequence.request.prompt) for sequence in sequences)
    key = lambda sequence: priority(policy, sequence, now_s, demote_late)  # noqa: E731
    in_order = sorted(sequences, key=key)  # ties as they came
    assert [id(s) for s in found] == [id(s) for s in in_order]
    for sequence in found:
        late, behind = relative_slack(sequence, now_s) <= 0, key(sequence) >= DEMOTED / 2
        assert queue.lets_pass(sequence, now_s) == (behind or not late and not policy.startswith("fcfs"))


@pytest.mark.parametrize("times", [1, FEW])
@pytest.mark.parametrize("policy", ["fcfs", "edf", "srpt", "lars"])
def test_order_holds_while_the_first_are_taken_out(policy, times):
    queue, sequences = filled(policy, [(100, 3.0), (5, 1.0), (100, 2.0), (7, 0.0)] * times)
    expected = list(queue.in_order(1.0))
    found = []
    for sequence in queue.in_order(1.0):
        queue.remove(sequence)  # as it is admitted
        found.append(sequence)
    assert found == expected and len(found) == len(sequences) and not queue.tokens


def test_those_with_all_the_time_there_is_come_last_as_they_stand():
    """Even the slack of so late a deadline in units of a small prompt's work is more than a float holds."""
    queue, sequences = filled("lars", [(5, 0.0)] * 4)
    for i in (0, 2):
        queue.remove(sequences[i])
        sequences[i].due_s = 1.7e308
        queue.append(sequences[i])
    with np.errstate(over="ignore"):
        assert list(queue.in_order(1.0)) == [sequences[i] for i in (1, 3, 0, 2)]


def test_without_a_policy_the_queue_is_a_queue():
    queue, sequences = filled(None, [(5, 3.0), (9_000_000, 1.0), (1, 2.0)])
    assert list(queue.in_order(1e9)) == sequences
    assert not any(queue.lets_pass(s, -1e9) for s in sequences)
