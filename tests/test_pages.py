"""Pages: nothing is granted twice or lost under any sequence of operations; spans against counting token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mnemosyne_jax.serve.pages import PagePool, Span, grown_layout, private_layout, striped_layout


class PoolMachine(RuleBasedStateMachine):
    """PagePool beside a dictionary that says of each page who has it."""

    @initialize(size=st.integers(0, 12))
    def start(self, size):
        self.pool, self.free = PagePool(size), set(range(size))
        self.owned: list[np.ndarray] = []
        self.quarantine: list[tuple[int, set[int]]] = []
        self.done_tick = -1

    @rule(share=st.floats(0, 1))
    def grant(self, share):
        count = int(share * self.pool.free)
        pages = self.pool.grant(count)
        assert len(pages) == count == len(set(pages.tolist())) and set(pages.tolist()) <= self.free
        self.free -= set(pages.tolist())
        self.owned.append(pages)

    @rule(more=st.integers(1, 3))
    def grant_too_many(self, more):
        with pytest.raises(AssertionError, match="free"):
            self.pool.grant(self.pool.free + more)

    @precondition(lambda self: self.owned)
    @rule(which=st.integers(0, 100), ahead=st.integers(-2, 4))
    def release(self, which, ahead):
        """Pages of an owner whose last row is in the pipe, or left it some ticks ago."""
        pages = self.owned.pop(which % len(self.owned))
        self.quarantine.append((self.done_tick + ahead, set(pages.tolist())))
        self.pool.release(pages, self.done_tick + ahead)

    @rule(ticks=st.integers(0, 3))
    def drain(self, ticks):
        self.done_tick += ticks
        self.pool.drain(self.done_tick)
        while self.quarantine and (self.quarantine[0][0] <= self.done_tick or not self.quarantine[0][1]):
            self.free |= self.quarantine.pop(0)[1]

    @rule()
    def drain_all(self):
        """Once the newest of all ticks is done, nothing stays in quarantine, in whatever order it came in."""
        self.drain(max([last for last, _ in self.quarantine], default=self.done_tick) - self.done_tick)
        if all(last <= self.done_tick for last, _ in self.quarantine):
            assert self.pool.quarantined == 0

    @invariant()
    def counts_add_up(self):
        in_quarantine = sum(len(pages) for _, pages in self.quarantine)
        assert (self.pool.free, self.pool.quarantined) == (len(self.free), in_quarantine)
        assert self.pool.free + self.pool.quarantined + sum(map(len, self.owned)) == self.pool.size

    @invariant()
    def granted_pages_keep_their_value(self):
        """A grant is a copy: releasing and granting again must not write into pages someone still holds."""
        held = [page for pages in self.owned for page in pages.tolist()]
        assert len(set(held)) == len(held) and not set(held) & self.free


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)


def test_pool_frees_no_page_before_its_tick():
    pool = PagePool(4)
    first, second = pool.grant(2), pool.grant(2)
    pool.release(first, last_tick=7)
    pool.release(second, last_tick=5)
    pool.drain(6)
    assert (pool.free, pool.quarantined) == (0, 4)
    pool.drain(7)
    assert (pool.free, pool.quarantined) == (4, 0)
    assert sorted(pool.grant(4).tolist()) == [0, 1, 2, 3]


def layouts(pages, groups):
    """(name, [(start, stride, pages)]) of every way to lay out `pages` pages over `groups` groups."""
    yield "private", private_layout(pages)
    yield "striped", striped_layout(pages, groups)
    for span_pages in (1, 2, 3, 5, 100):
        yield f"grown by {span_pages}", grown_layout(pages, groups, span_pages)


def spans_of(layout):
    return [Span(g, start, stride, np.arange(count)) for g, (start, stride, count) in enumerate(layout)]


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_layouts_cover_every_page_once(groups):
    for pages in range(1, 26):
        for name, layout in layouts(pages, groups):
            held = [start + stride * j for start, stride, count in layout for j in range(count)]
            assert sorted(held) == list(range(pages)), name
            assert len(layout) == (1 if name == "private" else groups) and all(stride >= 1 for _, stride, _ in layout)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_layouts_need_no_more_than_a_group_has(groups):
    """`longest` promises that a lone request of groups * pool pages fits, whatever the placement."""
    for pool in range(1, 9):
        for pages in range(1, groups * pool + 1):
            assert max(count for _, _, count in striped_layout(pages, groups)) <= pool
            for span_pages in range(1, pool + 1):
                assert max(count for _, _, count in grown_layout(pages, groups, span_pages)) <= pool


def test_grown_fills_group_after_group():
    assert grown_layout(5, 3, 2) == [(0, 1, 2), (2, 1, 2), (4, 1, 1)]
    assert grown_layout(2, 3, 2) == [(0, 1, 2), (2, 1, 0), (4, 1, 0)]
    assert grown_layout(9, 3, 2) == [(0, 1, 3), (3, 1, 3), (6, 1, 3)]  # two each would not do


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("page_tokens", [1, 2, 4, 7])
def test_local_tokens_counts_tokens(groups, page_tokens):
    """After every number of tokens: each group's count, and that the groups' counts add up to it."""
    for pages in (1, 2, 5, 11):
        for name, layout in layouts(pages, groups):
            spans = spans_of(layout)
            held = [{s.start + s.stride * j for j in range(len(s.pages))} for s in spans]
            counts = [0] * len(spans)
            for tokens in range(pages * page_tokens + 1):
                if tokens:
                    counts = [n + ((tokens - 1) // page_tokens in h) for n, h in zip(counts, held, strict=True)]
                assert [s.local_tokens(tokens, page_tokens) for s in spans] == counts, (name, tokens)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("page_tokens", [1, 3, 4])
def test_touched_names_the_pages_first_used(groups, page_tokens):
    """For all begin < end: the local pages of which [begin, end) holds the first token."""
    for pages in (1, 2, 7):
        for name, layout in layouts(pages, groups):
            for span in spans_of(layout):
                firsts = [(span.start + span.stride * j) * page_tokens for j in range(len(span.pages))]
                for begin in range(pages * page_tokens):
                    for end in range(begin + 1, pages * page_tokens + 1):
                        first, last = span.touched(begin, end, page_tokens)
                        new = [j for j, token in enumerate(firsts) if begin <= token < end]
                        assert list(range(first, last)) == new, (name, begin, end)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), groups=st.integers(1, 4), page_tokens=st.integers(1, 512), pages=st.integers(1, 100_000))
def test_any_chunking_touches_each_page_once(data, groups, page_tokens, pages):
    """Cut into chunks anywhere, a request of any length makes each of its pages known once, in order."""
    total = pages * page_tokens
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=8))})
    name, layout = data.draw(st.sampled_from(list(layouts(pages, groups))))
    for span in spans_of(layout):
        known = 0
        for begin, end in zip(cuts, cuts[1:], strict=False):
            first, last = span.touched(begin, end, page_tokens)
            assert first == known <= last, name
            known = last
            assert -(-span.local_tokens(end, page_tokens) // page_tokens) == known, name
        assert known == len(span.pages)
