"""Clocks of a GPU's time, and medians of what they say, for contenders that take turns.

A launch is a batch of calls that the host starts at once. Every clock tells the seconds that the device works on so
many launches, without the host's own time to start them: short calls in an engine are many in one launch, too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROUNDS, REST_S = 5, 0.1
MOST_LAUNCHES = 24  # in a sample: JAX lets no more than 32 wait for the device
BUSY_BYTES, BUSY_PASSES = 512 << 20, 32  # about 12 ms of an H100

# Runs that many launches and says how many seconds they took.
Clock = Callable[[int], float]


@dataclass(frozen=True)
class Timing:
    """The median seconds of a call over the samples, and from their 10th to their 90th percentile."""

    median_s: float
    spread_s: float


def time_calls(clock: Clock, calls: int, sample_s: float) -> Timing:
    """Of a launch that holds so many calls, alone."""
    return time_in_turns({"it": (clock, calls)}, sample_s)["it"]


def time_in_turns(contenders: Mapping[str, tuple[Clock, int]], sample_s: float) -> dict[str, Timing]:
    """The timing of each, by name, given its clock and how many calls its launches hold.

    A sample is as many launches as last `sample_s`, one at least. Contenders take turns sample by sample, and the
    device rests before each as long as it worked, or REST_S: a card at its power limit slows down, and none should pay
    for the work of another.
    """
    launches, last_s = {}, REST_S
    for name, (clock, _) in contenders.items():
        clock(1)  # compiles
        launches[name] = min(MOST_LAUNCHES, max(1, round(sample_s / max(clock(1), 1e-6))))
    took_s: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (clock, calls) in contenders.items():
            time.sleep(max(REST_S, last_s) if REST_S else 0)
            last_s = clock(launches[name])
            took_s[name].append(last_s / (launches[name] * calls))
    return {name: _timing(samples) for name, samples in took_s.items()}


def _timing(samples_s: list[float]) -> Timing:
    low_s, median_s, high_s = np.percentile(samples_s, (10, 50, 90))
    return Timing(float(median_s), float(high_s - low_s))


def jax_clock(launch: Callable[[], Any]) -> Clock:
    """Of what JAX runs: launches queue up behind other work, whose own time is taken off.

    That work runs once before: right after a rest it takes longer, which would be taken off too.
    """

    def clock(launches: int) -> float:
        _seconds_until(_busy)
        alone_s = _seconds_until(_busy)

        def queue() -> Any:
            made = _busy()
            for _ in range(launches):
                made = launch()
            return made

        return _seconds_until(queue) - alone_s

    return clock


def torch_clock(torch: Any, launch: Callable[[], Any]) -> Clock:
    """Of what torch runs, by device events; launches replay a CUDA graph where one can be captured."""
    torch.cuda.synchronize()  # the inputs are there, whatever stream made them
    with torch.cuda.stream(torch.cuda.Stream()):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # JAX's threads may allocate during the capture, which must not fail for that.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
        run = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        run = launch

    def clock(launches: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(launches):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def _seconds_until(work: Callable[[], Any]) -> float:
    begin_s = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - begin_s


def _busy() -> Any:
    """Keeps a GPU busy while the host starts what is measured; a CPU has nothing to hide."""
    return _passes()(_passed()) if jax.default_backend() == "gpu" else None


@functools.cache
def _passes() -> Callable:
    return jax.jit(lambda x: lax.fori_loop(0, BUSY_PASSES, lambda _, x: x + 1, x))


@functools.cache
def _passed() -> jax.Array:
    return jnp.zeros(BUSY_BYTES // 4, jnp.float32)
