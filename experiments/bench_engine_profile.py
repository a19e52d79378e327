"""Where a tick's time goes on the device: kernels of a few steady ticks, by family, from the profiler's own record."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench_engine_record import Bench
from experiments.bench_engine_runs import TimedEngine, plant
from experiments.kernel_record import words

# The first pattern found in a kernel's name says what it is.
FAMILIES = {
    "attend": r"attend_items|attend",
    "merge partials": r"merge_partials",
    "collectives": r"nccl|all[-_]?reduce|all[-_]?gather|all[-_]?to[-_]?all|collective|permute",
    "matmul": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|matmul|dot",
    "copies": r"memcpy|memset|copy",
    "sorts": r"sort|radix",
    "graphs": r"cuda_?graph|command_?buffer",
}
OTHERS, IDLE = "other fusions", "idle"
WARM_TICKS = 4
SHOWN_KERNELS, NAME_LENGTH = 16, 160

Event = tuple[str, float, float]  # name, start and duration in ns


@dataclass(frozen=True)
class Account:
    """Microseconds per tick: in all, of each family and of idle gaps, and of the kernels that take longest.

    Kernels that run at the same time count each, so that families can come to more than the whole.
    """

    total_us: float
    family_us: dict[str, float]
    kernel_us: dict[str, float]


def family(kernel: str) -> str:
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHERS)


def account(events: Iterable[Event], ticks: int) -> Account | None:
    """The Account of so many ticks; None without events. Idle is what no event covers from the first to the last."""
    families: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    first_ns, end_ns, idle_ns = None, 0.0, 0.0
    for name, start_ns, duration_ns in sorted(events, key=lambda event: event[1]):
        first_ns = start_ns if first_ns is None else first_ns
        idle_ns += max(0.0, start_ns - end_ns) if end_ns else 0.0
        end_ns = max(end_ns, start_ns + duration_ns)
        families[family(name)] += duration_ns
        kernels[name] += duration_ns
    if first_ns is None:
        return None
    families[IDLE] = idle_ns
    per_tick = 1e-3 / ticks
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:SHOWN_KERNELS]
    by_share = sorted(families.items(), key=lambda item: -item[1])
    return Account(
        (end_ns - first_ns) * per_tick,
        {name: ns * per_tick for name, ns in by_share},
        {name: ns * per_tick for name, ns in longest},
    )


def device_events(data: Any) -> list[Event]:
    """Kernels and copies of the first GPU in a jax.profiler.ProfileData; empty if it has none."""
    plane = next((plane for plane in data.planes if plane.name == "/device:GPU:0"), None)
    lines = [] if plane is None else [line for line in plane.lines if line.name.startswith("Stream")]
    return [(event.name, event.start_ns, event.duration_ns) for line in lines for event in line.events]


def traced(engine: TimedEngine, ticks: int) -> Account | None:
    """The Account of the next so many ticks of an engine at work; None where the profiler sees no GPU."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down several times
    options.host_tracer_level = 1
    jax.block_until_ready(engine.executor._state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(ticks):
                engine.timed_tick()
            jax.block_until_ready(engine.executor._state)
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        events = [event for file in files for event in device_events(jax.profiler.ProfileData.from_file(str(file)))]
    return account(events, ticks)


def profiled(engine: TimedEngine, prompt: np.ndarray, chunk: int, new_tokens: int, ticks: int) -> dict[str, Any]:
    """{"chunk": Account, "decode": Account} of ticks at the end of this prompt and after it, None where no GPU is seen.

    The prompt's beginning is said to be in the cache; `chunk` is what the engine takes of it in a tick.
    """
    chunks = min(-(-len(prompt) // chunk), ticks + 1)
    sequence = plant(engine, prompt, new_tokens, max(0, len(prompt) - chunks * chunk))
    try:
        if chunks > 1:
            engine.timed_tick()
        found = {"chunk": traced(engine, max(1, chunks - 1))}
        while len(sequence.tokens) < min(WARM_TICKS, new_tokens - 1):
            engine.timed_tick()
        return found | {"decode": traced(engine, min(ticks, new_tokens - len(sequence.tokens)))}
    finally:  # a profiler that fails leaves the engine free for what comes after
        engine.scheduler.cancel(sequence.request.id)
        engine.drain()


def rows_of(bench: Bench, accounts: dict[str, Account | None], **where: Any) -> None:
    """Adds device microseconds per tick, in all, by family and by kernel, of each kind of tick; prints the families."""
    for kind, account in accounts.items():
        here = where | dict(tick=kind)
        if account is None:
            bench.leave_out("the profiler saw no GPU", **here, what="profile")
            continue
        bench.add("device time", account.total_us, "us", **here)
        shares = {name: us / account.total_us for name, us in account.family_us.items()}
        for name, share in shares.items():
            bench.add("device time of family", account.family_us[name], "us", **here, family=name, share=share)
        for name, us in account.kernel_us.items():
            bench.add("device time of kernel", us, "us", **here, kernel=name[:NAME_LENGTH])
        shown = ", ".join(f"{name} {account.family_us[name]:.0f} us ({share:.0%})" for name, share in shares.items())
        print(f"{words(**here)}: {account.total_us:.0f} us: {shown}", flush=True)
