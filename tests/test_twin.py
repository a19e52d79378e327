"""One trace, served by devices and by their simulation under one clock: the same Batches, one by one."""

from dataclasses import replace

import numpy as np
import pytest

from mnemosyne_jax.config import HardwareConfig
from mnemosyne_jax.planning import tick_time, times_alone
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.request import Request
from mnemosyne_jax.serve.scheduler import Scheduler
from mnemosyne_jax.serve.simulation import SimExecutor
from tests.engines import engine

# A slow device, so that budgets bind and requests meet: a chunk of 64 takes most of a tick.
SLOW = HardwareConfig(matmul_flops_per_s=3e9, hbm_bytes_per_s=3e9, tick_overhead_s=2e-3)
SERVE = dict(
    policy="lars", tbt_slo_s=0.030, idle_tick_s=0.02, chunk_tokens=64, chunk_buckets=(32, 64), pool_pages=24
)  # fmt: skip


class UnderAClock:
    """Real ticks, whose time is that of simulated ones."""

    in_step = True

    def __init__(self, real, simulated: SimExecutor):
        self.real, self.simulated, self.depth = real, simulated, real.depth
        self.now, self.agree, self.wait_until = simulated.now, simulated.agree, simulated.wait_until

    def step(self, batch):
        result, timed = self.real.step(batch), self.simulated.step(batch)
        assert (result is None) == (timed is None)
        return result and replace(result, time_s=timed.time_s)


def requests():
    """Fourteen in 0.4 s, of 3 to 300 tokens; one in three may be late."""
    rng = np.random.default_rng(7)
    for i, at in enumerate(np.sort(rng.uniform(0, 0.4, 14))):
        prompt = rng.integers(0, 200, int(np.exp(rng.uniform(np.log(3), np.log(300)))))
        yield Request(i, prompt, int(rng.integers(1, 12)), float(at), 0.05 if i % 3 == 0 else None, stop_ids=())


def serve(executor, one, ticks, serve_config):
    """(what every batch held, time of every token) of the trace on an executor."""
    scheduler = Scheduler(
        serve_config,
        one.executor.spec,
        pool_pages=one.executor.pool_pages,
        vocab=one.config.vocab,
        fits=one.executor.fits,
        tick_time=ticks,
        prefill_times=times_alone(ticks, serve_config, 1000),
    )
    loop, waiting, sequences = Loop(scheduler, executor, keep_batches=True), list(requests()), []
    while waiting or not loop.idle:
        if loop.idle:
            executor.wait_until(waiting[0].arrival_s)
        now = [r for r in waiting if r.arrival_s <= executor.now()]
        waiting = waiting[len(now) :]
        arrived, _ = loop.tick([scheduler.check(r, r.arrival_s) for r in now])
        sequences += arrived
    assert all(s.reason == "length" for s in sequences)

    def held(row):
        return row.request.id, row.slot, row.group, [(s.group, s.start, s.stride, s.pages.tolist()) for s in row.spans]

    batches = [
        ([(held(r), r.position) for r in b.decodes], [(held(r), r.start, r.length) for r in b.chunks])
        for b in loop.batches
    ]
    return batches, [s.timeline.token_s for s in sequences]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_devices_and_their_simulation_run_the_same_batches(mesh):
    one = engine("llama3", *mesh, **SERVE)
    ticks = tick_time(one.config, SLOW, one.executor.spec, one.serve)
    simulated = serve(SimExecutor(one.serve, one.executor.spec, ticks), one, ticks, one.serve)
    clocked = UnderAClock(one.executor, SimExecutor(one.serve, one.executor.spec, ticks))
    assert serve(clocked, one, ticks, one.serve) == simulated
    batches, _ = simulated
    chunks = [[length for *_, length in chunks] for _, chunks in batches]
    assert any(len(rows) > 1 for rows in chunks) and len({n for rows in chunks for n in rows}) > 4
    assert any(decodes and chunks for decodes, chunks in batches)
