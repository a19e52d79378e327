"""The time of a tick while its batch is being put together: how much it takes so far, and what still fits.

All stages run one program in lock step, so a tick takes as long as the slowest stage and group among the batches in the
pipe, at the rows of the smallest program that holds each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mnemosyne_jax.serve.batch import DecodeRow
from mnemosyne_jax.serve.chunking import largest_fitting
from mnemosyne_jax.serve.cost import CostModel
from mnemosyne_jax.serve.pages import Span
from mnemosyne_jax.serve.request import Sequence

# (shared tokens, private tokens of the fullest group) -> (rows, rows merged over kvp) of the smallest program that
# holds such chunks; None if there is none.
ProgramRows = Callable[[int, int], tuple[int, int] | None]


@dataclass(frozen=True)
class BatchLoad:
    """One batch, wherever it is in the pipe: chunk tokens, and seconds of attention in a stage, by group."""

    shared_tokens: int
    private_tokens: tuple[int, ...]
    attention_s: tuple[float, ...]

    @staticmethod
    def empty(groups: int) -> BatchLoad:
        return BatchLoad(0, (0,) * groups, (0.0,) * groups)


@dataclass(frozen=True)
class TickTime:
    """Predicts ticks from the loads in the pipe, the newest first."""

    cost: CostModel
    program_rows: ProgramRows
    page_tokens: int

    def seconds(self, pipe: tuple[BatchLoad, ...]) -> float | None:
        """Of a tick with these batches in the pipe; None if no program holds them."""
        shared = max(load.shared_tokens for load in pipe)
        private = max(max(load.private_tokens) for load in pipe)
        rows = self.program_rows(shared, private)
        if rows is None:
            return None
        return self.cost.program_s(*rows) + max(max(load.attention_s) for load in pipe)

    def with_decodes(self, load: BatchLoad, rows: Iterable[DecodeRow]) -> BatchLoad:
        """The load with these decode rows."""
        keys = [0] * len(load.attention_s)
        for row in rows:
            for span in row.spans:
                keys[span.group] += span.local_tokens(row.position + 1, self.page_tokens)
        attention_s = (s + self.cost.decode_s(k) for s, k in zip(load.attention_s, keys, strict=True))
        return replace(load, attention_s=tuple(attention_s))

    def with_chunk(self, load: BatchLoad, spans: tuple[Span, ...], shared: bool, start: int, tokens: int) -> BatchLoad:
        """The load with `tokens` more of a prompt of which `start` are stored."""
        attention_s, private = list(load.attention_s), list(load.private_tokens)
        for span in spans:
            before = span.local_tokens(start, self.page_tokens)
            own = span.local_tokens(start + tokens, self.page_tokens) - before
            attention_s[span.group] += self.cost.chunk_s(tokens, before, own)
            private[span.group] += 0 if shared else tokens
        return BatchLoad(load.shared_tokens + (tokens if shared else 0), tuple(private), tuple(attention_s))


@dataclass
class TickBudget:
    """A tick under construction: the load of its batch so far, and the older ones in the pipe."""

    tick_time: TickTime
    older: tuple[BatchLoad, ...]
    load: BatchLoad

    def largest_chunk(self, sequence: Sequence, room_tokens: int, budget_s: float) -> int:
        """The largest next chunk of a prompt with which the tick is predicted to keep `budget_s`; 0 for none."""

        def fits(tokens: int) -> bool:
            seconds = self.tick_time.seconds((self._with(sequence, tokens), *self.older))
            return seconds is not None and seconds <= budget_s

        left = len(sequence.request.prompt) - sequence.prompt_scheduled
        return largest_fitting(left, room_tokens, fits)

    def add_chunk(self, sequence: Sequence, tokens: int) -> None:
        self.load = self._with(sequence, tokens)

    def _with(self, sequence: Sequence, tokens: int) -> BatchLoad:
        shared = sequence.group is None
        return self.tick_time.with_chunk(self.load, sequence.spans, shared, sequence.prompt_scheduled, tokens)
