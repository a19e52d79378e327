"""Refusals name field, value and limit; whatever else is put into a Request, it is accepted as meant or refused.

The long run: MNEMOSYNE_REQUESTS=10000 pytest tests/test_request.py
"""

import math
import os
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.serve.request import MAX_POSITION, Request, Sequence, Timeline, checked
from tests.world import World

REQUESTS = int(os.environ.get("MNEMOSYNE_REQUESTS", 1000))
VOCAB, LONGEST, NOW = 100, 64, 10.0
GOOD = {"id": "a", "prompt": [1, 2, 3]}


def check(**fields):
    return checked(Request(**(GOOD | fields)), VOCAB, LONGEST, NOW)


def refusal(**fields):
    with pytest.raises(RequestError) as refused:
        check(**fields)
    return refused.value


REFUSED = [
    # field of the request, what is asked, field named, value named, part of the limit
    ("prompt", [], "prompt", "empty", "at least one token"),
    ("prompt", np.zeros(0, np.int64), "prompt", "empty", "at least one token"),
    ("prompt", [5, -1], "prompt", -1, "[0, 100)"),
    ("prompt", [5, 100], "prompt", 100, "[0, 100)"),
    ("prompt", np.array([2**64 - 1], np.uint64), "prompt", 2**64 - 1, "[0, 100)"),
    ("prompt", [1.0, 2.0], "prompt", [1.0, 2.0], "integers"),
    ("prompt", [[1, 2]], "prompt", [[1, 2]], "flat list"),
    ("prompt", [[1], [2, 3]], "prompt", [[1], [2, 3]], "flat list"),
    ("prompt", "text", "prompt", "text", "integers"),
    ("prompt", [True, False], "prompt", [True, False], "integers"),
    ("prompt", [10**30], "prompt", [10**30], "below 2**63"),
    ("prompt", None, "prompt", None, "integers"),
    ("prompt", 7, "prompt", 7, "flat list"),
    ("stop_ids", (3, 100), "stop_ids", 100, "[0, 100)"),
    ("stop_ids", (-2,), "stop_ids", -2, "[0, 100)"),
    ("stop_ids", 3, "stop_ids", 3, "flat list"),
    ("max_new_tokens", 0, "max_new_tokens", 0, "at least 1"),
    ("max_new_tokens", -5, "max_new_tokens", -5, "at least 1"),
    ("max_new_tokens", 2.0, "max_new_tokens", 2.0, "integer"),
    ("max_new_tokens", True, "max_new_tokens", True, "integer"),
    (
        "max_new_tokens",
        63,
        "prompt + max_new_tokens",
        66,
        "65 tokens in all: with 63 new tokens, a prompt of at most 2",
    ),
    ("max_new_tokens", 500, "prompt + max_new_tokens", 503, "at most 64 new tokens after a prompt of one"),
    ("max_new_tokens", np.uint64(2**64 - 1), "prompt + max_new_tokens", 2**64 + 2, "65 tokens in all"),
    ("temperature", -0.1, "temperature", -0.1, "0 (greedy) or more"),
    ("temperature", math.inf, "temperature", math.inf, "finite"),
    ("temperature", 1e39, "temperature", 1e39, "float32"),
    ("temperature", 10**400, "temperature", 10**400, "finite"),
    ("temperature", "hot", "temperature", "hot", "finite"),
    ("top_p", 0.0, "top_p", 0.0, "(0, 1]"),
    ("top_p", 1.5, "top_p", 1.5, "(0, 1]"),
    ("top_p", True, "top_p", True, "(0, 1]"),
    ("seed", -1, "seed", -1, "2**32"),
    ("seed", 2**32, "seed", 2**32, "2**32"),
    ("arrival_s", math.inf, "arrival_s", math.inf, "finite"),
    ("deadline_s", 0, "deadline_s", 0, "positive"),
    ("deadline_s", -1.0, "deadline_s", -1.0, "positive"),
    ("first_position", -1, "first_position", -1, "below 2**31"),
    ("first_position", MAX_POSITION, "first_position", MAX_POSITION, "below 2**31"),
    ("read_positions", (0, 3), "positions", (0, 3), "[0, 3)"),
    ("read_positions", (-1,), "positions", (-1,), "[0, 3)"),
    ("read_positions", [[0, 1]], "positions", [[0, 1]], "flat list"),
    ("read_positions", [[0], [1, 2]], "positions", [[0], [1, 2]], "flat list"),
    ("read_positions", 1, "positions", 1, "flat list"),
    ("id", 7.5, "id", 7.5, "string"),
    ("id", ["a"], "id", ["a"], "string"),
]


