"""Laws of the scheduler, on an executor that checks every read of a naive cache (fake_executor.py, world.py).

Every tick of every test here is also packed, and its invariants are checked.
"""

from itertools import product

import pytest

from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.serve.request import Phase, Request
from tests.fake_executor import answer, token_at
from tests.world import World, ask, check_answers, pages_of


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("spp", [1, 2, 3, 4])
@pytest.mark.parametrize("kvp, prompt", [(1, 1), (1, 16), (1, 17), (2, 5), (2, 40), (3, 61)])
def test_tick_law(spp, ahead, kvp, prompt):
    """A lone request's last token leaves the last stage in tick chunks + (spp-1) + (new-1)*spp, counted from 1.

    The scheduler has it `ahead` ticks later, not sooner and not later.
    """
    for new in (1, 2, 5):
        world = World(kvp, spp, ahead=ahead)
        sequence = world.submit("a", prompt, new)
        chunks = -(-prompt // world.serve.chunk_tokens)
        law = chunks + (spp - 1) + (new - 1) * spp
        world.tick(law + ahead - 1)
        assert len(sequence.tokens) == new - 1 and not sequence.finished
        last = max(batch.tick for batch in world.loop.batches if not batch.empty)
        assert last + spp == law  # entered in tick `last` counted from 0, which is last + 1; spp - 1 more to leave
        world.tick()
        assert sequence.finished and sequence.reason == "length" and world.loop.idle
        assert sequence.timeline.token_s[0] == chunks + spp - 1
        assert (sequence.timeline.tbt_s == spp).all()
        check_answers([sequence])


@pytest.mark.parametrize("spp", [1, 2, 3])
def test_decodes_come_first_and_never_wait(spp):
    """A decode proceeds every spp ticks while a long prompt takes all the chunk budget there is."""
    world = World(spp=spp, pool_pages=64, span_tokens=512)
    short = world.submit("short", 4, 12)
    world.tick(spp)
    long = world.submit("long", 200, 2)
    world.run()
    assert (short.timeline.tbt_s == spp).all()
    full = [b for b in world.loop.batches if b.chunk_tokens(0) == world.serve.chunk_tokens]
    assert len(full) == 200 // 16 and sum(bool(b.decodes) for b in full) >= 11 // spp - 1
    check_answers([short, long])


def test_prompts_go_in_order_of_arrival():
    """Budget goes to the earliest arrival, what is left to the next; admission never overtakes."""
    world = World(private_rows=2)
    for id in "abcd":
        world.submit(id, 24, 1)
    world.run()
    chunks = [[(row.request.id, row.start, row.length) for row in b.chunks] for b in world.loop.batches if b.chunks]
    assert chunks[:3] == [[("a", 0, 16)], [("a", 16, 8), ("b", 0, 8)], [("b", 8, 16)]]
    first = [rows[0][0] for rows in chunks]
    assert first == sorted(first)


def test_at_most_so_many_chunk_rows():
    world = World(private_rows=8, private_chunks=3)
    sequences = [world.submit(str(i), 2, 1) for i in range(8)]
    world.run()
    assert [len(b.chunks) for b in world.loop.batches if b.chunks] == [3, 3, 2]
    check_answers(sequences)


@pytest.mark.parametrize("placement", ["grow", "stripe"])
def test_long_and_short_share_a_tick(placement):
    """Each group's private chunks and the shared one stay within one budget together."""
    world = World(kvp=3, spp=2, placement=placement, chunk_buckets=(4, 16))
    sequences = [world.submit("long", 70, 3), *(world.submit(str(i), 9 + i, 4) for i in range(9))]
    world.run()
    assert sequences[0].group is None and {s.group for s in sequences[1:]} == {0, 1, 2}
    assert any({None, 0, 1, 2} <= {r.group for r in (*b.decodes, *b.chunks)} for b in world.loop.batches)
    check_answers(sequences)


def test_four_groups_serve_four_requests_in_the_ticks_of_one():
    ticks = []
    for requests in (1, 4):
        world = World(kvp=4, spp=2)
        sequences = [world.submit(str(i), 16, 6) for i in range(requests)]
        ticks.append(world.run())
        assert sorted(s.group for s in sequences) == list(range(requests))
        check_answers(sequences)
    assert ticks[0] == ticks[1]


def test_refusals_leave_nothing_behind():
    world = World(kvp=2, pool_pages=4, max_waiting=2)  # 8 pages of 4 tokens: 32 keys, so 33 tokens in all
    assert world.scheduler.longest == 32
    world.submit("longest", 30, 3)
    for field, value, limit, request in (
        ("id", "longest", "is already queued or running", ask("longest", 4, 1)),
        ("prompt + max_new_tokens", 34, "33 tokens in all: with 3 new tokens, a prompt of at most 30", ask("x", 31, 3)),
        ("prompt + max_new_tokens", 101, "at most 32 new tokens", ask("x", 1, 100)),
        ("prompt", "empty", "at least one", ask("x", 0, 3)),
    ):
        with pytest.raises(RequestError) as refusal:
            world.scheduler.submit(request, 0.0)
        assert (refusal.value.field, refusal.value.value) == (field, value) and limit in refusal.value.limit
    world.submit("second", 4, 1)
    with pytest.raises(RequestError, match="queue: got 2, is full: at most 2"):
        world.submit("third", 4, 1)
    assert list(world.scheduler.sequences) == ["longest", "second"] and world.held == 0
    world.run()
    again = world.submit("longest", 4, 1)
    world.run()
    check_answers([again])


def test_a_deadline_that_passes_in_the_queue_does_not_break_the_tick():
    world = World()
    request = world.scheduler.check(Request("a", [1, 2], 2, deadline_s=0.5, stop_ids=()), now_s=0.0)
    world.executor.ticks = 3
    arrived, _ = world.loop.tick([request])
    world.run()
    check_answers(arrived)


@pytest.mark.parametrize("spp, ahead, kvp", [(1, 1, 1), (1, 2, 2), (2, 1, 2), (3, 2, 1), (4, 1, 4)])
def test_cancel_at_any_moment(spp, ahead, kvp):
    """Pages go back at once and are free `depth` ticks later, neighbours never notice, the id can be used again."""
    phases = set()
    for moment, crowded in product(range(45), (False, True)):
        world = World(kvp, spp, ahead=ahead, pool_pages=12)
        mate = world.submit("mate", 7, 5)
        blocker = world.submit("blocker", 40, 2) if crowded else None
        victim = world.submit("victim", 37, 5)
        world.tick(moment)
        held, mine = world.held, sum(len(span.pages) for span in victim.spans)
        in_flight = len(victim.tokens) < victim.tokens_scheduled == 5
        phases.add("last token in flight" if in_flight else victim.phase.value)
        if not world.scheduler.cancel("victim"):
            assert victim.reason == "length"
            continue
        assert victim.reason == "cancelled" and world.held == held - mine and not world.scheduler.cancel("victim")
        again = world.submit("victim", 12, 3)
        tokens = list(victim.tokens)
        world.tick(world.executor.depth)
        assert not set(pages_of(victim)) & set(world.quarantined_pages())
        world.run()
        assert victim.tokens == tokens == answer(victim.request)[: len(tokens)]
        check_answers([s for s in (mate, blocker, again) if s])
    assert phases == {"waiting", "prefill", "decode", "last token in flight", "finished"}


@pytest.mark.parametrize("percent", [100, 105, 110, 120])
@pytest.mark.parametrize("placement", ["grow", "stripe"])
@pytest.mark.parametrize("kvp", [1, 2, 4])
def test_long_requests_beyond_the_pool_make_progress(kvp, placement, percent):
    """Three requests that together want more pages than there are: some wait, none holds a part for ever."""
    world = World(kvp, spp=2, pool_pages=30, placement=placement)
    tokens = 30 * kvp * 4 * percent // 300
    sequences = [world.submit(str(i), tokens - 3, 4) for i in range(3)]
    world.run()
    check_answers(sequences)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_not_finite_fails_only_its_request(at):
    world = World(kvp=2, spp=2)
    sequences = [world.submit(id, 5, 5) for id in ("a", "bad", "b", "c")]
    world.executor.poisoned["bad"] = 4 + at  # the position of its answer's token number `at`
    world.run()
    bad = sequences.pop(1)
    assert bad.reason.startswith("error") and bad.tokens == answer(bad.request)[:at]
    check_answers(sequences)
    del world.executor.poisoned["bad"]
    again = world.submit("bad", 9, 2)
    world.run()
    check_answers([again])


@pytest.mark.parametrize("spp, ahead", [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_stop_ids_are_noticed_late(spp, ahead):
    """Rows submitted before the stop token was seen are run and forgotten, also when the id is in use again."""
    world = World(spp=spp, ahead=ahead)
    sequence = world.submit("a", 6, 20, stop_ids=(token_at("a", 6 - 1 + 3),))
    while not sequence.finished:
        world.tick()
    assert sequence.reason == "stop" and sequence.tokens == answer(sequence.request) and len(sequence.tokens) == 4
    assert sequence.tokens_scheduled > 4
    again = world.submit("a", 9, 3)
    world.run()
    assert len(sequence.tokens) == 4
    check_answers([sequence, again])


@pytest.mark.parametrize("kvp, spp, prompt", [(1, 3, 9), (2, 4, 9), (2, 4, 60)])
def test_a_slot_waits_for_its_last_row_to_leave(kvp, spp, prompt):
    """With one slot and pages to spare: late rows of the old owner write a register that is still theirs."""
    world = World(kvp, spp, pool_pages=64, private_rows=1, shared_rows=1)
    sequences = []
    for i in range(4 * kvp):
        sequences.append(world.submit(str(i), prompt, 4))
        if i % 2:
            world.tick(spp + 1)
            for id in [s.request.id for s in sequences if not s.finished and s.phase is not Phase.WAITING]:
                world.scheduler.cancel(id)
    sequences.append(world.submit("last", prompt, 4))
    world.run()
    assert {s.reason for s in sequences} == {"length", "cancelled"}
    check_answers([s for s in sequences if s.reason == "length"])
