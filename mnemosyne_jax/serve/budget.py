"""The time of a tick while its batch is being put together: how much it takes so far, and what still fits.

All stages run one program in lock step, so a tick takes as long as the slowest stage and group among the batches in the
pipe, at the rows of the smallest program that holds each of them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from mnemosyne_jax.serve.batch import DecodeRow
from mnemosyne_jax.serve.chunking import STEP, largest_fitting
from mnemosyne_jax.serve.cost import CostModel
from mnemosyne_jax.serve.pages import Span
from mnemosyne_jax.serve.request import Sequence

# (shared tokens, private tokens of the fullest group) -> (rows, rows merged over kvp) of the smallest program that
# holds such chunks; None if there is none.
ProgramRows = Callable[[int, int], tuple[int, int] | None]
POSITION = operator.attrgetter("position")


class BatchLoad(NamedTuple):
    """One batch, wherever it is in the pipe: chunk tokens, and seconds of attention in a stage, by group."""

    shared_tokens: int
    private_tokens: tuple[int, ...]
    attention_s: tuple[float, ...]

    @staticmethod
    def empty(groups: int) -> BatchLoad:
        return BatchLoad(0, (0,) * groups, (0.0,) * groups)


@dataclass(frozen=True)
class TickTime:
    """Predicts ticks from the loads in the pipe."""

    cost: CostModel
    program_rows: ProgramRows
    page_tokens: int
    program_s: Callable[[int, int], float] = field(init=False, compare=False)
    """All but attention, at the smallest program that holds so many shared and private tokens; inf: there is none."""

    def __post_init__(self):
        # Asked for many times a tick, of a few thousand pairs of numbers: to forget some of them takes longer.
        object.__setattr__(self, "program_s", functools.cache(self._program_s))

    def _program_s(self, shared_tokens: int, private_tokens: int) -> float:
        rows = self.program_rows(shared_tokens, private_tokens)
        return math.inf if rows is None else self.cost.program_s(*rows)

    def seconds(self, pipe: Collection[BatchLoad]) -> float | None:
        """Of a tick with these batches in the pipe; None if no program holds them."""
        shared_tokens, private_tokens, attention_s = zip(*pipe, strict=True)
        seconds = self.program_s(max(shared_tokens), max(map(max, private_tokens))) + max(map(max, attention_s))
        return seconds if seconds < math.inf else None

    def with_decodes(self, load: BatchLoad, rows: Collection[DecodeRow]) -> BatchLoad:
        """The load with these decode rows."""
        keys = [0] * len(load.attention_s)
        if len(keys) == 1:
            keys[0] = sum(map(POSITION, rows)) + len(rows)  # all are there
        else:
            for row in rows:
                group = row.group
                if group is not None:  # all of its keys are there
                    keys[group] += row.position + 1
                else:
                    for span in row.spans:
                        keys[span.group] += span.local_tokens(row.position + 1, self.page_tokens)
        attention_s = tuple(map(operator.add, load.attention_s, map(self.cost.decode_s, keys)))
        return BatchLoad(load.shared_tokens, load.private_tokens, attention_s)

    def with_chunk(self, load: BatchLoad, spans: tuple[Span, ...], shared: bool, start: int, tokens: int) -> BatchLoad:
        """The load with `tokens` more of a prompt of which `start` are stored."""
        attention_s, private = list(load.attention_s), list(load.private_tokens)
        if not shared:  # all of its keys are there
            (span,) = spans
            attention_s[span.group] += self.cost.chunk_s(tokens, start, tokens)
            private[span.group] += tokens
            return BatchLoad(load.shared_tokens, tuple(private), tuple(attention_s))
        for span in spans:
            before = span.local_tokens(start, self.page_tokens)
            own = span.local_tokens(start + tokens, self.page_tokens) - before
            attention_s[span.group] += self.cost.chunk_s(tokens, before, own)
        return BatchLoad(load.shared_tokens + tokens, load.private_tokens, tuple(attention_s))


class TickBudget:
    """A tick under construction: the load of its batch so far, beside the older ones in the pipe.

    `sizes` are those of the chunk areas of programs, increasing.
    """

    def __init__(self, tick_time: TickTime, sizes: Seq[int], older: Iterable[BatchLoad], load: BatchLoad):
        self._time, self._sizes = tick_time, sizes
        # Of the whole pipe: the most shared tokens, private tokens and seconds of attention of any group.
        self._shared, self._private, self._attention_s = 0, 0, 0.0
        for one in older:
            self._add_to_pipe(one)
        self._take(load)

    # Here and in `_with_area` compared by hand: `max` takes longer than the rest, and both run many times a tick.
    def _add_to_pipe(self, load: BatchLoad) -> None:
        shared, private, attention_s = load.shared_tokens, max(load.private_tokens), max(load.attention_s)
        if shared > self._shared:
            self._shared = shared
        if private > self._private:
            self._private = private
        if attention_s > self._attention_s:
            self._attention_s = attention_s

    def _take(self, load: BatchLoad) -> None:
        self.load = load
        self._add_to_pipe(load)  # it only grows
        self._least_s: dict[int | None, float] = {}

    def add_chunk(self, sequence: Sequence, tokens: int) -> None:
        shared = sequence.group is None
        self._take(self._time.with_chunk(self.load, sequence.spans, shared, sequence.prompt_scheduled, tokens))

    @property
    def seconds(self) -> float:
        """That the tick is predicted to take as it is."""
        return self._time.program_s(self._shared, self._private) + self._attention_s

    def full(self, budget_s: float) -> bool:
        """Whether it is certain that no chunk of any prompt, in one group or in all, keeps `budget_s`."""
        for group in range(len(self.load.attention_s)):
            if self._least(group) <= budget_s:
                return False
        return self._least(None) > budget_s

    def _least(self, group: int | None) -> float:
        """Seconds of the tick with one token more in `group` (None: in all), and no more attention than now."""
        if group not in self._least_s:
            self._least_s[group] = self._with_area(group, self._taken(group) + 1)
        return self._least_s[group]

    def _taken(self, group: int | None) -> int:
        return self.load.shared_tokens if group is None else self.load.private_tokens[group]

    def _with_area(self, group: int | None, tokens: int) -> float:
        """Seconds of the tick with an area of so many in `group` (None: in all), and no more attention than now."""
        shared, private = self._shared, self._private
        if group is None:
            return self._time.program_s(tokens if tokens > shared else shared, private) + self._attention_s
        return self._time.program_s(shared, tokens if tokens > private else private) + self._attention_s

    def largest_chunk(self, sequence: Sequence, room_tokens: int, budget_s: float, step: int = STEP) -> int:
        """The largest next chunk of a prompt with which the tick is predicted to keep `budget_s`; 0 for none."""
        group = sequence.group
        if self._least(group) > budget_s:  # what is larger takes no less: most prompts that find no time end here
            return 0
        fits = self._fits_all(sequence, budget_s) if group is None else self._fits_one(sequence, group, budget_s)
        left = len(sequence.request.prompt) - sequence.prompt_scheduled
        most = min(left, room_tokens, self._room(group, budget_s))
        if most < left:
            most -= most % step
        if not most or fits(most):  # in most cases it does
            return most
        return largest_fitting(left, most, fits, step) if fits(min(most, step)) else 0

    def _room(self, group: int | None, budget_s: float) -> int:
        """How many tokens more in `group` (None: in all) keep `budget_s`, with no more attention than now."""
        for size in reversed(self._sizes):
            if self._with_area(group, size) <= budget_s:
                return size - self._taken(group)
        return 0

    # What a search does not change is looked up once, before it begins. It stays within `_room`, and sums in the order
    # of `TickTime.seconds`: the same bits.

    def _fits_one(self, sequence: Sequence, group: int, budget_s: float) -> Callable[[int], bool]:
        """Whether a chunk of a prompt keeps the budget that has all of its keys in one group."""
        before, taken = sequence.prompt_scheduled, self.load.private_tokens[group]
        shared, private, so_far_s = self._shared, self._private, self.load.attention_s[group]
        program_s_of, chunk_s = self._time.program_s, self._time.cost.chunk_s

        def fits(tokens: int) -> bool:
            area = taken + tokens
            program_s = program_s_of(shared, area if area > private else private)
            return program_s + (so_far_s + chunk_s(tokens, before, tokens)) <= budget_s

        return fits

    def _fits_all(self, sequence: Sequence, budget_s: float) -> Callable[[int], bool]:
        """Whether a chunk of a prompt of all groups keeps the budget, in each of them."""
        start, page_tokens, chunk_s = sequence.prompt_scheduled, self._time.page_tokens, self._time.cost.chunk_s
        held = [(self.load.attention_s[s.group], s, s.local_tokens(start, page_tokens)) for s in sequence.spans]

        def fits(tokens: int) -> bool:
            program_s = self._time.program_s(max(self._shared, self.load.shared_tokens + tokens), self._private)
            own = (span.local_tokens(start + tokens, page_tokens) - before for _, span, before in held)
            chunks = (so_far_s + chunk_s(tokens, before, n) for (so_far_s, _, before), n in zip(held, own, strict=True))
            return all(program_s + attention_s <= budget_s for attention_s in chunks)

        return fits
