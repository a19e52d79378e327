"""The simulated pipeline: stages at their own pace are never behind stages in lock step, and nobody works overtime."""

import functools

import numpy as np
import pytest
from test_timed_scheduler import SERVE, Simulated

from mnemosyne_jax.config import MeshSpec
from mnemosyne_jax.serve.batch import Batch, ChunkRow
from mnemosyne_jax.serve.pages import Span
from mnemosyne_jax.serve.request import Request
from mnemosyne_jax.serve.simulation import SimExecutor

MIXED = [(0.1, 30_000, 20), (0.2, 100_000, 8), *((0.05 * i, 500 + 300 * i, 20 + 5 * i) for i in range(8))]
MESHES = [MeshSpec(tp=8), MeshSpec(spp=2, tp=4), MeshSpec(spp=4, tp=2), MeshSpec(kvp=2, spp=2, tp=2)]


@functools.cache
def scheduled(mesh):
    """The simulation of a mixed load, and its batches with empty ones at the end, so that all of them leave."""
    buckets = (128, 512, 1024, 2048, 8192) if mesh.kvp > 1 else SERVE.buckets
    one = Simulated(mesh, chunk_buckets=buckets)
    one.run(MIXED)
    last = one.loop.batches[-1].tick
    return one, [*one.loop.batches, *(Batch(last + n) for n in range(1, one.executor.depth + 1))]


def run_through(one, batches, stages):
    """(what each step gave, what stages ran, the executor) of these batches."""
    runs = []
    executor = SimExecutor(one.serve, one.mesh, one.time, stages, runs.append)
    given = [executor.step(batch) for batch in batches]
    return [result for result in given if result and result.batch.tick >= 0], runs, executor


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_stages_at_their_own_pace_are_never_behind(mesh):
    one, batches = scheduled(mesh)
    (locked, _, clock), (free, _, own_clock) = (run_through(one, batches, s) for s in ("lock_step", "asynchronous"))
    assert [r.batch for r in locked] == [r.batch for r in free] and len(locked) > 100
    saved_s = np.array([a.time_s - b.time_s for a, b in zip(locked, free, strict=True)])
    if mesh.spp == 1:
        assert (saved_s == 0).all() and clock.ticks_s == own_clock.ticks_s
    else:
        assert saved_s.min() >= -1e-9 and saved_s.max() > 0


def test_uneven_chunks_cost_their_own_time_at_their_own_pace():
    """In lock step each of two stages takes the time of the large chunk, also for the small one."""
    one = Simulated(MeshSpec(spp=2, tp=4))
    request, spans = Request("a", np.zeros(100_000, np.int32)), (Span(0, 0, 1, np.arange(1000)),)
    batches = [Batch(n, (), (ChunkRow(request, 0, 0, spans, start=1000, length=(64, 8192)[n % 2]),)) for n in range(40)]
    end_s = {stages: run_through(one, batches, stages)[1][-1][0].end_s for stages in ("lock_step", "asynchronous")}
    assert end_s["asynchronous"] < 0.7 * end_s["lock_step"]


@pytest.mark.parametrize("stages", ["lock_step", "asynchronous"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_stage_runs_one_batch_at_a_time_and_a_batch_one_stage(mesh, stages):
    one, batches = scheduled(mesh)
    results, steps, executor = run_through(one, batches, stages)
    by_batch: dict[int, list] = {}
    for stage in range(mesh.spp):
        own = [run for step in steps for run in step if run.stage == stage]
        assert all(a.end_s <= b.begin_s + 1e-9 for a, b in zip(own, own[1:], strict=False))
        for run in own:
            assert run.begin_s <= run.end_s
            by_batch.setdefault(run.batch.tick, []).append(run)
    for result in results:
        passed = by_batch[result.batch.tick]
        assert [run.stage for run in passed] == list(range(mesh.spp)) and passed[-1].end_s == result.time_s
        assert all(a.end_s <= b.begin_s + 1e-9 for a, b in zip(passed, passed[1:], strict=False))
    for earlier, later in zip(batches, batches[mesh.spp :], strict=False):
        if later.decodes:  # whose input may be the other's tokens
            assert by_batch[earlier.tick][-1].end_s <= by_batch[later.tick][0].begin_s + 1e-9
    assert all(result.time_s <= executor.now() for result in results)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_work_is_part_of_the_time_and_of_rows_alone(mesh):
    one, batches = scheduled(mesh)
    shares = {}
    for stages in ("lock_step", "asynchronous"):
        _, _, executor = run_through(one, batches, stages)
        shares[stages] = np.array(executor.work_s) / executor.now()
        assert shares[stages].shape == (mesh.kvp, mesh.spp) and 0.1 < shares[stages].min() <= shares[stages].max() <= 1
    assert (shares["asynchronous"] >= shares["lock_step"] - 1e-9).all()
    idle = SimExecutor(one.serve, mesh, one.time)
    for tick in range(5):
        idle.step(Batch(tick))
    assert idle.now() > 0 and not np.any(idle.work_s)
