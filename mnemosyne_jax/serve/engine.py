"""The loop: schedule, step, commit. The same for a device mesh and for a model of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.executor import Executor
from mnemosyne_jax.serve.request import Request, Sequence
from mnemosyne_jax.serve.scheduler import Scheduler


@dataclass
class Loop:
    """One scheduler driving one executor. `batches` records what was submitted, if asked to."""

    scheduler: Scheduler
    executor: Executor
    keep_batches: bool = False
    batches: list[Batch] = field(default_factory=list)
    _in_flight: int = 0  # ticks since the last batch that was not empty, counted down
    _ended: tuple[int, float, bool] | None = None  # the tick whose result was read last, when, and whether late

    @property
    def idle(self) -> bool:
        """Nothing waits, runs, or is still in the pipe."""
        return self.scheduler.idle and self._in_flight == 0

    def wait(self) -> None:
        """Lets time pass until the next tick is to be decided, a while before the running one is predicted to end."""
        if self._ended:
            tick, end_s, _ = self._ended
            self.executor.wait_until(end_s + self.scheduler.pace.spare_s(tick))

    def tick(
        self, arrivals: Iterable[Request] = (), cancels: Iterable[str | int] = ()
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Runs one tick: (sequences that arrived, sequences that moved on).

        In a run of several processes the arrivals, cancels and times of process 0 hold in all of
        them, so that all schedule alike. Requests must have been checked.
        """
        now_s, ended, arrivals, cancels = self.executor.agree((self.executor.now(), self._ended, arrivals, cancels))
        if ended:
            self.scheduler.pace.end(*ended)
        self._ended = None
        arrived = [self.scheduler.enqueue(request) for request in arrivals]
        for id in cancels:
            self.scheduler.cancel(id)
        if self.idle:
            return arrived, []
        batch = self.scheduler.next_batch(now_s)
        self._in_flight = max(0, self._in_flight - 1) if batch.empty else self.executor.depth
        if self.keep_batches:
            self.batches.append(batch)
        result = self.executor.step(batch)
        if not result:
            return arrived, []
        if self.executor.in_step:
            self._ended = result.batch.tick + self.scheduler.mesh.spp - 1, result.time_s, result.late
        return arrived, self.scheduler.commit(result)
