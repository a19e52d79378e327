"""The time of a tick while its batch is being put together: how much it takes so far, and what still fits.

All stages run one program in lock step, so a tick takes as long as the slowest stage and group among the batches in the
pipe, at the rows of the smallest program that holds each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
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
    _programs_s: dict[tuple[int, int] | None, float | None] = field(default_factory=dict, compare=False)

    def program_s(self, shared_tokens: int, private_tokens: int) -> float | None:
        """All but attention, at the smallest program that holds such chunks; None if there is none."""
        rows = self.program_rows(shared_tokens, private_tokens)
        if rows not in self._programs_s:  # of a few programs, asked for many times a tick
            self._programs_s[rows] = None if rows is None else self.cost.program_s(*rows)
        return self._programs_s[rows]

    def seconds(self, pipe: Collection[BatchLoad]) -> float | None:
        """Of a tick with these batches in the pipe; None if no program holds them."""
        shared = max([load.shared_tokens for load in pipe])
        private = max([max(load.private_tokens) for load in pipe])
        program_s = self.program_s(shared, private)
        return None if program_s is None else program_s + max([max(load.attention_s) for load in pipe])

    def with_decodes(self, load: BatchLoad, rows: Iterable[DecodeRow]) -> BatchLoad:
        """The load with these decode rows."""
        keys = [0] * len(load.attention_s)
        for row in rows:
            if row.group is not None:  # all of its keys are there
                keys[row.group] += row.position + 1
            else:
                for span in row.spans:
                    keys[span.group] += span.local_tokens(row.position + 1, self.page_tokens)
        attention_s = [s + self.cost.decode_s(k) for s, k in zip(load.attention_s, keys, strict=True)]
        return BatchLoad(load.shared_tokens, load.private_tokens, tuple(attention_s))

    def with_chunk(self, load: BatchLoad, spans: tuple[Span, ...], shared: bool, start: int, tokens: int) -> BatchLoad:
        """The load with `tokens` more of a prompt of which `start` are stored."""
        attention_s, private = list(load.attention_s), list(load.private_tokens)
        for span in spans:
            before = span.local_tokens(start, self.page_tokens)
            own = span.local_tokens(start + tokens, self.page_tokens) - before
            attention_s[span.group] += self.cost.chunk_s(tokens, before, own)
            private[span.group] += 0 if shared else tokens
        return BatchLoad(load.shared_tokens + (tokens if shared else 0), tuple(private), tuple(attention_s))


class TickBudget:
    """A tick under construction: the load of its batch so far, beside the older ones in the pipe."""

    def __init__(self, tick_time: TickTime, older: Iterable[BatchLoad], load: BatchLoad):
        self._time = tick_time
        # Of the whole pipe: the most shared tokens, private tokens and seconds of attention of any group.
        self._shared, self._private, self._attention_s = 0, 0, 0.0
        for one in older:
            self._add_to_pipe(one)
        self._take(load)

    def _add_to_pipe(self, load: BatchLoad) -> None:
        self._shared = max(self._shared, load.shared_tokens)
        self._private = max(self._private, *load.private_tokens)
        self._attention_s = max(self._attention_s, *load.attention_s)

    def _take(self, load: BatchLoad) -> None:
        self.load = load
        self._add_to_pipe(load)  # it only grows
        self._least_s: dict[int | None, float] = {}

    def add_chunk(self, sequence: Sequence, tokens: int) -> None:
        shared = sequence.group is None
        self._take(self._time.with_chunk(self.load, sequence.spans, shared, sequence.prompt_scheduled, tokens))

    def full(self, budget_s: float) -> bool:
        """Whether no chunk of any prompt, in any group or in all, keeps `budget_s`."""
        return all(self._least(group) > budget_s for group in (*range(len(self.load.attention_s)), None))

    def _least(self, group: int | None) -> float:
        """Seconds of the tick with one token more in `group` (None: in all), and no more attention than now."""
        if group not in self._least_s:
            program_s = self._program_s(group, 1)
            self._least_s[group] = math.inf if program_s is None else program_s + self._attention_s
        return self._least_s[group]

    def _program_s(self, group: int | None, tokens: int) -> float | None:
        """All but attention, with `tokens` more."""
        if group is None:
            return self._time.program_s(max(self._shared, self.load.shared_tokens + tokens), self._private)
        return self._time.program_s(self._shared, max(self._private, self.load.private_tokens[group] + tokens))

    def largest_chunk(self, sequence: Sequence, room_tokens: int, budget_s: float, step: int = STEP) -> int:
        """The largest next chunk of a prompt with which the tick is predicted to keep `budget_s`; 0 for none."""
        group = sequence.group
        if self._least(group) > budget_s:  # what is larger takes no less: most prompts that find no time end here
            return 0
        load, start, page_tokens, chunk_s = (
            self.load, sequence.prompt_scheduled, self._time.page_tokens, self._time.cost.chunk_s,
        )  # fmt: skip
        # What the search does not change is looked up once: (seconds so far, span, keys before) of each group.
        held = [(load.attention_s[s.group], s, s.local_tokens(start, page_tokens)) for s in sequence.spans]

        def fits(tokens: int) -> bool:
            program_s = self._program_s(group, tokens)
            if program_s is None or program_s + self._attention_s > budget_s:
                return False
            if group is not None:  # all of a private prompt's keys are in its group
                return program_s + held[0][0] + chunk_s(tokens, held[0][2], tokens) <= budget_s
            return all(
                program_s + so_far_s + chunk_s(tokens, before, span.local_tokens(start + tokens, page_tokens) - before)
                <= budget_s
                for so_far_s, span, before in held
            )

        left = len(sequence.request.prompt) - start
        return largest_fitting(left, room_tokens, fits, step) if fits(min(left, room_tokens, step)) else 0
