"""Time budgets and policies over a simulated mesh: the budget is kept and filled, and short requests pass long ones."""

from dataclasses import replace

import numpy as np
import pytest

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, ServeConfig, from_yaml
from mnemosyne_jax.planning import tick_time, times_alone
from mnemosyne_jax.serve.budget import BatchLoad
from mnemosyne_jax.serve.chunking import STEP
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.request import Request
from mnemosyne_jax.serve.scheduler import Scheduler
from mnemosyne_jax.serve.simulation import SimExecutor

LLAMA_8B = from_yaml(ModelConfig, "configs/model/llama-3-8b.yaml")
H100 = from_yaml(HardwareConfig, "configs/hardware/h100.yaml")
SERVE = ServeConfig(
    chunk_tokens=8192,
    chunk_buckets=tuple(2**k for k in range(6, 14)),
    private_rows=32,
    span_tokens=65_536,
    policy="lars",
)


class Simulated:
    """A scheduler with a time budget over a SimExecutor, and what was predicted of each of its ticks."""

    def __init__(self, mesh=MeshSpec(tp=8), pool_pages=20_000, **serve):
        self.serve, self.mesh = replace(SERVE, **serve), mesh
        self.time = tick_time(LLAMA_8B, H100, mesh, self.serve)
        self.executor = SimExecutor(self.serve, mesh, self.time)
        self.scheduler = Scheduler(
            self.serve,
            mesh,
            pool_pages=pool_pages,
            vocab=1,
            fits=lambda *tokens: self.time.program_rows(*tokens) is not None,
            tick_time=self.time,
            prefill_times=times_alone(self.time, self.serve, 2_000_000),
        )
        self.loop = Loop(self.scheduler, self.executor, keep_batches=True)

    def run(self, requests):
        """Each of [(arrival_s, prompt tokens, new tokens)] to its end: their sequences."""
        asked = enumerate(requests)
        waiting = [Request(f"{i}", np.zeros(n, np.int32), new, at, stop_ids=()) for i, (at, n, new) in asked]
        waiting.sort(key=lambda r: r.arrival_s)
        sequences = {}
        while waiting or not self.loop.idle:
            if self.loop.idle:
                self.executor.wait_until(waiting[0].arrival_s)
            now = [r for r in waiting if r.arrival_s <= self.executor.now()]
            waiting = waiting[len(now) :]
            arrived, _ = self.loop.tick(now)
            sequences |= {s.request.id: s for s in arrived}
        return [sequences[f"{i}"] for i in range(len(requests))]


DECODES = [(0.0, 1000, 2000)] * 16


@pytest.mark.parametrize("mesh", [MeshSpec(tp=8), MeshSpec(spp=4, tp=2)], ids=str)
def test_budget_is_kept_and_filled_beside_decodes(mesh):
    """A 512K prompt beside 16 decodes: every tick within 30 ms through the pipe, and 90% of it used."""
    one = Simulated(mesh)
    *_, long = one.run([*DECODES, (0.5, 524_288, 4)])
    budget_s = one.serve.tbt_slo_s / mesh.spp
    ticks = np.array(one.executor.ticks_s)
    sizes = np.array(
        [sum(row.length for row in batch.chunks if row.request is long.request) for batch in one.loop.batches]
    )
    beside = (sizes > 0) & np.array([len(batch.decodes) > 0 for batch in one.loop.batches])
    assert beside.sum() > 100 and one.scheduler.forced_chunks == 0
    assert ticks[beside].max() <= budget_s * (1 + 1e-9)
    small = beside & (sizes < 2048)
    assert small.sum() > 100 and ticks[small].mean() >= 0.9 * budget_s
    assert sizes[beside][:5].min() > sizes[beside][-20:-2].max()  # chunks shrink as the prefix grows
    assert (sizes[beside][:-1] % STEP == 0).all()


def test_no_larger_chunk_would_have_fitted():
    """Each chunk of a prompt beside decodes is what trying every multiple of 32 finds."""
    one = Simulated()
    *_, long = one.run([*DECODES, (0.5, 131_072, 4)])
    empty, checked = BatchLoad.empty(1), 0
    for batch in one.loop.batches:
        rows = [row for row in batch.chunks if row.request is long.request]
        if rows and len(batch.chunks) == 1 and batch.decodes and not rows[0].last:
            load = one.time.with_decodes(empty, batch.decodes)
            sizes = range(STEP, 8192 + 1, STEP)
            seconds = [
                one.time.seconds((one.time.with_chunk(load, rows[0].spans, False, rows[0].start, n),)) for n in sizes
            ]
            assert rows[0].length == max(n for n, s in zip(sizes, seconds, strict=True) if s <= one.serve.tbt_slo_s)
            checked += 1
    assert checked > 10


def test_without_decodes_a_tick_may_take_what_an_arrival_can_wait():
    one = Simulated(idle_tick_s=0.1)
    (alone,) = one.run([(0.0, 524_288, 1)])
    assert alone.reason == "length" and max(one.executor.ticks_s) <= 0.1
    assert {row.length for batch in one.loop.batches[:5] for row in batch.chunks} == {8192}


def test_smallest_chunk_runs_now_and_then_where_none_fits():
    one = Simulated(tbt_slo_s=1e-4, least_chunk_every=5)
    *_, prompt = one.run([*DECODES[:2], (1.0, 640, 1)])
    ticks = [b.tick for b in one.loop.batches if any(row.request is prompt.request for row in b.chunks)]
    assert one.scheduler.forced_chunks >= 20 and set(np.diff(ticks)) == {5}


def ttft_of_shorts(policy, **serve):
    shorts = [(1.0 + 0.5 * i, 2000, 8) for i in range(20)]
    one = Simulated(policy=policy, **serve)
    long, *served = one.run([(0.0, 1_000_000, 4), *shorts])
    return np.array([s.timeline.ttft_s for s in served]), long.timeline.ttft_s, one


def test_short_requests_pass_a_long_one():
    """A prompt of 1M tokens in front: under lars the short ones are in time, under exclusive fcfs they wait it out."""
    lars, long_s, _ = ttft_of_shorts("lars", idle_tick_s=0.1)
    exclusive, exclusive_long_s, _ = ttft_of_shorts("fcfs_exclusive", idle_tick_s=0.1)
    assert lars.max() <= 0.5 < 10 < np.median(exclusive)
    assert long_s <= 1.15 * exclusive_long_s  # what the short ones cost it


def test_a_long_prompt_with_slack_yields():
    """Space sharing: the short ones are served in fewer ticks when the long one leaves them a part of the budget."""
    with_yield, without = (ttft_of_shorts("lars", long_yield=y)[0].mean() for y in (0.4, 0.0))
    assert with_yield <= without


def test_at_most_one_long_prompt_in_a_group():
    one = Simulated(mesh=MeshSpec(kvp=2, tp=4), pool_pages=10_000, chunk_buckets=(128, 512, 1024, 2048, 8192))
    one.run([(0.0, 200_000, 2), (0.0, 300_000, 2), (0.1, 60_000, 2), (0.1, 50_000, 2)])
    for batch in one.loop.batches:
        assert sum(len(row.request.prompt) > SERVE.span_tokens for row in batch.chunks) <= 1
