"""Which group holds which tokens of a request on which pages."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """The pages of one request in one group: local page j holds global page start + stride * j, on pages[j]."""

    group: int
    start: int
    stride: int
    pages: np.ndarray

    def local_tokens(self, tokens: int, page_tokens: int) -> int:
        """How many of the request's first `tokens` tokens are held here."""
        page, rest = tokens // page_tokens, tokens % page_tokens
        full = self._pages_before(page)
        last_is_here = full < len(self.pages) and self.start + self.stride * full == page
        return full * page_tokens + rest if last_is_here else full * page_tokens

    def touched(self, begin: int, end: int, page_tokens: int) -> tuple[int, int]:
        """The local pages [first, last) that tokens [begin, end) are the first to use."""
        return self._pages_before(-(-begin // page_tokens)), self._pages_before(-(-end // page_tokens))

    def _pages_before(self, page: int) -> int:
        """How many of the pages held here come before page `page` of the request."""
        # Asked for every row of every tick: comparisons take a third of the time of min and max.
        count, most = -((self.start - page) // self.stride), len(self.pages)
        return 0 if count < 0 else count if count < most else most


def private_layout(pages: int) -> list[tuple[int, int, int]]:
    """(start, stride, pages) in the one group of a private request."""
    return [(0, 1, pages)]


def striped_layout(pages: int, groups: int) -> list[tuple[int, int, int]]:
    """(start, stride, pages) in each group: pages alternate between groups from the start."""
    return [(g, groups, len(range(g, pages, groups))) for g in range(groups)]


def grown_layout(pages: int, groups: int, span_pages: int) -> list[tuple[int, int, int]]:
    """(start, stride, pages) in each group: one group after the other, `span_pages` each (more if they would not do).

    Source: the onboarding of KVP groups in arXiv 2409.17264.
    """
    span_pages = max(span_pages, -(-pages // groups))
    starts = range(0, groups * span_pages, span_pages)
    return [(start, 1, min(max(pages - start, 0), span_pages)) for start in starts]


class PagePool:
    """The pages of one group: free, granted, or in quarantine.

    A released page may still be written by rows in the pipe, up to the last tick that carries one of
    its owner, so it is granted again only once that tick has left the pipe.
    """

    def __init__(self, pages: int):
        self.size = pages
        self._free = np.arange(pages, dtype=np.int32)[::-1].copy()
        self._free_count = pages
        self._quarantine: deque[tuple[int, np.ndarray]] = deque()

    @property
    def free(self) -> int:
        """Pages that can be granted now."""
        return self._free_count

    @property
    def quarantined(self) -> int:
        return sum(len(pages) for _, pages in self._quarantine)

    def grant(self, count: int) -> np.ndarray:
        """`count` pages. Asking for more than `free` is a programming error."""
        assert 0 <= count <= self._free_count, f"{count} pages asked of {self._free_count} free"
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count].copy()

    def release(self, pages: np.ndarray, last_tick: int) -> None:
        """Takes pages back; ticks up to `last_tick` may still write to them."""
        if len(pages):
            self._quarantine.append((last_tick, pages))

    def drain(self, done_tick: int) -> None:
        """Frees what no tick after `done_tick` can write to."""
        while self._quarantine and self._quarantine[0][0] <= done_tick:
            _, pages = self._quarantine.popleft()
            self._free[self._free_count : self._free_count + len(pages)] = pages
            self._free_count += len(pages)
