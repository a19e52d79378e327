"""The time of a tick: of the slowest group, at the largest program, and never less for more work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, from_yaml
from mnemosyne_jax.serve.batch import DecodeRow
from mnemosyne_jax.serve.budget import BatchLoad, TickBudget, TickTime
from mnemosyne_jax.serve.cost import CostModel
from mnemosyne_jax.serve.pages import Span, striped_layout
from mnemosyne_jax.serve.request import Request, Sequence, Timeline

MESH = MeshSpec(kvp=2, spp=2)
COST = CostModel(
    from_yaml(ModelConfig, "configs/model/llama-3-8b.yaml"), from_yaml(HardwareConfig, "configs/hardware/h100.yaml"),
    MESH,
)  # fmt: skip
PROMPT = np.zeros(1_010_000, np.int32)
BUCKETS = (128, 512, 2048)
EMPTY = BatchLoad.empty(2)


def program_rows(shared, private):
    sizes = [next((b for b in (0, *BUCKETS) if b >= tokens), None) for tokens in (shared, private)]
    return None if None in sizes else (16 + sum(sizes), 2 + sizes[0])


TIME = TickTime(COST, program_rows, page_tokens=128)


def striped(tokens):
    pages = -(-tokens // 128)
    return tuple(Span(g, a, b, np.zeros(n, np.int32)) for g, (a, b, n) in enumerate(striped_layout(pages, 2)))


def private(group, tokens):
    return (Span(group, 0, 1, np.zeros(-(-tokens // 128), np.int32)),)


def test_a_tick_takes_as_long_as_its_slowest_group_at_the_program_of_the_whole_pipe():
    old = TIME.with_chunk(EMPTY, private(1, 4096), False, 1024, 500)
    new = TIME.with_decodes(EMPTY, [DecodeRow(Request("r", [0]), 0, None, striped(1_000_000), position=999_999)])
    expected = COST.program_s(16 + 512, 2) + max(COST.chunk_s(500, 1024), COST.decode_s(500_000))
    assert TIME.seconds((new, old)) == pytest.approx(expected, rel=1e-3)
    assert TIME.seconds((EMPTY, EMPTY)) == COST.program_s(16, 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_decodes_load_the_groups_that_hold_their_keys(groups):
    held = [(g % groups, 1000 * g + 7) for g in range(5)]
    rows = [DecodeRow(Request(g, [0]), 0, g, private(g, position + 1), position) for g, position in held]
    load = TIME.with_decodes(BatchLoad.empty(groups), rows)
    keys = [sum(position + 1 for g, position in held if g == group) for group in range(groups)]
    assert load == BatchLoad(0, (0,) * groups, tuple(COST.decode_s(n) for n in keys))


def test_a_shared_chunk_loads_every_group_with_what_it_holds():
    load = TIME.with_chunk(EMPTY, striped(1_000_000), True, 900_000, 512)
    assert load.shared_tokens == 512 and load.private_tokens == (0, 0)
    assert load.attention_s == pytest.approx([COST.chunk_s(512, 450_000, 256)] * 2, rel=1e-3)
    both = TIME.with_chunk(load, private(0, 2000), False, 0, 300)
    assert both.private_tokens == (300, 0) and both.attention_s[1] == load.attention_s[1]


def prompt(group, done, left):
    """A prompt of which `done` tokens are stored, in a group or (2) in both."""
    return Sequence(
        Request("r", PROMPT[: done + left]),
        Timeline(0.0),
        group=None if group == 2 else group,
        spans=striped(done + left) if group == 2 else private(group, done + left),
        prompt_scheduled=done,
    )


starts = st.integers(0, 5000) | st.integers(0, 1_000_000)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 2), starts, st.integers(1, 1000) | st.sampled_from(BUCKETS)), max_size=5),
    st.tuples(st.integers(0, 2), starts, st.integers(1, 3000)),
    st.integers(1, 2048),
    st.sampled_from([0.97, 1.0, 1.03]),
)
def test_the_largest_chunk_is_what_trying_them_all_finds(earlier, asked, kept, slack):
    """Beside other chunks of this tick and of the one before; a tick is full if nothing fits, nowhere."""

    def tick_s(sequence, tokens):
        shared, done = sequence.group is None, sequence.prompt_scheduled
        return TIME.seconds((TIME.with_chunk(budget.load, sequence.spans, shared, done, tokens), older))

    older = TIME.with_chunk(EMPTY, private(0, 4096), False, 2048, 100)
    budget = TickBudget(TIME, BUCKETS, [older], EMPTY)
    for one in earlier:
        budget.full(0.01)  # asking in between changes nothing
        budget.add_chunk(prompt(*one), one[2])
    sequence = prompt(*asked)
    budget_s = slack * (tick_s(sequence, kept) or 0.02)  # near what some chunk takes
    fitting = [n for n in {*range(32, min(asked[2], 2048) + 1, 32), asked[2]} if (tick_s(sequence, n) or 9) <= budget_s]
    assert budget.largest_chunk(sequence, 3000, budget_s) == max(fitting, default=0)
    tokens = [(tick_s(prompt(group, 0, 1), 1) or 9) <= budget_s for group in (0, 1, 2)]
    assert not (budget.full(budget_s) and any(tokens)), "something fitted"


def test_the_slowest_batch_in_the_pipe_bounds_a_chunk_too():
    """A larger program would fit beside the chunk's own attention, not beside that of the batch before."""
    older = TIME.with_chunk(EMPTY, private(0, 1_000_100), False, 1_000_000, 100)
    budget = TickBudget(TIME, BUCKETS, [older], EMPTY)
    for group, rows in ((1, (16 + 128, 2)), (2, (16 + 128 + 128, 2 + 128))):
        budget_s = (COST.program_s(*rows) + older.attention_s[0]) * (1 + 1e-9)
        assert budget.largest_chunk(prompt(group, 0, 3000), 3000, budget_s) == 128


def test_a_tick_is_full_when_no_place_is_left():
    budget = TickBudget(TIME, BUCKETS, [EMPTY], EMPTY)
    for group in (0, 1):
        budget.add_chunk(prompt(group, 0, 128), 128)
    both_s = COST.program_s(16 + 128 + 128, 2 + 128) + budget.load.attention_s[0]
    assert not budget.full(both_s) and budget.full(both_s * (1 - 1e-9))  # one of all groups, no other


def test_no_program_no_time():
    assert TIME.seconds((TIME.with_chunk(EMPTY, private(0, 4096), False, 0, 2049), EMPTY)) is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10_000_000), st.integers(1, 2048), st.integers(1, 2048), st.booleans())
def test_a_larger_chunk_never_takes_less(start, one, other, shared):
    spans = striped(start + 2048) if shared else private(1, start + 2048)
    small, large = (
        TIME.seconds((TIME.with_chunk(EMPTY, spans, shared, start, n), EMPTY)) for n in sorted((one, other))
    )
    assert small <= large * (1 + 1e-9)
