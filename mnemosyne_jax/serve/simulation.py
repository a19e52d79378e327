"""An Executor without devices: batches take the time that a cost model says, tokens are all 0.

The clock is its own: it moves by a tick's time at each step, and by what `wait_until` asks for when there is nothing to
do. It takes a CostModel of its own, so that a scheduler is judged by another's watch.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.budget import BatchLoad, TickTime
from mnemosyne_jax.serve.executor import StepResult


class SimExecutor:
    """Lock-step ticks as the engine has them: all stages wait for the slowest."""

    def __init__(self, serve: ServeConfig, mesh: MeshSpec, tick_time: TickTime):
        self.depth = mesh.spp - 1 + serve.ahead
        self._time, self._groups, self._ahead = tick_time, mesh.kvp, serve.ahead
        self._pipe = deque([(Batch(-1), BatchLoad.empty(mesh.kvp))] * mesh.spp, maxlen=mesh.spp)  # newest first
        self._unread: deque[StepResult] = deque()
        self._now_s = 0.0
        self.ticks_s: list[float] = []

    def now(self) -> float:
        return self._now_s

    def agree(self, events: Any) -> Any:
        return events

    def wait_until(self, time_s: float) -> None:
        """Lets time pass while nothing runs."""
        self._now_s = max(self._now_s, time_s)

    def load(self, batch: Batch) -> BatchLoad:
        """What a batch computes, by its rows alone."""
        load = self._time.with_decodes(BatchLoad.empty(self._groups), batch.decodes)
        for row in batch.chunks:
            load = self._time.with_chunk(load, row.spans, row.group is None, row.start, row.length)
        return load

    def step(self, batch: Batch) -> StepResult | None:
        self._pipe.appendleft((batch, self.load(batch)))
        seconds = self._time.seconds(tuple(load for _, load in self._pipe))
        assert seconds is not None, "no program holds the batches in the pipe"
        self._now_s += seconds
        self.ticks_s.append(seconds)
        leaving, _ = self._pipe[-1]
        zeros = (0,) * len(leaving.decodes), (0,) * len(leaving.chunks)
        self._unread.append(StepResult(leaving, *zeros, {}, self._now_s))
        return self._unread.popleft() if len(self._unread) > self._ahead else None
