"""Where requests live: slot and pages in one group or in all, from admission until the pipe has forgotten them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.serve.pages import PagePool, Span, grown_layout, private_layout, striped_layout
from mnemosyne_jax.serve.policy import is_short
from mnemosyne_jax.serve.request import Sequence


class Places:
    """Slots and pages of every group: free, held by a sequence, or in quarantine."""

    def __init__(self, serve: ServeConfig, mesh: MeshSpec, pool_pages: int):
        self._serve, self._groups = serve, mesh.kvp
        self.pools = [PagePool(pool_pages) for _ in range(mesh.kvp)]
        shared = serve.shared_slots(mesh)
        self.free_slots: dict[int | None, list[int]] = {None: list(range(shared))}
        self.free_slots |= {g: list(range(shared, serve.slots(mesh))) for g in range(mesh.kvp)}
        self.quarantined_slots: deque[tuple[int, int | None, int]] = deque()
        self._short_pages = [0] * mesh.kvp  # of each group, held by short requests
        self._roomiest = pool_pages  # pages that are free in the group with most of them, of those with a private slot

    @property
    def any_slot_free(self) -> bool:
        return any(self.free_slots.values())

    def place(self, sequence: Sequence, running: Iterable[Iterable[Sequence]], kept: list[int] | None = None) -> bool:
        """Whether there was room: then the sequence has a slot and all the pages that it can ever need.

        Reserving everything at once is what keeps several long requests from each holding a part that the others wait
        for. A request in one group goes to that with the least prefill pending. A short one may pass one that is
        blocked where all short ones together leave the pages of each group that are `kept` for it: they are there once
        those end that are not short. Of the slots that become free it has the first.
        """
        pages = sequence.pages
        if self._in_one_group(sequence):
            if pages > self._roomiest:  # most that are tried, where there are too few
                return False
            ready = [g for g in range(self._groups) if self.free_slots[g] and self.pools[g].free >= pages]
            if kept:
                ready = [g for g in ready if self._short_pages[g] + pages + kept[g] <= self.pools[g].size]
                if not ready:
                    return False
            sequence.group = ready[0] if len(ready) == 1 else self._idlest(ready, running)
            held = [(sequence.group, *private_layout(pages)[0])]
        else:
            if kept or not self.free_slots[None]:
                return False
            held = [(g, *layout) for g, layout in enumerate(self._layout_of_all(pages))]
            if any(self.pools[g].free < count for g, _, _, count in held):
                return False
            sequence.group = None
        sequence.slot = self.free_slots[sequence.group].pop(0)
        sequence.spans = tuple(Span(g, start, stride, self.pools[g].grant(count)) for g, start, stride, count in held)
        self._count(sequence, 1)
        self._see_room()
        return True

    def needed_by(self, sequence: Sequence) -> list[int]:
        """Pages of each group that it may need."""
        if self._in_one_group(sequence):  # in any
            return [sequence.pages] * self._groups
        return [count for _, _, count in self._layout_of_all(sequence.pages)]

    def _in_one_group(self, sequence: Sequence) -> bool:
        if self._groups == 1:
            return True
        return sequence.request.total_tokens <= self._serve.span_tokens and sequence.pages <= self.pools[0].size

    def _count(self, sequence: Sequence, sign: int) -> None:
        if is_short(sequence):
            for span in sequence.spans:
                self._short_pages[span.group] += sign * len(span.pages)

    def _see_room(self) -> None:
        self._roomiest = max((self.pools[g].free for g in range(self._groups) if self.free_slots[g]), default=-1)

    def _idlest(self, ready: list[int], running: Iterable[Iterable[Sequence]]) -> int:
        pending = [0] * self._groups
        for s in chain.from_iterable(running):
            if s.group is not None:
                pending[s.group] += len(s.request.prompt) - s.prompt_scheduled + 1
        return min(ready, key=lambda g: (pending[g], g))

    def _layout_of_all(self, pages: int) -> list[tuple[int, int, int]]:
        if self._serve.placement == "stripe":
            return striped_layout(pages, self._groups)
        span_pages = min(self._serve.span_tokens // self._serve.page_tokens, self.pools[0].size)
        return grown_layout(pages, self._groups, span_pages)

    def release(self, sequence: Sequence) -> None:
        """Takes back what a sequence holds; the last tick that carries one of its rows may still write to it."""
        self._count(sequence, -1)
        for span in sequence.spans:
            self.pools[span.group].release(span.pages, sequence.last_tick)
        self.quarantined_slots.append((sequence.last_tick, sequence.group, sequence.slot))

    def drain(self, done_tick: int) -> None:
        """Frees pages and slots once the last batch with a row of their owner has left the last stage."""
        if not self.quarantined_slots:  # in most ticks; whoever releases pages releases a slot with them
            return
        for pool in self.pools:
            pool.drain(done_tick)
        while self.quarantined_slots and self.quarantined_slots[0][0] <= done_tick:
            _, group, slot = self.quarantined_slots.popleft()
            self.free_slots[group].append(slot)
        self._see_room()
