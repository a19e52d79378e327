"""Which prompts have a chunk in a tick, and how long it is: what fills the tick's time, or its tokens."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence as Seq

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.serve.batch import DecodeRow
from mnemosyne_jax.serve.budget import BatchLoad, TickBudget, TickTime
from mnemosyne_jax.serve.chunking import STEP, ChooseChunk
from mnemosyne_jax.serve.pace import Pace
from mnemosyne_jax.serve.policy import slack_at
from mnemosyne_jax.serve.request import Sequence
from mnemosyne_jax.serve.room import ChunkRoom

log = logging.getLogger("mnemosyne_jax")
MOST_PASSED = 16  # of those who find no room, or no time, a tick looks past so many: it has other things to do

Chunk = tuple[Sequence, int]
"""Of which prompt, and how many tokens."""


def token_filling(prefills: Seq[Sequence], area: ChunkRoom, choose_chunk: ChooseChunk) -> list[Chunk]:
    """The chunks of a tick by token budget, of prompts in this order."""
    chunks = []
    area.clear()
    for s in prefills:
        if (room := area.tokens_for(s)) and (length := choose_chunk(s, room)):
            area.take(s, length)
            chunks.append((s, length))
    return chunks


class TimeFilling:
    """The chunks of every tick by time budget. Remembers what is in the pipe: ask it once a tick, of every tick.

    `pace` is learned by others, as ticks end.
    """

    def __init__(self, serve: ServeConfig, mesh: MeshSpec, tick_time: TickTime, area: ChunkRoom, pace: Pace):
        self._serve, self._stages, self._tick_time, self._area, self._pace = serve, mesh.spp, tick_time, area, pace
        self._empty = BatchLoad.empty(mesh.kvp)
        self._loads = deque([self._empty] * (mesh.spp - 1), maxlen=mesh.spp - 1)  # of the pipe, newest first
        self._last_chunk_tick = -1
        self.forced_chunks = 0  # chunks that ran although their tick was predicted to be over budget
        self.crowded_ticks = 0  # ticks whose decodes alone were

    def chunks(
        self, tick: int, now_s: float, decodes: tuple[DecodeRow, ...], decoding: bool, prefills: Seq[Sequence]
    ) -> list[Chunk]:
        """Chunks beside these decodes, of prompts in this order; at most one long prompt's in any group.

        `decoding`: whether anything decodes, in this turn of the pipe or in another.
        """
        serve, tick_time, area = self._serve, self._tick_time, self._area
        load = tick_time.with_decodes(self._empty, decodes)
        budget_s = (serve.tbt_slo_s / self._stages if decoding else serve.idle_tick_s) / self._pace.ratio
        decodes_s = tick_time.program_s(0, 0) + max(load.attention_s)
        if decodes and decodes_s > budget_s:
            self._say_crowded(decodes_s, budget_s)
        chunks: list[Chunk] = []
        if not prefills:  # most ticks
            self._loads.appendleft(load)
            return chunks
        budget = TickBudget(tick_time, serve.buckets, self._loads, load)
        area.clear()
        yields = serve.policy == "lars" and len(prefills) > 1  # what is long, to the others
        slack, most, least = slack_at(now_s), serve.long_yield, min(serve.least_yield, serve.long_yield)
        long_groups: set[int] = set()
        step, without_room = min(STEP, serve.chunk_tokens), 0
        for s in prefills:
            long = len(s.request.prompt) > serve.span_tokens
            if (long_groups and long and s.groups & long_groups) or not (room := area.tokens_for(s)):
                continue
            share = 1.0
            if long and yields:
                spare = slack(s)  # compared by hand: `min` and `max` would be a hundredth of a decision
                share -= least if spare < least else most if spare > most else spare
            length = budget.largest_chunk(s, room, budget_s * share, step)
            if length:
                length = area.yielding(s, length, share, step)
            elif tick - self._last_chunk_tick >= serve.least_chunk_every:
                length = min(step, room, len(s.request.prompt) - s.prompt_scheduled)
                self.forced_chunks += not budget.largest_chunk(s, length, budget_s, step)  # or it only had to yield
            if length:
                if long:
                    long_groups |= s.groups
                budget.add_chunk(s, length)
                area.take(s, length)
                chunks.append((s, length))
                self._last_chunk_tick = tick
                if budget.full(budget_s):
                    break
            elif (without_room := without_room + 1) == MOST_PASSED:
                break
        self._pace.expect(tick, budget.seconds)
        self._loads.appendleft(budget.load)
        return chunks

    def _say_crowded(self, predicted_s: float, budget_s: float) -> None:
        if not self.crowded_ticks:
            log.warning(
                "decodes alone are predicted to take %.1f ms, more than the %.1f ms of a tick: admit fewer rows, or "
                "spread them over more devices", 1e3 * predicted_s, 1e3 * budget_s,
            )  # fmt: skip
        self.crowded_ticks += 1
