"""Sequences whose prompt is scheduled to its end, and the rows that they have, each in every turn of the pipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from mnemosyne_jax.serve.batch import DecodeRow
from mnemosyne_jax.serve.request import Sequence


class Decoding:
    """A token is there `depth` ticks after its row at the earliest: ticks take turns, and a sequence stays in one."""

    def __init__(self, depth: int):
        self._turns: list[list[Sequence]] = [[] for _ in range(depth)]  # as they came

    def __len__(self) -> int:
        return sum(map(len, self._turns))

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._turns)

    def append(self, sequence: Sequence) -> None:
        """Takes in one whose newest token comes of the row that it has in its `last_tick`."""
        self._turn(sequence.last_tick).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._turn(sequence.last_tick).remove(sequence)

    def rows(self, tick: int) -> tuple[DecodeRow, ...]:
        """Those of a tick, which are thereby scheduled; none of whoever has as many tokens as it asked for."""
        rows, new = [], tuple.__new__  # the constructor of a NamedTuple takes twice as long: a tenth of a decision
        for s in self._turn(tick):
            request, before = s.request, s.tokens_scheduled
            if before < request.max_new_tokens:
                position = s.prompt_scheduled + before - 1
                rows.append(new(DecodeRow, (request, s.slot, s.group, s.spans, position, None)))
                s.tokens_scheduled = before + 1
                s.last_tick = tick
        return tuple(rows)

    def _turn(self, tick: int) -> list[Sequence]:
        return self._turns[tick % len(self._turns)]
