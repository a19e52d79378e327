"""One tick's work as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mnemosyne_jax.serve.pages import Span
from mnemosyne_jax.serve.request import Request


class DecodeRow(NamedTuple):  # made many times a tick: a dataclass takes three times as long
    """The next token of one sequence, whose newest one stands at `position` in the register of `slot`.

    A `token` that is given goes before the register. `group` None means a row shared by all groups.
    """

    request: Request
    slot: int
    group: int | None
    spans: tuple[Span, ...]
    position: int
    token: int | None = None


class ChunkRow(NamedTuple):
    """Prompt tokens [start, start + length) of one sequence; the `last` chunk of a prompt gives its first token."""

    request: Request
    slot: int
    group: int | None
    spans: tuple[Span, ...]
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def last(self) -> bool:
        return self.end == len(self.request.prompt)


@dataclass(frozen=True, eq=False)
class Batch:
    """What enters stage 0 at one tick. Rows hold positions and spans as they were when scheduled."""

    tick: int
    decodes: tuple[DecodeRow, ...] = ()
    chunks: tuple[ChunkRow, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.decodes and not self.chunks

    def chunk_tokens(self, group: int | None) -> int:
        """Prompt tokens of this batch's private chunks in `group`, or of its shared chunks (None)."""
        return sum(row.length for row in self.chunks if row.group == group)
