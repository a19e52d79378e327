"""Time budgets and policies over a simulated mesh: the budget is kept and filled, and short requests pass long ones."""

from dataclasses import replace

import numpy as np
import pytest

from mnemosyne_jax.config import MeshSpec, ModelConfig, ServeConfig, from_yaml
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.planning import tick_time, times_alone
from mnemosyne_jax.serve.budget import BatchLoad
from mnemosyne_jax.serve.chunking import STEP
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.request import Request
from mnemosyne_jax.serve.scheduler import Scheduler
from mnemosyne_jax.serve.simulation import SimExecutor
from tests.world import guessed

LLAMA_8B = from_yaml(ModelConfig, "configs/model/llama-3-8b.yaml")
H100 = guessed("h100")
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
    assert beside.sum() > 100 and one.scheduler.filling.forced_chunks == 0
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
    assert one.scheduler.filling.forced_chunks >= 20 and set(np.diff(ticks)) == {5}


def test_areas_smaller_than_a_step_are_filled():
    one = Simulated(chunk_tokens=16, chunk_buckets=(16,))
    one.run([(0.0, 640, 1)])
    assert one.scheduler.filling.forced_chunks == 0 and sum(bool(b.chunks) for b in one.loop.batches) == 40


def test_a_deadline_that_cannot_be_kept():
    """Refused at once if it never could be, later if the queue took the time; demoted, it waits for the others."""
    refusing = Simulated(late="refuse")
    with pytest.raises(RequestError, match="deadline_s: got 1.0, is too short: alone it would take"):
        refusing.scheduler.submit(Request("never", np.zeros(1_000_000, np.int32), 4, deadline_s=1.0), 0.0)
    assert refusing.scheduler.idle
    crowd = [Request(i, np.zeros(100_000, np.int32), 2, deadline_s=8.0, stop_ids=()) for i in range(16)]
    ends = {}
    for late in ("refuse", "demote", "serve"):
        one = Simulated(late=late, private_rows=4)
        sequences, _ = one.loop.tick([one.scheduler.check(r, 0.0) for r in crowd])
        while not one.loop.idle:
            one.loop.tick()
        assert {s.reason.partition(":")[0] for s in sequences} == {"length"} | (
            {"refused"} if late == "refuse" else set()
        )
        assert all(pool.free == pool.size for pool in one.scheduler.places.pools)
        ends[late] = sum(bool(s.tokens) and s.timeline.ttft_s <= 8.0 for s in sequences)
    assert 0 < ends["serve"] <= min(ends["refuse"], ends["demote"]) < 16


def test_queue_is_bounded_in_tokens_too():
    one = Simulated(max_waiting_tokens=1000)
    for i in range(2):
        one.scheduler.submit(Request(i, np.zeros(600, np.int32)), 0.0)
    with pytest.raises(RequestError, match="queue: got 1200, is full: no request is taken while 1000 tokens"):
        one.scheduler.submit(Request(2, [0]), 0.0)
    one.loop.tick()  # admitted: they wait no more
    one.scheduler.submit(Request(2, [0]), one.executor.now())


def test_decodes_that_alone_break_the_budget_are_said(caplog):
    one = Simulated(tbt_slo_s=1e-4)
    one.run(DECODES)
    assert one.scheduler.filling.crowded_ticks > 100
    (record,) = caplog.records
    assert "decodes alone are predicted to take" in record.message


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


def test_a_long_prompt_that_is_late_still_leaves_something():
    """Late from the start, it goes first; what little it leaves is enough for short ones to be in time."""

    def ttfts_s(**serve):
        one = Simulated(idle_tick_s=0.1, **serve)
        late = Request("long", np.zeros(1_000_000, np.int32), 4, 0.0, deadline_s=0.001, stop_ids=())
        (long,), _ = one.loop.tick([one.scheduler.check(late, 0.0 - 0.0005)])
        shorts = one.run([(1.0 + 0.5 * i, 2000, 8) for i in range(20)])
        return np.array([s.timeline.ttft_s for s in shorts]), long.timeline.ttft_s

    shorts_s, long_s = ttfts_s()
    greedy_shorts_s, greedy_long_s = ttfts_s(least_yield=0.0)
    assert shorts_s.max() <= 0.5 < greedy_shorts_s.max()
    assert long_s <= 1.1 * greedy_long_s


@pytest.mark.parametrize("kvp", [1, 2])
@pytest.mark.parametrize(
    "policy, prompt, passed", [("lars", 150_000, True), ("lars", 191_990, False), ("fcfs", 150_000, False)]
)
def test_short_requests_pass_a_late_one_that_waits_for_pages(policy, prompt, passed, kvp):
    """Unless they might never leave it the pages that it needs, here all of them."""
    mesh, shorts = MeshSpec(kvp=kvp, tp=8), [(15 + 0.25 * i, 100, 8) for i in range(20)]
    settings = dict(chunk_buckets=(64, 256, 1024, 2048, 8192), policy=policy, late="serve", span_tokens=96_000)
    one = Simulated(mesh, pool_pages=1500 // kvp, **settings)
    holds, waits, *short = one.run([(0.0, 150_000, 6000), (0.1, prompt, 2), *shorts])
    end_s = holds.timeline.token_s[-1]
    assert end_s > 21 and waits.due_s < 15 and end_s <= waits.timeline.admitted_s < end_s + 1
    assert {s.timeline.ttft_s < 0.5 for s in short} == {passed}  # or once they are the more urgent


def test_short_requests_have_a_place_beside_a_prompt_of_all_groups():
    one = Simulated(mesh=MeshSpec(kvp=2, tp=4), pool_pages=10_000, chunk_buckets=(128, 512, 2048, 8192))
    long, *shorts = one.run([(0.0, 1_000_000, 4), *((1.0 + 0.5 * i, 2000, 8) for i in range(20))])
    assert max(s.timeline.ttft_s for s in shorts) <= 0.5 < long.timeline.ttft_s


def test_at_most_one_long_prompt_in_a_group():
    one = Simulated(mesh=MeshSpec(kvp=2, tp=4), pool_pages=10_000, chunk_buckets=(128, 512, 1024, 2048, 8192))
    one.run([(0.0, 200_000, 2), (0.0, 300_000, 2), (0.1, 60_000, 2), (0.1, 50_000, 2)])
    for batch in one.loop.batches:
        assert sum(len(row.request.prompt) > SERVE.span_tokens for row in batch.chunks) <= 1
