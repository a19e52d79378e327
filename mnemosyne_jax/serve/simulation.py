"""An Executor without devices: batches take the time that a cost model says, tokens are all 0.

The clock is its own: it moves by a tick's time at each step, and by what `wait_until` asks for when there is nothing to
do. It takes a CostModel of its own, so that a scheduler is judged by another's watch.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.budget import BatchLoad, TickTime
from mnemosyne_jax.serve.executor import StepResult

type Stages = Literal["lock_step", "asynchronous"]


@dataclass(frozen=True, eq=False)
class StageRun:
    """One batch in one stage: when it began, and when the stage was free for the next. All groups keep step."""

    stage: int
    begin_s: float
    end_s: float
    batch: Batch


class SimExecutor:
    """Stages in lock step, as the engine has them: at each tick all wait for the slowest.

    With `asynchronous` stages, a stage begins a batch once it is free and has its input, whatever the others do.
    Decodes need the tokens of the batch `spp` before theirs, and each step waits for the result that it gives.

    `report` gets what the stages did at each step.
    """

    def __init__(
        self,
        serve: ServeConfig,
        mesh: MeshSpec,
        tick_time: TickTime,
        stages: Stages = "lock_step",
        report: Callable[[tuple[StageRun, ...]], None] | None = None,
    ):
        self.depth = mesh.spp - 1 + serve.ahead
        self._time, self._groups, self._ahead = tick_time, mesh.kvp, serve.ahead
        self.in_step, self._report = stages == "lock_step", report
        # A batch, its load, and the work of stage 0 with it and all before it, by group; newest first.
        nothing = Batch(-1), BatchLoad.empty(mesh.kvp), (0.0,) * mesh.kvp
        self._pipe = deque([nothing] * mesh.spp, maxlen=mesh.spp)
        self._left_s = deque([0.0] * mesh.spp, maxlen=mesh.spp)  # asynchronous: when the newest batches leave
        self._free_s = [0.0] * mesh.spp  # and when each stage is done with them
        self._unread: deque[StepResult] = deque()
        self._now_s = 0.0
        self.ticks_s: list[float] = []

    @property
    def work_s(self) -> list[list[float]]:
        """[group][stage]: how long each has had rows to work on, at their own cost.

        Not padding up to the program of the tick, nor waiting for others. Every stage does what the one before it did.
        """
        return [list(stages) for stages in zip(*[work_s for _, _, work_s in self._pipe], strict=True)]

    def now(self) -> float:
        return self._now_s

    def agree(self, events: Any) -> Any:
        return events

    def wait_until(self, time_s: float) -> None:
        self._now_s = max(self._now_s, time_s)

    def step(self, batch: Batch) -> StepResult | None:
        load = batch_load(self._time, self._groups, batch)
        work_s = map(operator.add, self._pipe[0][2], _work_s(self._time, load))
        self._pipe.appendleft((batch, load, tuple(work_s)))
        last, end_s = self._run_tick() if self.in_step else self._run_batch()
        self._unread.append(StepResult(last, (0,) * len(last.decodes), (0,) * len(last.chunks), {}, end_s))
        if len(self._unread) <= (self._ahead if self.in_step else self.depth):
            return None
        result = self._unread.popleft()
        self._now_s = max(self._now_s, result.time_s)
        return result

    def _run_tick(self) -> tuple[Batch, float]:
        """Each stage runs the batch that it holds, for as long as the slowest takes: what then leaves, and when."""
        seconds = self._seconds([load for _, load, _ in self._pipe])
        begin_s, self._now_s = self._now_s, self._now_s + seconds
        self.ticks_s.append(seconds)
        if self._report:
            batches = enumerate(batch for batch, _, _ in self._pipe)
            self._report(tuple(StageRun(stage, begin_s, self._now_s, batch) for stage, batch in batches))
        return self._pipe[-1][0], self._now_s

    def _run_batch(self) -> tuple[Batch, float]:
        """The newest batch runs through all stages, and leaves; time moves on to when the first of them is free."""
        (batch, load, _), runs = self._pipe[0], []
        out_s = max(self._now_s, self._left_s[-1]) if batch.decodes else self._now_s
        seconds = self._seconds([load])
        for stage, free_s in enumerate(self._free_s):
            begin_s = max(out_s, free_s)
            out_s = self._free_s[stage] = begin_s + seconds
            runs.append(StageRun(stage, begin_s, out_s, batch))
        self.ticks_s.append(seconds)
        self._left_s.appendleft(out_s)
        self._now_s = self._free_s[0]
        if self._report:
            self._report(tuple(runs))
        return batch, out_s

    def _seconds(self, loads: list[BatchLoad]) -> float:
        seconds = self._time.seconds(loads)
        assert seconds is not None, "no program holds the batches in the pipe"
        return seconds


def batch_load(tick_time: TickTime, groups: int, batch: Batch) -> BatchLoad:
    """What a batch computes, by its rows alone."""
    load = tick_time.with_decodes(BatchLoad.empty(groups), batch.decodes)
    for row in batch.chunks:
        load = tick_time.with_chunk(load, row.spans, row.group is None, row.start, row.length)
    return load


def _work_s(tick_time: TickTime, load: BatchLoad) -> tuple[float, ...]:
    """Seconds of a stage for the rows of each group, were there no other group and no other batch."""
    made = []
    for private, attention_s in zip(load.private_tokens, load.attention_s, strict=True):
        program_s = tick_time.program_s(load.shared_tokens, private)
        assert program_s < math.inf, "no program holds a group of a batch"
        idle = not (load.shared_tokens or private or attention_s)
        made.append(0.0 if idle else program_s + attention_s)
    return tuple(made)
