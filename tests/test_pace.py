"""A scheduler on a device that is slower or faster than predicted keeps its budget by what it sees."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, ServeConfig
from mnemosyne_jax.planning import tick_time, times_alone
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.pace import Pace
from mnemosyne_jax.serve.request import Request
from mnemosyne_jax.serve.scheduler import Scheduler
from mnemosyne_jax.serve.simulation import SimExecutor

MODEL = ModelConfig(width=64, ffn=128, vocab=97, layers=12, heads=4, kv_heads=2, head_dim=16)
EXPECTED = HardwareConfig(matmul_flops_per_s=2e12, hbm_bytes_per_s=5e11, layer_overhead_s=0.0, tick_overhead_s=2e-4)
SERVE = ServeConfig(
    page_tokens=16, private_rows=4, chunk_tokens=2048, chunk_buckets=(128, 512, 2048), tbt_slo_s=0.010,
    idle_tick_s=0.020, policy="lars",
)  # fmt: skip

NEVER = itertools.repeat(0.0)


def slower(factor: float) -> HardwareConfig:
    rates = {name: getattr(EXPECTED, name) / factor for name in ("matmul_flops_per_s", "hbm_bytes_per_s")}
    return replace(EXPECTED, **rates, tick_overhead_s=EXPECTED.tick_overhead_s * factor)


def loop_over(make, factor: float, mesh: MeshSpec) -> Loop:
    """A Loop over an executor that is slower than its scheduler expects, and that `make` makes."""
    expected, real = (tick_time(MODEL, hardware, mesh, SERVE) for hardware in (EXPECTED, slower(factor)))
    scheduler = Scheduler(
        SERVE, mesh, pool_pages=4000, vocab=97, fits=lambda *tokens: expected.program_rows(*tokens) is not None,
        tick_time=expected, prefill_times=times_alone(expected, SERVE, 64_000),
    )  # fmt: skip
    return Loop(scheduler, make(SERVE, mesh, real), keep_batches=True)


def served(factor: float, mesh: MeshSpec):
    """(the pace found, seconds of each tick with a chunk and a decode) of a long prompt beside a decode."""
    loop = loop_over(SimExecutor, factor, mesh)
    scheduler, executor = loop.scheduler, loop.executor
    prompts = np.zeros(16, np.int32), np.zeros(15_000, np.int32)
    requests = [Request(i, prompts[i], (4000, 1)[i], 0.0, stop_ids=()) for i in range(2)]
    arrived, _ = loop.tick([scheduler.check(request, 0.0) for request in requests])
    while not arrived[1].finished:
        loop.tick()
    took = zip(loop.batches, executor.ticks_s, strict=True)
    return scheduler.pace.ratio, [seconds for batch, seconds in took if batch.chunks and batch.decodes]


@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(spp=2)], ids=str)
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.15, 1.6])
def test_ticks_fill_the_budget_of_the_device_that_there_is(mesh, factor):
    """Ticks of a device that is slower than predicted are longer than the budget until that is seen, then no longer."""
    ratio, seconds = served(factor, mesh)
    budget_s, later = SERVE.tbt_slo_s / mesh.spp, seconds[24:]
    assert ratio == pytest.approx(factor, rel=0.02)
    assert len(later) > 5
    assert max(later) < 1.02 * budget_s
    assert np.mean(later) > 0.7 * budget_s
    if factor > 1:
        assert max(seconds[:4]) > 1.05 * budget_s


def test_a_right_prediction_stays_as_it_is():
    """To the bit: a budget that is met exactly stays met."""
    pace, now_s = Pace(), 0.0
    for tick in range(100):
        pace.expect(tick, 0.1)
        now_s += 0.1
        pace.end(tick, now_s)
        assert pace.ratio == 1.0


def test_what_is_no_tick_says_nothing():
    """Time without work, ticks without an expectation; and a pause of the host says little."""
    pace = Pace()
    pace.end(-1, 0.0)
    pace.end(0, 50.0)  # nothing was expected of it
    pace.rest()
    pace.expect(1, 0.1)
    pace.end(1, 99.0)  # the first after a rest
    assert pace.ratio == 1.0
    pace.expect(2, 0.1)
    pace.end(2, 199.0)
    assert 1.0 < pace.ratio < 1.2
    for tick in range(3, 60):
        pace.expect(tick, 0.1)
        pace.end(tick, 199.0 + 0.1 * (tick - 2))
    assert pace.ratio == pytest.approx(1.0, abs=2e-3)


class Device(SimExecutor):
    """The clock is the host's: a tick that is submitted early waits for its turn, one that comes late finds it idle.

    `pauses_s` are those of the host, one before each tick.
    """

    host_s = idle_s = 0.0
    pauses_s: Iterator[float] = NEVER

    def now(self) -> float:
        return self.host_s

    def wait_until(self, time_s: float) -> None:
        self.host_s = max(self.host_s, time_s)

    def step(self, batch):
        self.host_s += next(self.pauses_s)
        late_s = max(0.0, self.host_s - self._now_s)
        self.idle_s += late_s
        super().wait_until(self.host_s)
        if (result := super().step(batch)) is None:
            return None
        self.wait_until(result.time_s)
        return replace(result, time_s=self.host_s, late=late_s > 0)


def beside_a_long_prompt(mesh: MeshSpec, factor: float, waits: bool, pauses_s: Iterator[float] = NEVER):
    """(TTFT of requests that arrive now and then, how long the device had nothing to do)."""
    loop, prompt = loop_over(Device, factor, mesh), np.zeros(40, np.int32)
    loop.executor.pauses_s = pauses_s
    arrivals = [Request("long", np.zeros(50_000, np.int32), 1, 0.0, stop_ids=())]
    arrivals += [Request(i, prompt, 4, 0.1 + 0.0777 * i, stop_ids=()) for i in range(20)]
    sequences = []
    while arrivals or not loop.idle:
        if waits:
            loop.wait()
        due = [request for request in arrivals if request.arrival_s <= loop.executor.now()]
        arrivals = arrivals[len(due) :]
        sequences += loop.tick(loop.scheduler.check(request, loop.executor.now()) for request in due)[0]
        assert not loop.idle or not arrivals
    return np.array([s.timeline.ttft_s for s in sequences[1:]]), loop.executor.idle_s


@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(spp=2)], ids=str)
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
def test_what_arrives_before_a_tick_ends_is_in_the_next(mesh, factor):
    """Who waits before deciding keeps requests waiting for half a tick less, and the device as busy."""
    at_once_s, _ = beside_a_long_prompt(mesh, factor, waits=False)
    ttft_s, idle_s = beside_a_long_prompt(mesh, factor, waits=True)
    assert at_once_s.mean() - ttft_s.mean() > 0.5 * SERVE.tbt_slo_s / mesh.spp
    assert idle_s == 0


def test_beside_a_host_that_pauses_devices_are_as_busy_as_without_waiting():
    """Pauses of 12 ms before one in 31 ticks of 10 to 20 ms: 77 ms idle if all are decided 8 ms before."""
    pauses_s = [0.0] * 17 + [0.012] + [0.0] * 13
    (_, at_once_s), (_, idle_s) = (
        beside_a_long_prompt(MeshSpec(), 1.0, waits, itertools.cycle(pauses_s)) for waits in (False, True)
    )
    assert at_once_s > 0 and idle_s < at_once_s + 0.004


def test_late_ticks_say_nothing_but_to_decide_sooner():
    def spare_s(pace):
        pace.expect(999, 0.200)
        return pace.spare_s(998)

    pace, now_s = Pace(), 0.0
    assert spare_s(pace) == pytest.approx(0.150)  # a quarter of what runs, as that is longer than 8 ms
    for tick, decide_s in enumerate((None, 0.016, 0.032, 0.064, 0.064)):
        pace.expect(tick, 0.010)
        pace.end(tick, now_s := now_s + 0.030, late=tick > 0)
        assert spare_s(pace) == pytest.approx(0.150 if decide_s is None else 0.200 - max(decide_s, 0.050))
        assert pace.ratio == 1.0
    for tick in range(5, 1005):
        pace.expect(tick, 0.010)
        pace.end(tick, now_s := now_s + 0.010)
    pace.expect(2001, 0.020)
    assert pace.spare_s(2000) == pytest.approx(0.012)
    pace.end(2000, now_s, late=True)  # nothing was expected of it: nobody waited
    assert pace.spare_s(2000) == pytest.approx(0.012)


def test_short_ticks_leave_nothing_to_spare():
    pace = Pace()
    assert pace.spare_s(0) == 0
    pace.expect(0, 5.0)  # has ended
    pace.expect(1, 0.007)
    assert pace.spare_s(0) == 0
    pace.expect(1, 0.020)
    assert pace.spare_s(0) == pytest.approx(0.012)
    pace.expect(1, 0.100)
    assert pace.spare_s(0) == pytest.approx(0.075)
    pace.ratio = 1.2
    assert pace.spare_s(0) == pytest.approx(0.090)
    assert pace.spare_s(1) == 0