@pytest.mark.parametrize("asked, value, field, named, limit", REFUSED)
def test_refusals_name_field_value_and_limit(asked, value, field, named, limit):
    error = refusal(**{asked: value})
    assert isinstance(error, ValueError)
    assert error.field == field and (error.value is named or error.value == named) and limit in error.limit
    assert str(error).startswith(f"{field}: got ") and error.limit in str(error) and len(str(error)) < 300
    again = pickle.loads(pickle.dumps(error))
    assert (again.field, again.limit, str(again)) == (field, error.limit, str(error))


@pytest.mark.parametrize("field", ["temperature", "top_p", "arrival_s", "deadline_s"])
def test_nan_is_refused(field):
    assert refusal(**{field: math.nan}).field == field


def test_a_deadline_in_the_past_is_refused():
    assert "has passed: it is 6.000 s since arrival" in refusal(arrival_s=4.0, deadline_s=5.0).limit
    assert check(arrival_s=4.0, deadline_s=6.5).deadline_s == 6.5


def test_what_is_accepted_is_normal():
    """Every default filled in, plain Python numbers, the prompt a copy as int32; small numpy types do not overflow."""
    prompt = np.arange(40, dtype=np.uint8)
    request = check(prompt=prompt, max_new_tokens=np.int8(25), temperature=np.float16(0.5), seed=np.uint32(2**32 - 1))
    prompt[:] = 99
    assert request.prompt.dtype == np.int32 and request.prompt.tolist() == list(range(40))
    assert request.max_new_tokens == 25 and type(request.max_new_tokens) is int and request.total_tokens == LONGEST
    assert (request.arrival_s, request.temperature, request.seed, request.stop_ids) == (NOW, 0.5, 2**32 - 1, ())
    small = check(prompt=[1] * 40, max_new_tokens=np.int8(20), arrival_s=np.int8(100), deadline_s=np.int8(100))
    assert small.total_tokens == 59 and small.deadline_s == 100.0
    assert check(read_positions=(2, 0, 2)).read_positions == (0, 2)  # sorted, each once: chunks look theirs up
    own = checked(Request("a", [1]), VOCAB, LONGEST, NOW, stop_ids=(7,))
    assert own.stop_ids == (7,) and checked(Request("a", [1], stop_ids=()), VOCAB, LONGEST, NOW, (7,)).stop_ids == ()


def test_sampling_parameters_survive_float32():
    """Devices see float32: what would round to zero or divide to infinity there takes the meaning it tends to."""
    assert check(temperature=1e-30).temperature == 0.0
    assert np.float32(check(top_p=1e-60).top_p) > 0 and check(top_p=0.3).top_p == 0.3
    assert np.isfinite(np.float32(check(temperature=3.4e38).temperature))


