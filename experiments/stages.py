"""What the stages of a simulated mesh did: the spans of a Perfetto trace, and how busy each was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments import results
from experiments.perfetto import DECODE, Row, TickSpan
from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.budget import TickTime
from mnemosyne_jax.serve.simulation import SimExecutor, StageRun, batch_load


def tick_spans(
    runs: Sequence[StageRun], tick: int, expected: TickTime, serve: ServeConfig, mesh: MeshSpec, waiting: int
) -> Iterator[TickSpan]:
    """A span for each group and stage of one step of a SimExecutor, beside what the scheduler's model predicts for it.

    The budget is that of decodes if any of these batches has one: the scheduler's, but for the few ticks in which a
    prompt is done and its first token on its way.
    """
    predicted_s = expected.seconds(tuple(batch_load(expected, mesh.kvp, run.batch) for run in runs))
    decoding = any(run.batch.decodes for run in runs)
    budget_s = serve.tbt_slo_s / mesh.spp if decoding else serve.idle_tick_s
    for group in range(mesh.kvp):
        for run in runs:
            rows = tuple(_rows(run.batch, group))
            yield TickSpan(tick, group, run.stage, run.begin_s, run.end_s, rows, predicted_s, budget_s, waiting)


def _rows(batch: Batch, group: int) -> Iterator[Row]:
    """Chunks before decodes: what a slice is named after."""
    for row in batch.chunks:
        if row.group in (None, group):
            yield "chunk", str(row.request.id), row.start, row.length
    for row in batch.decodes:
        if row.group in (None, group):
            yield DECODE, str(row.request.id), row.position, 1


def utilisation(executor: SimExecutor, span_s: float, **where: Any) -> list[dict[str, Any]]:
    """Rows: seconds of work per second of each group and stage, and the busiest group's over the mean of groups."""
    rows = [
        results.row("utilisation", round(work_s / span_s, 6), "1", group=group, stage=stage, **where)
        for group, stages in enumerate(executor.work_s)
        for stage, work_s in enumerate(stages)
    ]
    work_s = [sum(stages) for stages in executor.work_s]
    balance = max(work_s) * len(work_s) / (sum(work_s) or 1.0)
    return [*rows, results.row("busiest group / mean", round(balance, 6), "1", **where)]