INTEGERS = st.integers(-3, 110) | st.sampled_from(
    [2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**30, 10**400]
)
NUMPY = st.sampled_from(
    [np.uint64(2**64 - 1), np.int8(127), np.int8(-128), np.uint8(255), np.int64(2), np.bool_(True), np.float16(1.0)]
    + [np.float32("nan"), np.float64("inf"), np.longdouble("1e4000"), np.float32(3e38), np.array(3), np.array([2.5])]
)
ODD = st.one_of(
    INTEGERS,
    NUMPY,
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.just(object()),
    st.just({1: 2}),
    st.just({3, 4}),
    st.builds(iter, st.just((1, 2))),
)
NESTED = st.recursive(ODD, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
ARRAYS = st.builds(
    lambda values, dtype, shape: np.array(values).astype(dtype).reshape(shape),
    st.lists(st.integers(0, 110), min_size=4, max_size=4),
    st.sampled_from([np.int8, np.uint16, np.int32, np.int64, np.uint64, np.float32, np.bool_, object, "U3"]),
    st.sampled_from([(4,), (2, 2), (4, 1), (1, 4, 1)]),
)
IDS = st.lists(st.integers(0, 99), max_size=70) | st.lists(INTEGERS, max_size=4) | ARRAYS | NESTED
FUZZED = {
    "id": st.just("a") | NESTED,
    "prompt": st.just([1, 2, 3]) | IDS,
    "max_new_tokens": st.integers(1, 70) | NESTED,
    "arrival_s": st.none() | NESTED,
    "deadline_s": st.none() | NESTED,
    "temperature": st.just(0.5) | NESTED,
    "top_p": st.just(0.9) | NESTED,
    "seed": st.just(3) | NESTED,
    "stop_ids": st.none() | IDS,
    "read_positions": st.just(()) | IDS,
    "first_position": st.just(0) | NESTED,
}


@settings(max_examples=REQUESTS, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({}, optional=FUZZED))
@example({"prompt": [1, 2], "max_new_tokens": np.uint64(2**64 - 1)})
@example({"prompt": [1], "stop_ids": np.zeros((0, 3))})
def test_fuzzed_requests_are_meant_or_refused(fields):
    """Through the scheduler, whose state a refusal must leave alone. A canary runs right after."""
    world = WORLD
    try:
        sequence = world.scheduler.submit(Request(**(GOOD | fields)), NOW)
    except RequestError as error:
        assert error.field and error.limit and str(error)
        assert not world.scheduler.sequences
        return
    got, asked = sequence.request, GOOD | {"max_new_tokens": 32, "first_position": 0, "seed": 0} | fields
    world.scheduler.cancel(got.id)
    stops = () if fields.get("stop_ids") is None else fields["stop_ids"]
    assert got.prompt.dtype == np.int32 and got.prompt.tolist() == [int(t) for t in asked["prompt"]]
    assert got.prompt.min() >= 0 and got.prompt.max() < VOCAB - 3 and got.total_tokens <= LONGEST
    for name in ("max_new_tokens", "first_position", "seed"):
        assert getattr(got, name) == int(asked[name]) and not isinstance(asked[name], bool | np.bool_ | float)
    assert got.seed < 2**32 and got.first_position + got.total_tokens <= MAX_POSITION
    assert 0 <= np.float32(got.temperature) < np.inf and 0 < np.float32(got.top_p) <= 1
    assert all(type(p) is int and 0 <= p < len(got.prompt) for p in got.read_positions)
    assert set(got.read_positions) == {int(p) for p in fields.get("read_positions", ())}
    assert list(got.stop_ids) == [int(t) for t in stops]
    assert math.isfinite(got.arrival_s) and (got.deadline_s is None or 0 < got.deadline_s < math.inf)


WORLD = World(pool_pages=LONGEST // 4)  # its vocabulary is 97


def test_a_canary_is_served_after_all_that():
    world = World(pool_pages=LONGEST // 4)
    for _, (asked, value, *_) in zip(range(100), REFUSED * 3, strict=False):
        with pytest.raises(RequestError):
            world.scheduler.submit(Request(**(GOOD | {asked: value})), NOW)
    canary = world.submit("canary", 20, 5)
    world.run()
    assert canary.reason == "length" and len(canary.tokens) == 5


def test_timeline_says_nan_before_there_are_tokens():
    timeline = Timeline(arrival_s=1.0)
    assert all(math.isnan(x) for x in (timeline.ttft_s, timeline.tpot_s, timeline.e2e_s)) and len(timeline.tbt_s) == 0
    timeline.token_s += [3.0, 4.0, 7.0]
    assert (timeline.ttft_s, timeline.tpot_s, timeline.e2e_s, timeline.tbt_s.tolist()) == (2.0, 2.0, 6.0, [1.0, 3.0])
    assert not Sequence(check(), timeline).finished
